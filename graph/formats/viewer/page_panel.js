// A feature's page: on which texts it is active, how often, and what it does to the output.

import { h, percent, s, short, visible } from "./dom.js";
import { tokenLine } from "./heat_map.js";
import { barRows, block, figures } from "./parts.js";

const arrays = (value) => (Array.isArray(value) ? value : []);

export function pagePanel(app, page) {
  const parts = [
    figures([
      ["active on", page.density === undefined ? "" : percent(page.density)],
      ["largest", short(page.largest)],
      ["tokens seen", page.tokens_seen === undefined ? "" : page.tokens_seen.toLocaleString("en")],
      ["label by", visible(page.label_by ?? "")],
    ]),
    page.histogram ? histogram(page.histogram) : null,
    ...exampleBlocks(page),
    outputs(page),
    near(app, page),
  ];
  const own = arrays(page.head_loading);
  if (own.length) {
    const rows = own.map(([head, weight]) => ({ name: head === "id" ? "id" : `H${head}`, weight }));
    parts.splice(2, 0, block("Head loading of the feature", barRows(rows, { label: "Head loading of the feature" })));
  }
  return h(
    "section",
    { class: "page", "aria-label": "Feature page" },
    h("h2", {}, "Feature page"),
    parts.filter(Boolean),
  );
}

function histogram({ edges, counts }) {
  const [width, height] = [320, 54];
  const logs = counts.map((count) => Math.log10(1 + count));
  const most = Math.max(1e-9, ...logs);
  const step = width / counts.length;
  const bars = logs.map((value, index) => {
    const tall = (height * value) / most;
    return s(
      "rect",
      {
        x: (index * step).toFixed(1),
        y: (height - tall).toFixed(1),
        width: Math.max(1, step - 1).toFixed(1),
        height: tall.toFixed(1),
      },
      s("title", {}, `${short(edges[index])} to ${short(edges[index + 1])}: ${counts[index]} tokens`),
    );
  });
  const label = `Histogram of activations from ${short(edges[0])} to ${short(edges.at(-1))}, counts on a logarithmic scale`;
  return block(
    "Activations",
    s("svg", { class: "histogram", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, bars),
    h(
      "p",
      { class: "ends quiet" },
      h("span", {}, short(edges[0])),
      h("span", {}, "log count"),
      h("span", {}, short(edges.at(-1))),
    ),
  );
}

function exampleBlocks(page) {
  const groups = new Map();
  for (const example of arrays(page.examples)) {
    const name = visible(example.group ?? "examples");
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(example);
  }
  return [...groups].map(([name, examples], index) => {
    const shown = examples.map((example) => h("li", {}, exampleLines(example, page.largest)));
    const title = name === "top" ? "Top examples" : `${name[0].toUpperCase()}${name.slice(1)}`;
    return h("details", { class: "block examples", open: index === 0 }, h("summary", {}, title), h("ol", {}, shown));
  });
}

/** One example; a feature that moves has its key side and its query side, and its strongest moves. */
function exampleLines(example, largest) {
  const strongest = (values) => new Set([values.reduce((best, value, at) => (value > values[best] ? at : best), 0)]);
  const line = (values, scale) => tokenLine(example.tokens, values, strongest(values), scale);
  const place =
    example.document === undefined
      ? null
      : h("small", { class: "quiet" }, `document ${example.document}, from token ${example.start}`);
  if (!example.query_activations) return [line(example.activations, largest), place];
  const moves = arrays(example.moves)
    .slice(0, 3)
    .map(([key, query, weight]) =>
      h("li", {}, `${visible(example.tokens[key])} → ${visible(example.tokens[query])} ${short(weight)}`),
    );
  return [
    h("small", { class: "side-name" }, "key side"),
    line(example.activations, largest),
    h("small", { class: "side-name" }, "query side"),
    line(example.query_activations, 0),
    moves.length ? h("ul", { class: "moves" }, moves) : null,
    place,
  ];
}

function outputs(page) {
  const list = (rows) =>
    barRows(
      arrays(rows)
        .slice(0, 8)
        .map(([token, weight]) => ({ name: visible(token), weight })),
    );
  if (!arrays(page.top_outputs).length && !arrays(page.bottom_outputs).length) return null;
  return block(
    "Direct effect on the output",
    h(
      "div",
      { class: "two" },
      h("div", {}, h("h4", {}, "raises"), list(page.top_outputs)),
      h("div", {}, h("h4", {}, "lowers"), list(page.bottom_outputs)),
    ),
  );
}

function near(app, page) {
  const list = (rows) =>
    h(
      "ul",
      { class: "plain" },
      arrays(rows)
        .slice(0, 6)
        .map(([dictionary, feature, value]) => {
          const node = app.model.nodes.find((other) => other.dictionary === dictionary && other.feature === feature);
          const name = `${visible(dictionary)} #${feature}`;
          return h(
            "li",
            {},
            node
              ? h("button", { type: "button", class: "link", on: { click: () => app.open(node.id) } }, name)
              : h("span", {}, name),
            h("span", { class: "value" }, short(value)),
          );
        }),
    );
  const kinds = [
    ["by decoder", page.near_by_decoder],
    ["by co-activation", page.near_by_coactivation],
  ];
  const shown = kinds.filter(([, rows]) => arrays(rows).length);
  if (!shown.length) return null;
  return block(
    "Nearest features",
    h(
      "div",
      { class: "two" },
      shown.map(([name, rows]) => h("div", {}, h("h4", {}, name), list(rows))),
    ),
  );
}
