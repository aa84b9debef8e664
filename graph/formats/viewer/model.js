// What is left of the graph at the current thresholds, and the names that its nodes go by.

import { clipped, quoted, tokenText, visible } from "./dom.js";
import { flowAround } from "./flow.js";
import { headName, STAYS } from "./graph_data.js";
import { edgeScores, fromTheTop, prune, shares } from "./pruning.js";

export class Model {
  constructor(graph, state) {
    this.graph = graph;
    this.state = state;
    this.order = fromTheTop(graph);
    this.update();
  }

  /** Prune with the thresholds of the state. */
  update() {
    const { graph, state } = this;
    const kept = prune(graph, state.nodeThreshold, state.edgeThreshold, this.order);
    if (state.density < 1) this.leaveOutDense(kept);
    this.hasNode = kept.nodes;
    this.hasEdge = kept.edges;
    this.nodes = graph.nodes.filter((node) => kept.nodes[node.index]);
    this.share = shares(graph, kept.edges);
    this.score = edgeScores(graph, kept.edges, this.share, this.order);
    const edges = [];
    this.inputs = graph.nodes.map(() => []);
    this.outputs = graph.nodes.map(() => []);
    kept.edges.forEach((has, edge) => {
      if (!has) return;
      edges.push(edge);
      this.inputs[graph.target[edge]].push(edge);
      this.outputs[graph.source[edge]].push(edge);
    });
    // Weakest first, so that the strongest lie on top.
    this.edges = Int32Array.from(edges).sort((a, b) => this.score[a] - this.score[b] || a - b);
    this.topScore = edges.length ? this.score[this.edges[edges.length - 1]] : 0;
    const features = this.nodes.filter((node) => node.isFeature);
    this.topInfluence = features.reduce((most, node) => Math.max(most, node.influence), 0);
    for (const list of this.inputs) list.sort((a, b) => this.share[b] - this.share[a]);
    for (const list of this.outputs) list.sort((a, b) => this.score[b] - this.score[a]);
  }

  /** Features that are active on more than a share of all tokens, by their pages. */
  leaveOutDense(kept) {
    const { graph, state } = this;
    for (const node of graph.nodes) {
      if (node.isFeature && !node.isTarget && graph.page(node)?.density > state.density) kept.nodes[node.index] = 0;
    }
    kept.edges.forEach((has, edge) => {
      if (has && !(kept.nodes[graph.source[edge]] && kept.nodes[graph.target[edge]])) kept.edges[edge] = 0;
    });
  }

  flow(node) {
    return flowAround(this.graph, node, this.share, this.order, this.state.linkType);
  }

  /** What somebody, the graph or the feature's page calls a node, "" if nobody does. */
  label(node) {
    const given = this.state.names.get(node.id);
    if (given) return visible(given);
    if (!node.isFeature) return "";
    return visible(node.label || this.graph.page(node)?.label || "");
  }

  /** The shortest name: the label, else a token, else the feature's number. */
  shortName(node, letters = 28) {
    const label = this.label(node);
    if (label) return clipped(label, letters);
    if (node.kind === "embedding") return clipped(this.graph.tokenText(node.position), letters);
    if (node.kind === "logit") return clipped(tokenText(node.label), letters);
    return node.isError ? "error" : `#${node.feature}`;
  }

  /** Label and name, for lists: `moves names · attention L1 #1360`. */
  fullName(node) {
    const label = this.label(node);
    return label ? `${label} · ${this.graph.name(node)}` : this.graph.name(node);
  }

  /** The whole of it for a screen reader. */
  spokenName(node) {
    const at = node.kind === "embedding" ? `position ${node.position}` : `at ${this.graph.place(node.position)}`;
    const pinned = this.state.isPinned(node.id) ? ", pinned" : "";
    const chance = node.probability >= 0 ? `, probability ${node.probability.toFixed(2)}` : "";
    return `${this.fullName(node)} ${at}${chance}, influence ${node.influence.toPrecision(2)}${pinned}`;
  }

  /** The head with the largest loading on an edge, "" without any. */
  strongestHead(edge) {
    const rows = this.graph.heads[edge].length ? this.graph.heads[edge] : this.graph.lastHops[edge];
    const [first] = headSums(rows.filter((row) => row[1] > STAYS));
    return first ? headName(first.layer, first.head) : "";
  }

  edgeTitle(edge) {
    const { graph } = this;
    const [from, to] = [graph.nodes[graph.source[edge]], graph.nodes[graph.target[edge]]];
    const where = (node) => (node.kind === "embedding" ? "" : ` at ${quoted(graph.tokens[node.position])}`);
    return `${this.fullName(from)}${where(from)} → ${this.fullName(to)}${where(to)}`;
  }
}

/** Loadings summed over positions: [{layer, head, weight, rows}], strongest first. */
export function headSums(rows) {
  const sums = new Map();
  for (const row of rows) {
    const key = `${row[0]} ${row[1]}`;
    if (!sums.has(key)) sums.set(key, { layer: row[0], head: row[1], weight: 0, rows: [] });
    const sum = sums.get(key);
    sum.weight += row[4];
    sum.rows.push(row);
  }
  return [...sums.values()].sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
}
