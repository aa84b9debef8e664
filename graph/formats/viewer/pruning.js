// graph/pruning.py and graph/influence.py once more, number by number: the same masks for the same thresholds.
// Shapes: n nodes, m edges.

const ROUNDING = 1e-12;

/** A sum in the order in which numpy adds, pairwise; thresholds near 1 hang on the last bit. */
export function pairwiseSum(values, start = 0, count = values.length) {
  if (count < 8) {
    let sum = -0.0;
    for (let i = start; i < start + count; i++) sum += values[i];
    return sum;
  }
  if (count <= 128) {
    const r = Array.from(values.subarray(start, start + 8));
    let i = 8;
    for (; i < count - (count % 8); i += 8) for (let k = 0; k < 8; k++) r[k] += values[start + i + k];
    let sum = r[0] + r[1] + (r[2] + r[3]) + (r[4] + r[5] + (r[6] + r[7]));
    for (; i < count; i++) sum += values[start + i];
    return sum;
  }
  let half = Math.floor(count / 2);
  half -= half % 8;
  return pairwiseSum(values, start, half) + pairwiseSum(values, start + half, count - half);
}

/** (m,) each edge's part of its target's input; edges outside the mask have none. */
export function shares(graph, mask) {
  const m = graph.weight.length;
  const total = new Float64Array(graph.nodes.length);
  for (let e = 0; e < m; e++) if (mask[e]) total[graph.target[e]] += Math.abs(graph.weight[e]);
  const share = new Float64Array(m);
  for (let e = 0; e < m; e++) {
    const sum = total[graph.target[e]];
    if (mask[e] && sum > 0) share[e] = Math.abs(graph.weight[e]) / sum;
  }
  return share;
}

/** Edges by their target's depth, from the top, otherwise in their own order. */
export function fromTheTop(graph) {
  const order = Int32Array.from(graph.weight, (_, e) => e);
  const depth = Int32Array.from(graph.target, (node) => graph.nodes[node].depth);
  return order.sort((a, b) => depth[b] - depth[a] || a - b);
}

/** (n,) influence on the targets over the edges of the mask. */
export function nodeInfluence(graph, mask, share, order) {
  const influence = new Float64Array(graph.nodes.length);
  for (const e of order) {
    if (!mask[e]) continue;
    const target = graph.target[e];
    influence[graph.source[e]] += (influence[target] + graph.nodes[target].targetWeight) * share[e];
  }
  return influence;
}

/** (m,) scores of the edges of the mask, 0 for all others. */
export function edgeScores(graph, mask, share, order) {
  const influence = nodeInfluence(graph, mask, share, order);
  return Float64Array.from(share, (part, e) => {
    const target = graph.target[e];
    return mask[e] ? part * (influence[target] + graph.nodes[target].targetWeight) : 0;
  });
}

/** The smallest score that is kept when the strongest shall hold a share of the sum. */
export function threshold(scores, share) {
  const ascending = Float64Array.from(scores).sort();
  if (!ascending.length || !(pairwiseSum(scores) > 0)) return 0;
  // numpy walks a reversed array in the order of memory, which is from below.
  const total = pairwiseSum(ascending);
  let sum = 0;
  for (let i = ascending.length - 1; i >= 0; i--) {
    sum += ascending[i];
    if (sum / total >= share) return ascending[i];
  }
  return ascending[0];
}

/** The thresholds that the file's graph was pruned with, null for a full one. */
export function prunedWith(graph) {
  const settings = graph.ownKeys.has("settings") ? (graph.metadata.settings ?? {}) : {};
  const { node_threshold: node = null, edge_threshold: edge = null } = settings;
  return { node, edge };
}

function keptNodes(graph, nodeThreshold, before) {
  const { nodes } = graph;
  const influence = Float64Array.from(nodes, (node) => node.influence);
  const total = graph.ownKeys.has("influence_total") ? graph.metadata.influence_total : pairwiseSum(influence);
  const always = (node) => node.kind === "embedding" || node.isTarget;
  const wasPruned = before.node !== null || before.edge !== null;
  if (wasPruned && total > 0) {
    const strong = (node) => node.cumulative - node.influence / total < nodeThreshold - ROUNDING;
    return Uint8Array.from(nodes, (node) => (strong(node) || always(node) ? 1 : 0));
  }
  const least = threshold(influence, nodeThreshold);
  return Uint8Array.from(nodes, (node) => (node.influence >= least || always(node) ? 1 : 0));
}

/** Drop features and errors that nothing reads, and features that read nothing, until none is left. */
function dropDeadEnds(graph, nodeMask, edgeMask) {
  const { nodes, source, target } = graph;
  for (;;) {
    const isRead = new Uint8Array(nodes.length);
    const reads = new Uint8Array(nodes.length);
    edgeMask.forEach((kept, e) => {
      if (!kept) return;
      isRead[source[e]] = 1;
      reads[target[e]] = 1;
    });
    let dead = false;
    for (const node of nodes) {
      const i = node.index;
      if (!nodeMask[i] || node.isTarget) continue;
      const unread = (node.isFeature || node.isError) && !isRead[i];
      if (unread || (node.isFeature && !reads[i])) {
        nodeMask[i] = 0;
        dead = true;
      }
    }
    if (!dead) return;
    edgeMask.forEach((kept, e) => {
      if (kept && !(nodeMask[source[e]] && nodeMask[target[e]])) edgeMask[e] = 0;
    });
  }
}

/**
 * The part of the graph that carries the influence.
 *
 * @returns {{nodes: Uint8Array, edges: Uint8Array}} Masks over all nodes and edges of the file.
 */
export function prune(graph, nodeThreshold, edgeThreshold, order) {
  const before = prunedWith(graph);
  const all = { nodes: new Uint8Array(graph.nodes.length).fill(1), edges: new Uint8Array(graph.weight.length).fill(1) };
  if (before.node === nodeThreshold && before.edge === edgeThreshold) return all;
  const nodeMask = keptNodes(graph, nodeThreshold, before);
  const among = all.edges.map((_, e) => nodeMask[graph.source[e]] & nodeMask[graph.target[e]]);
  const scores = edgeScores(graph, among, shares(graph, among), order);
  const present = scores.filter((_, e) => among[e]);
  const least = threshold(present, edgeThreshold);
  const edgeMask = among.map((kept, e) => (kept && scores[e] >= least ? 1 : 0));
  dropDeadEnds(graph, nodeMask, edgeMask);
  return { nodes: nodeMask, edges: edgeMask };
}
