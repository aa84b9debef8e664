// What is up- and downstream of a node, over all paths: how much of its input comes from there, and how much of the
// input of what is above comes from it.

/**
 * @param order Edges by their target's depth, from the top (`fromTheTop`).
 * @returns {{nodes: Float64Array, edges: Float64Array}} For each node and edge the larger of its two parts, 0 to 1.
 */
export function flowAround(graph, node, share, order, linkType) {
  const edges = new Float64Array(share.length);
  const up = new Float64Array(graph.nodes.length);
  const down = new Float64Array(graph.nodes.length);
  up[node] = down[node] = 1;
  if (linkType !== "output") {
    for (const e of order) {
      const part = up[graph.target[e]] * share[e];
      if (part === 0) continue;
      up[graph.source[e]] += part;
      edges[e] = part;
    }
  }
  if (linkType !== "input") {
    for (let i = order.length - 1; i >= 0; i--) {
      const e = order[i];
      const part = down[graph.source[e]] * share[e];
      if (part === 0) continue;
      down[graph.target[e]] += part;
      edges[e] = Math.max(edges[e], part);
    }
  }
  return { nodes: up.map((part, i) => Math.max(part, down[i])), edges };
}
