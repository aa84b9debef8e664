// Names in the picture: outputs, features, and the heads on the strongest steps; each where nothing else is.

import { pointAt } from "./curves.js";
import { clipped, s, tokenText } from "./dom.js";

const SIZE = 10.5; // of the type, on the screen
const MOST = 140;
const HEADS = 14;
const ALONG = [0.5, 0.56, 0.44, 0.62, 0.38, 0.68, 0.74, 0.32, 0.8, 0.26];

let ruler = null;

/** How wide a text is on the screen. */
function widthOf(text) {
  ruler ??= document.createElement("canvas").getContext("2d");
  ruler.font = `${SIZE}px ${getComputedStyle(document.body).fontFamily}`;
  return ruler.measureText(text).width;
}

const overlap = (a, b) => a[0] < b[2] && a[2] > b[0] && a[1] < b[3] && a[3] > b[1];

export class Names {
  constructor() {
    this.below = s("g", { class: "names", "aria-hidden": "true" });
    this.above = s("g", { class: "names over", "aria-hidden": "true" });
  }

  of(model, layout, points) {
    this.model = model;
    this.layout = layout;
    this.points = points;
  }

  /** Name the outputs, and as many features as there is room for, those with most influence first. */
  place(k) {
    const { model, layout } = this;
    this.k = k;
    this.size = SIZE / k;
    this.taken = model.nodes.map(({ index }) => {
      const r = layout.r[index] + 1;
      return [layout.x[index] - r, layout.y[index] - r, layout.x[index] + r, layout.y[index] + r];
    });
    const names = model.nodes.filter((node) => node.kind === "logit").map((node) => this.output(node));
    const features = model.nodes.filter((node) => node.isFeature && this.wanted(node));
    features.sort((a, b) => b.influence - a.influence || a.index - b.index);
    for (const node of features.slice(0, 3 * MOST)) {
      if (names.length >= MOST) break;
      const name = this.beside(node, 24) ?? this.beside(node, 12);
      if (name) names.push(name);
    }
    this.below.replaceChildren(...names);
  }

  /** Labels always; bare numbers only of what matters, or close up. */
  wanted(node) {
    return this.model.label(node) !== "" || this.k > 1.6 || node.influence > 0.12 * this.model.topInfluence;
  }

  text(x, y, words, attributes) {
    return s("text", { x: x.toFixed(1), y: y.toFixed(1), "font-size": this.size.toFixed(2), ...attributes }, words);
  }

  output(node) {
    const { layout, k } = this;
    const [x, y] = [layout.x[node.index] + 3 / k, layout.y[node.index] - layout.r[node.index] - 4 / k];
    const chance = node.probability >= 0 ? ` ${node.probability.toFixed(2)}` : "";
    const turn = `rotate(-40 ${x.toFixed(1)} ${y.toFixed(1)})`;
    return this.text(x, y, clipped(tokenText(node.label), 16) + chance, {
      class: "output",
      transform: turn,
      "data-of": node.id,
    });
  }

  /** A feature's name below it, beside it or above it; null where there is no room. */
  beside(node, letters) {
    const { layout, model, size } = this;
    const words = model.shortName(node, letters);
    const half = widthOf(words) / this.k / 2 + 1;
    const [x, y, r] = [layout.x[node.index], layout.y[node.index], layout.r[node.index]];
    const tall = 0.5 * size;
    const places = [
      [0, r + tall + 1],
      [r + half + 2, 0],
      [-r - half - 2, 0],
      [0, -r - tall - 1],
    ];
    for (const [dx, dy] of places) {
      if (!this.take(x + dx, y + dy, half, tall, this.taken)) continue;
      const looks = { class: model.label(node) ? "label" : "number", "data-of": node.id };
      return this.text(x + dx, y + dy + 0.36 * size, words, looks);
    }
    return null;
  }

  /** Take the rectangle around a middle if all of it is free. */
  take(x, y, half, tall, taken) {
    const box = [x - half, y - tall, x + half, y + tall];
    if (box[0] < -20 || box[2] > this.layout.width + 60 / this.k) return false;
    if (taken.some((other) => overlap(box, other))) return false;
    taken.push(box);
    return true;
  }

  /**
   * Write over all else the strongest head on steps between tokens, and the name of the node that is open.
   *
   * @param edges The edges that are lit, or all; the strongest last.
   * @param node The open node, undefined if there is none.
   */
  over(edges, node) {
    const taken = [...this.taken];
    const { model, size, k } = this;
    const names = [];
    if (node && model.hasNode[node.index]) {
      const [x, y] = [this.layout.x[node.index], this.layout.y[node.index] + this.layout.r[node.index] + 0.9 * size];
      this.take(x, y, widthOf(model.shortName(node)) / k / 2, 0.5 * size, taken);
      names.push(this.text(x, y + 0.36 * size, model.shortName(node), { class: "open" }));
    }
    const most = names.length + HEADS;
    for (let i = edges.length - 1; i >= 0 && names.length < most && i > edges.length - 80; i--) {
      const edge = edges[i];
      const head = model.graph.crosses(edge) ? model.strongestHead(edge) : "";
      if (!head) continue;
      const half = widthOf(head) / k / 2 + 1.5 / k;
      for (const t of ALONG) {
        const [x, y] = pointAt(this.points, edge, t);
        if (!this.take(x, y, half, 0.55 * size, taken)) continue;
        const sign = model.graph.weight[edge] >= 0 ? "above" : "below";
        names.push(this.text(x, y + 0.36 * size, head, { class: `head ${sign}` }));
        break;
      }
    }
    this.above.replaceChildren(...names);
  }
}
