// Why a head looked there: the pairs of an explained score, in full and over the other keys.

import { h, short, signed } from "./dom.js";
import { headName } from "./graph_data.js";
import { barRows, long } from "./parts.js";

const FORMS = [
  [
    "lead",
    "Over the other keys",
    "What makes this key’s score larger than the others’, weighted with their attention.",
  ],
  ["score", "In full", "What the score itself is the sum of."],
  ["sides", "By side", "Each side’s sum over all that it meets."],
  ["features", "QK features", "Parts of trained QK features."],
];

/** The explanation of one score, with a choice of its forms; nothing where there is none. */
export function qkPanel(app, layer, head, query, key, owner) {
  const { graph } = app.model;
  const score = graph.score(layer, head, query, key, owner);
  if (!score) return null;
  const place = (position) => graph.place(position);
  const body = h("div", {});
  const forms = FORMS.filter(([form]) => form !== "features" || score.qk_features?.length);
  const tabs = forms.map(([form, name, why]) => {
    const tab = h("button", { type: "button", "aria-pressed": "false" }, name);
    tab.addEventListener("click", () => {
      tabs.forEach((other) => other.setAttribute("aria-pressed", String(other === tab)));
      app.qkForm = form;
      body.replaceChildren(h("p", { class: "quiet" }, why), rowsOf(app, score, form));
    });
    return tab;
  });
  tabs[
    Math.max(
      0,
      forms.findIndex(([form]) => form === app.qkForm),
    )
  ].click();
  const told =
    `${headName(layer, head)} looks from ${place(query)} at ${place(key)} with attention ${short(score.attention)}; ` +
    `its score ${short(score.score)} is ${signed(score.lead)} against the other keys’.`;
  return h(
    "section",
    { class: "block qk" },
    h("h3", {}, "Why it looked there"),
    h("p", {}, told),
    h("div", { class: "tabs", role: "group", "aria-label": "Form of the score" }, tabs),
    body,
  );
}

function rowsOf(app, score, form) {
  if (form === "lead") return pairRows(app, score, score.lead_pairs);
  if (form === "score")
    return pairRows(
      app,
      score,
      score.pairs.map(([query, key, weight]) => [query, key, score.key, weight]),
    );
  if (form === "features") {
    return barRows(
      score.qk_features.map(([name, weight]) => ({ name, weight })),
      { label: "QK features" },
    );
  }
  const side = (rows, position) =>
    barRows(
      rows.map(([id, weight]) => ({
        name: app.nameOfId(id),
        weight,
        note: away(app, id, position),
        act: app.opener(id),
      })),
    );
  return h(
    "div",
    {},
    h("h4", {}, `Query side, ${app.model.graph.place(score.query)}`),
    side(score.query_side, score.query),
    h("h4", {}, `Key side, ${app.model.graph.place(score.key)}`),
    side(score.key_side, score.key),
  );
}

/** Where a node of a pair stands, if not at the position of its side. */
function away(app, id, position) {
  const at = app.model.graph.positionOfId(id);
  return Number.isNaN(at) || at === position ? "" : `at ${app.model.graph.place(at)}`;
}

function pairRows(app, score, pairs) {
  const { graph } = app.model;
  const most = Math.max(1e-12, ...pairs.map((pair) => Math.abs(pair[3])));
  return long(pairs, 10, (some) =>
    h(
      "ul",
      { class: "pairs" },
      some.map(([query, key, at, weight]) => {
        const end = (id) => {
          const open = app.opener(id);
          const name = app.nameOfId(id);
          return open ? h("button", { type: "button", class: "link", on: { click: open } }, name) : h("span", {}, name);
        };
        const part = Math.abs(weight) / most;
        return h(
          "li",
          {},
          h(
            "div",
            { class: "pair" },
            h("span", { class: "side" }, end(query)),
            h("span", { class: "times", "aria-label": "meets" }, "×"),
            h("span", { class: "side" }, end(key), at === score.key ? null : h("em", {}, ` at key ${graph.place(at)}`)),
            h("span", { class: "value" }, signed(weight)),
          ),
          h(
            "span",
            { class: "under", "aria-hidden": "true" },
            h("i", { class: weight < 0 ? "below" : "above", css: { width: `${(100 * part).toFixed(1)}%` } }),
          ),
        );
      }),
    ),
  );
}
