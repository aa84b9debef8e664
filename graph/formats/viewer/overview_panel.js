// The panel when no node and no edge is open: what the graph says at a glance.

import { h, short, signed } from "./dom.js";
import { barRows, block, nodeButton } from "./parts.js";

export function overviewPanel(app) {
  const { model } = app;
  const { graph } = model;
  const outputs = model.nodes.filter((node) => node.isTarget).sort((a, b) => b.targetWeight - a.targetWeight);
  const steps = [...model.edges]
    .filter((edge) => graph.mediated(edge) && graph.crosses(edge))
    .slice(-8)
    .reverse();
  const features = model.nodes
    .filter((node) => node.isFeature)
    .sort((a, b) => b.influence - a.influence)
    .slice(0, 8);
  return [
    h("p", { class: "eyebrow" }, "Overview"),
    h("h2", {}, "What the model predicts"),
    barRows(
      outputs.map((node) => ({
        name: model.shortName(node),
        weight: node.probability >= 0 ? node.probability : node.targetWeight,
        note: node.kind === "logit" ? "" : graph.name(node),
        act: () => app.open(node.id),
      })),
      { most: 1, label: "Outputs", bySign: false },
    ),
    steps.length
      ? block(
          "Strongest steps between tokens",
          h(
            "ul",
            { class: "steps" },
            steps.map((edge) => stepRow(app, edge)),
          ),
        )
      : null,
    features.length
      ? block(
          "Strongest features",
          h(
            "ul",
            { class: "plain" },
            features.map((node) =>
              h(
                "li",
                {},
                h("span", {}, nodeButton(app, node), h("small", {}, `at ${graph.place(node.position)}`)),
                h("span", { class: "value", title: "influence" }, short(node.influence)),
              ),
            ),
          ),
        )
      : null,
    evidence(graph),
  ].filter(Boolean);
}

function stepRow(app, edge) {
  const { model } = app;
  const { graph } = model;
  const [source, target] = [graph.nodes[graph.source[edge]], graph.nodes[graph.target[edge]]];
  const enter = () => {
    app.viewport.hover = { node: -1, edge };
    app.viewport.mark();
  };
  const on = { click: () => app.openEdge(edge), pointerenter: enter, pointerleave: () => app.viewport.leave() };
  return h(
    "li",
    {},
    h(
      "button",
      { type: "button", class: "step", on },
      h("b", {}, model.strongestHead(edge)),
      h("span", { class: "name" }, `${graph.tokenText(source.position)} → ${graph.tokenText(target.position)}`),
      h("span", { class: "note" }, `${model.shortName(source, 26)} to ${model.label(target) || graph.name(target)}`),
      h("span", { class: "value" }, signed(graph.weight[edge])),
    ),
  );
}

/** How far the graph can be trusted: its scores, its ledger and what interventions found. */
function evidence(graph) {
  const { scores = {}, ledger = {}, verification = {} } = graph.metadata;
  const rows = [];
  const add = (name, value, why) => Number.isFinite(value) && rows.push([name, short(value), why]);
  add("replacement", scores.replacement, "share of the influence that starts at tokens, not at errors");
  add("completeness", scores.completeness, "share of the inputs that features and tokens explain");
  add("ledger gap", ledger.max_relative_gap, "worst difference of edges plus bias from a pre-activation");
  add("left out", graph.metadata.left_out_influence, "influence that was not followed");
  add("rank correlation", verification?.nodes?.spearman, "of predicted and measured effects of ablating nodes");
  if (!rows.length) return null;
  return block(
    "How far to trust it",
    h(
      "ul",
      { class: "trust" },
      rows.map(([name, value, why]) =>
        h("li", {}, h("b", {}, value), h("span", {}, name), h("small", { class: "quiet" }, why)),
      ),
    ),
  );
}
