// Nodes and their names, in SVG above the edges: a shape for each kind, as in graph/formats/svg_parts.py.

import { s, short } from "./dom.js";
import { shiftLayer } from "./edge_canvas.js";
import { Names } from "./names.js";

/** The outline of a kind's shape around the origin. */
export function shapePath(kind, r) {
  if (kind.startsWith("mtc")) {
    const side = (kind === "mtc_query" ? 1.25 : -1.25) * r;
    return `M0 ${side}L${Math.abs(side)} ${-0.75 * side}H${-Math.abs(side)}z`;
  }
  if (kind.startsWith("value")) {
    const [half, wide] = [0.58 * r, r];
    return `M0 ${-1.15 * r}l${wide} ${half} 0 ${2 * half} ${-wide} ${half} ${-wide} ${-half} 0 ${-2 * half}z`;
  }
  if (kind.startsWith("mlp")) return `M${-r} 0a${r} ${r} 0 1 1 ${2 * r} 0a${r} ${r} 0 1 1 ${-2 * r} 0z`;
  if (kind.startsWith("attention")) return `M0 ${-1.2 * r}L${1.2 * r} 0 0 ${1.2 * r} ${-1.2 * r} 0z`;
  return `M${-r} ${-r}H${r}V${r}H${-r}z`;
}

export class NodeLayer {
  constructor(svg) {
    this.svg = svg;
    this.world = s("g");
    this.shapes = s("g");
    this.names = new Names();
    this.world.append(this.names.below, this.shapes, this.names.above);
    svg.append(this.world);
    this.drawn = { k: 1, x: 0, y: 0 };
    this.elements = new Map();
    this.tabStop = "";
  }

  /** Make the elements of all shown nodes anew, in reading order: by position, then from below. */
  build({ model, layout, points }) {
    this.model = model;
    this.names.of(model, layout, points);
    this.elements.clear();
    const inOrder = [...model.nodes].sort((a, b) => a.position - b.position || a.depth - b.depth || a.index - b.index);
    for (const node of inOrder) {
      const [x, y, r] = [layout.x[node.index], layout.y[node.index], layout.r[node.index]];
      const element = s(
        "g",
        {
          class: `node ${node.kind}`,
          "data-id": node.id,
          tabindex: -1,
          role: "button",
          "aria-pressed": "false",
          "aria-label": model.spokenName(node),
          transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`,
        },
        s("circle", { class: "reach", r: layout.reach[node.index].toFixed(1) }),
        s("path", { d: shapePath(node.kind, r) }),
      );
      this.elements.set(node.id, element);
    }
    this.shapes.replaceChildren(...this.elements.values());
    if (!this.elements.has(this.tabStop))
      this.tabStop = inOrder.find((node) => node.kind === "logit")?.id ?? inOrder[0]?.id;
    this.elements.get(this.tabStop)?.setAttribute("tabindex", "0");
  }

  /** Draw for a view: shapes grow with it, names stay as large as they are. */
  settle(view) {
    this.drawn = { ...view };
    this.svg.style.transform = "";
    this.world.setAttribute("transform", `translate(${view.x} ${view.y}) scale(${view.k})`);
    this.names.place(view.k);
  }

  follow(view) {
    shiftLayer(this.svg, this.drawn, view);
  }

  mark(state, hits) {
    for (const [id, element] of this.elements) {
      const pinned = state.isPinned(id);
      element.classList.toggle("pinned", pinned);
      element.classList.toggle("clicked", id === state.clicked);
      element.classList.toggle("hit", hits.has(id));
      if ((element.getAttribute("aria-pressed") === "true") !== pinned) {
        element.setAttribute("aria-pressed", String(pinned));
        element.setAttribute("aria-label", this.model.spokenName(this.model.graph.byId.get(id)));
      }
    }
  }

  /** Dim all nodes but those that take part in a flow; null lights all. */
  light(flow, ends = []) {
    this.svg.classList.toggle("dimmed", Boolean(flow));
    for (const node of this.model.nodes) {
      const lit = Boolean(flow) && (flow.nodes[node.index] >= 0.02 || ends.includes(node.index));
      this.elements.get(node.id).classList.toggle("lit", lit);
    }
    for (const name of this.names.below.children) {
      const node = this.model.graph.byId.get(name.dataset.of);
      name.classList.toggle("lit", Boolean(flow) && (flow.nodes[node.index] >= 0.02 || ends.includes(node.index)));
    }
  }

  /** Move the one tab stop to a node, and the focus too. */
  focus(id) {
    const element = this.elements.get(id);
    if (!element) return;
    this.elements.get(this.tabStop)?.setAttribute("tabindex", "-1");
    this.tabStop = id;
    element.setAttribute("tabindex", "0");
    element.focus({ preventScroll: true });
  }
}

/** A node's numbers in one line, for tooltips. */
export function figuresLine(node) {
  const told = [];
  if (node.probability >= 0) told.push(`probability ${short(node.probability)}`);
  if (node.isFeature) told.push(`activation ${short(node.activation)}`);
  told.push(`influence ${short(node.influence)}`);
  return told.join(" · ");
}
