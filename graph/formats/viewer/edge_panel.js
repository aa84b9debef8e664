// An edge: what it carries, through which heads, where these looked, and why.

import { h, percent, short, signed } from "./dom.js";
import { headName, STAYS } from "./graph_data.js";
import { heatMap, tokenLine } from "./heat_map.js";
import { headSums } from "./model.js";
import { barRows, block, figures, long, nodeButton } from "./parts.js";
import { qkPanel } from "./qk_panel.js";

const FIRST = 8; // heads that are listed at first

export function edgePanel(app, edge) {
  const { model } = app;
  const { graph } = model;
  const [source, target] = [graph.nodes[graph.source[edge]], graph.nodes[graph.target[edge]]];
  const weight = graph.weight[edge];
  const gone = model.hasEdge[edge] ? null : h("p", { class: "quiet" }, "Left out at the current thresholds.");
  return [
    h("p", { class: "eyebrow" }, graph.mediated(edge) ? "Step through attention" : "Edge"),
    h(
      "h2",
      { class: "ends" },
      h("span", {}, nodeButton(app, source), h("small", {}, `at ${graph.place(source.position)}`)),
      h("span", { class: "arrow", "aria-label": "to" }, "↓"),
      h("span", {}, nodeButton(app, target), h("small", {}, `at ${graph.place(target.position)}`)),
    ),
    gone,
    figures([
      ["weight", signed(weight, 4)],
      ["of the target’s input", percent(model.share[edge])],
      ["target’s pre-activation", short(target.preActivation)],
    ]),
    ...splits(app, edge, target),
  ];
}

function splits(app, edge, target) {
  const { graph } = app.model;
  const own = graph.heads[edge];
  const [first, last] = [graph.firstHops[edge], graph.lastHops[edge]];
  if (own.length) return [headChoice(app, own, target, "Head loadings", "They add up to the edge.")];
  if (!first.length) return [h("p", { class: "quiet" }, "It stays at its position: no head carries it.")];
  return [
    headChoice(
      app,
      first,
      target,
      "First hop",
      "Which head takes it away from the source’s position; adds up to the edge.",
    ),
    headChoice(app, last, target, "Last hop", "Which head brings it to the target’s position; adds up to the edge."),
  ];
}

/** Bars of heads; one is chosen, and its pattern and its scores are shown below. */
function headChoice(app, rows, target, title, why) {
  const sums = headSums(rows);
  const below = h("div", {});
  const list = h("div", {});
  const choose = (chosen) => {
    const most = Math.abs(sums[0].weight);
    const shown = sums.indexOf(chosen) < FIRST ? FIRST : sums.length;
    list.replaceChildren(
      long(sums, shown, (some) =>
        barRows(
          some.map((sum) => ({
            name: headName(sum.layer, sum.head),
            weight: sum.weight,
            note: stepsOf(app, sum),
            pressed: sum === chosen,
            act: sum.head > STAYS ? () => choose(sum) : undefined,
          })),
          { label: title, most },
        ),
      ),
    );
    below.replaceChildren(...(chosen ? shownHead(app, chosen, target) : []));
  };
  choose(sums.find((sum) => sum.head > STAYS && sum.head !== -1) ?? sums.find((sum) => sum.head > STAYS));
  return block(title, h("p", { class: "quiet" }, why), list, below);
}

function stepsOf(app, sum) {
  if (sum.head <= STAYS) return sum.head === STAYS ? "never leaves its position" : "all that is too small to be listed";
  const [strongest] = [...sum.rows].sort((a, b) => Math.abs(b[4]) - Math.abs(a[4]));
  const { graph } = app.model;
  const step = `${graph.tokenText(strongest[2])} ${strongest[2]} → ${graph.tokenText(strongest[3])} ${strongest[3]}`;
  return sum.rows.length > 1 ? `${step} and ${sum.rows.length - 1} more` : step;
}

function shownHead(app, sum, target) {
  const { graph } = app.model;
  const name = headName(sum.layer, sum.head);
  const steps = [...sum.rows].sort((a, b) => Math.abs(b[4]) - Math.abs(a[4])).slice(0, 4);
  const marks = steps.map((row) => [row[2], row[3]]);
  const [key, query] = marks[0];
  const rows = graph.patterns.get(`${sum.layer}.${sum.head}`);
  const parts = [];
  if (rows) {
    const line = tokenLine(graph.tokens.slice(0, query + 1), rows[query], new Set([key]), 1);
    parts.push(
      h("h4", {}, `Where ${name} looks from ${graph.place(query)}`),
      line,
      heatMap(graph, rows, marks, `Attention pattern of ${name}`, 1),
    );
  } else if (sum.head === -1) {
    parts.push(h("p", { class: "quiet" }, "The identity moves nothing: it writes where the feature reads."));
  } else parts.push(h("p", { class: "quiet" }, `The pattern of ${name} is not kept in the file.`));
  parts.push(qkPanel(app, sum.layer, sum.head, query, key, target.id));
  return parts.filter(Boolean);
}
