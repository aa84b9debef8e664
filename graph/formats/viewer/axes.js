// Tokens below and layers at the left, which stay in sight however the picture is moved.

import { clipped, s } from "./dom.js";
import { ROW_NAMES } from "./layout.js";

export const LEFT = 78;
const SLANT = 42;
const LETTER = 6.2; // about the width of a letter

export class Axes {
  constructor(svg, graph) {
    this.svg = svg;
    this.back = s("g", { class: "axis-ground" });
    this.rows = s("g");
    this.tokens = s("g");
    this.longest = Math.max(...graph.tokens.map((_, position) => Math.min(14, [...graph.tokenText(position)].length)));
    svg.append(this.back, this.rows, this.tokens);
  }

  build(model, layout) {
    this.layout = layout;
    const blocks = new Set(model.nodes.filter((node) => node.kind === "block_error").map((node) => node.layer));
    for (const node of model.nodes) if (node.kind.startsWith("mlp")) blocks.delete(node.layer);
    this.rowTexts = layout.rows.map((row) => {
      const name = row.sort === "mlp" && blocks.has(row.layer) ? "block" : ROW_NAMES[row.sort];
      return s("text", { class: "row-name", x: LEFT - 10 }, name);
    });
    this.layerTexts = layout.rows
      .filter((row) => row.sort === "mlp")
      .map((row) => {
        const last = layout.rows.filter((other) => other.layer === row.layer).at(-1);
        return { row, last, text: s("text", { class: "layer-name", x: 10 }, `L${row.layer}`) };
      });
    this.rows.replaceChildren(...this.rowTexts, ...this.layerTexts.map((item) => item.text));
    this.tokenTexts = layout.columns.map((column) => {
      const label = clipped(model.graph.tokenText(column.position), 14);
      const text = s("text", { class: "token", "data-position": column.position }, label);
      text.label = label;
      return text;
    });
    this.tokens.replaceChildren(...this.tokenTexts);
  }

  /** Room that tokens take below the picture, when columns have a width on the screen. */
  depthFor(columnWidth) {
    this.slanted = this.longest * LETTER > columnWidth - 4;
    return this.slanted ? 16 + Math.min(14, this.longest) * LETTER * 0.74 : 26;
  }

  follow(view, width, height, bottom) {
    this.back.replaceChildren(
      s("rect", { x: 0, y: 0, width: LEFT, height }),
      s("rect", { x: 0, y: height - bottom, width, height: bottom }),
      s("path", { class: "axis-line", d: `M${LEFT} 0V${height - bottom}H${width}` }),
    );
    const inside = (y) => y > 8 && y < height - bottom + 4;
    this.layout.rows.forEach((row, index) => {
      const y = view.y + view.k * (row.top + row.height / 2);
      const text = this.rowTexts[index];
      const shown = row.used && inside(y) && view.k * row.height > 9;
      text.setAttribute("visibility", shown ? "visible" : "hidden");
      text.setAttribute("y", (y + 3.5).toFixed(1));
    });
    for (const { row, last, text } of this.layerTexts) {
      const y = view.y + view.k * (row.top + (last.top + last.height - row.top) / 2);
      text.setAttribute("visibility", inside(y) ? "visible" : "hidden");
      text.setAttribute("y", (y + 4).toFixed(1));
    }
    const y = height - bottom + 16;
    let lastX = -Infinity;
    this.layout.columns.forEach((column, index) => {
      const x = view.x + view.k * column.centre;
      const text = this.tokenTexts[index];
      const shown = x > LEFT - 2 && x < width + 10 && x - lastX > 8.5;
      text.setAttribute("visibility", shown ? "visible" : "hidden");
      if (!shown) return;
      lastX = x;
      text.classList.toggle("slanted", this.slanted);
      const turn = this.slanted ? ` rotate(${-SLANT})` : "";
      text.setAttribute("transform", `translate(${(this.slanted ? x + 4 : x).toFixed(1)} ${y})${turn}`);
    });
  }

  light(positions) {
    this.tokenTexts.forEach((text, position) => text.classList.toggle("lit", positions.has(position)));
  }
}
