// What shapes, colours and widths mean.

import { byId, h } from "./dom.js";

const KINDS = [
  ["embedding", "token"],
  ["logit", "output"],
  ["mlp_feature", "MLP feature"],
  ["attention_feature", "attention feature"],
  ["mtc_key", "MTC feature, key side"],
  ["mtc_query", "MTC feature, query side"],
  ["value_feature", "value feature"],
  ["mlp_error", "MLP error"],
  ["attention_error", "attention error"],
  ["value_error", "value error"],
  ["block_error", "block error"],
];

export function drawLegend(graph) {
  const kinds = new Set(graph.nodes.map((node) => node.kind));
  const sign = (name, text) => h("li", {}, h("span", { class: `chip ${name}`, "aria-hidden": "true" }), text);
  const stroke = (name, text) => h("li", {}, h("span", { class: `stroke ${name}`, "aria-hidden": "true" }), text);
  const keys = [
    ["drag, wheel", "move, zoom"],
    ["hover", "what is up- and downstream"],
    ["click", "open a node or an edge"],
    ["shift-click, P", "pin"],
    ["arrows", "move between nodes"],
    ["I, O", "strongest input, output"],
    ["/", "search"],
    ["0", "show all"],
    ["Esc", "close"],
  ];
  byId("legend").replaceChildren(
    h(
      "details",
      {},
      h("summary", {}, "Legend"),
      h(
        "div",
        { class: "sheet" },
        h(
          "ul",
          {},
          KINDS.filter(([kind]) => kinds.has(kind)).map(([kind, text]) => sign(kind, text)),
          stroke("above", "raises its target"),
          stroke("below", "lowers its target"),
          graph.firstHops.some((rows) => rows.length) ? stroke("frozen", "through frozen attention") : null,
        ),
        h("p", { class: "quiet" }, "Width: share of the target’s input. Strength: score of the edge. Size: influence."),
        h(
          "dl",
          {},
          keys.map(([key, text]) => h("div", {}, h("dt", {}, key), h("dd", {}, text))),
        ),
      ),
    ),
  );
}
