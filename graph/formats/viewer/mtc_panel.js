// A multitoken feature: where it is read, where it writes, and the pattern that moves it.

import { h, short } from "./dom.js";
import { headName } from "./graph_data.js";
import { heatMap, tokenLine } from "./heat_map.js";
import { barRows, block, nodeButton } from "./parts.js";
import { qkPanel } from "./qk_panel.js";

/** All nodes of the same feature in the file's graph, by side. */
function sidesOf(graph, node) {
  const same = graph.nodes.filter((other) => other.dictionary === node.dictionary && other.feature === node.feature);
  const by = (kind) => same.filter((other) => other.kind === kind).sort((a, b) => a.position - b.position);
  return { keys: by("mtc_key"), queries: by("mtc_query") };
}

/**
 * The feature's own weight of each head, from its edges: loading = weight of head x attention x key activation.
 * Taken where the attention is largest, so that rounding matters least.
 */
function headWeights(graph, keys, queries) {
  const best = new Map();
  for (const key of keys)
    for (const query of queries) {
      const edge = graph.edgeNames.get(`${key.id}->${query.id}`);
      if (edge === undefined || !(key.activation !== 0)) continue;
      for (const [layer, head, at, from, weight] of graph.heads[edge]) {
        const attention =
          head === -1 ? Number(at === from) : (graph.patterns.get(`${layer}.${head}`)?.[from]?.[at] ?? 0);
        const known = best.get(head);
        if (attention <= 1e-6 || (known && known.attention >= attention)) continue;
        best.set(head, { layer, head, attention, weight: weight / (attention * key.activation) });
      }
    }
  return [...best.values()].sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
}

/** P[query, key]: the heads' patterns with the feature's weights, and the identity's on the diagonal. */
function movingPattern(graph, weights) {
  return graph.tokens.map((_, query) =>
    Array.from({ length: query + 1 }, (_, key) =>
      weights.reduce((sum, { layer, head, weight }) => {
        const attention =
          head === -1 ? Number(key === query) : (graph.patterns.get(`${layer}.${head}`)?.[query]?.[key] ?? 0);
        return sum + weight * attention;
      }, 0),
    ),
  );
}

export function mtcPanel(app, node) {
  const { graph } = app.model;
  const { keys, queries } = sidesOf(graph, node);
  const weights = headWeights(graph, keys, queries);
  const side = (nodes, empty) => (nodes.length ? barRowsOfNodes(app, nodes, node) : h("p", { class: "quiet" }, empty));
  const at = (nodes) =>
    graph.tokens.map((_, position) => nodes.find((other) => other.position === position)?.activation ?? 0);
  const parts = [
    block(
      "Key side: where it is read",
      tokenLine(graph.tokens, at(keys), spot(keys, node)),
      side(keys, "Pruned away."),
    ),
    block(
      "Query side: where it writes",
      tokenLine(graph.tokens, at(queries), spot(queries, node)),
      side(queries, "Pruned away."),
    ),
  ];
  if (!weights.length) return parts;
  const steps = stepsBetween(graph, keys, queries).filter(
    ([key, query]) => key === node.position || query === node.position,
  );
  parts.push(
    block(
      "Head loadings",
      h("p", { class: "quiet" }, "The feature’s own weight of each head’s pattern."),
      barRows(
        weights.map(({ layer, head, weight }) => ({ name: headName(layer, head), weight })),
        { label: "Head loadings" },
      ),
    ),
    block(
      "What moves it",
      heatMap(graph, movingPattern(graph, weights), steps, "Weighted pattern from key side to query side"),
      why(app, weights, steps, node),
    ),
  );
  return parts;
}

const spot = (nodes, node) => new Set(nodes.includes(node) ? [node.position] : []);

/** [key, query] of the feature's own edges. */
function stepsBetween(graph, keys, queries) {
  return keys.flatMap((key) =>
    queries
      .filter((query) => graph.edgeNames.has(`${key.id}->${query.id}`))
      .map((query) => [key.position, query.position]),
  );
}

function barRowsOfNodes(app, nodes, current) {
  const strongest = [...nodes].sort((a, b) => Math.abs(b.activation) - Math.abs(a.activation));
  return h(
    "ul",
    { class: "plain" },
    strongest
      .slice(0, 8)
      .map((node) =>
        h(
          "li",
          { class: node === current ? "current" : null },
          nodeButton(app, node, `at ${app.model.graph.place(node.position)}`),
          h("span", { class: "value" }, short(node.activation)),
        ),
      ),
  );
}

/** The scores of the strongest head that moves it away from its place. */
function why(app, weights, steps, node) {
  for (const { layer, head } of weights) {
    for (const [key, query] of steps) {
      const panel = head >= 0 && key !== query ? qkPanel(app, layer, head, query, key, node.id) : null;
      if (panel) return panel;
    }
  }
  return null;
}
