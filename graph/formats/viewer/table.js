// The same graph as a table: another way to read it, and the one for a screen reader.

import { byId, h, percent, short } from "./dom.js";
import { KIND_NAMES } from "./graph_data.js";

const COLUMNS = [
  ["node", (app, node) => app.model.fullName(node)],
  ["kind", (app, node) => KIND_NAMES[node.kind]],
  ["layer", (app, node) => node.layer],
  ["position", (app, node) => node.position],
  ["activation", (app, node) => node.activation],
  ["influence", (app, node) => node.influence + node.targetWeight],
  ["strongest input", (app, node) => strongest(app, node, "inputs", "source")],
];
const NUMBERS = new Set(["layer", "position", "activation", "influence"]);

function strongest(app, node, list, side) {
  const { model } = app;
  const [edge] = model[list][node.index];
  if (edge === undefined) return "";
  const end = model.graph.nodes[model.graph[side][edge]];
  const head = model.strongestHead(edge);
  return `${model.fullName(end)} at ${end.position}, ${percent(model.share[edge])}${head ? ` through ${head}` : ""}`;
}

export class Table {
  constructor(app) {
    this.app = app;
    this.pane = byId("table");
    this.by = "influence";
    this.down = true;
  }

  draw() {
    if (this.pane.hidden) return;
    const { app } = this;
    const value = COLUMNS.find(([name]) => name === this.by)[1];
    const missing = (x) => x === "" || Number.isNaN(x);
    const rows = app.model.nodes.map((node) => ({ node, key: value(app, node) }));
    rows.sort((a, b) => {
      if (missing(a.key) !== missing(b.key)) return missing(a.key) ? 1 : -1;
      const order = typeof a.key === "number" ? a.key - b.key : String(a.key).localeCompare(String(b.key));
      return (this.down ? -order : order) || a.node.index - b.node.index;
    });
    const head = COLUMNS.map(([name]) =>
      h(
        "th",
        {
          scope: "col",
          class: NUMBERS.has(name) ? "number" : null,
          "aria-sort": name === this.by ? (this.down ? "descending" : "ascending") : "none",
        },
        h(
          "button",
          { type: "button", on: { click: () => this.sort(name) } },
          name,
          name === this.by ? (this.down ? " ↓" : " ↑") : "",
        ),
      ),
    );
    const count = `${app.model.nodes.length} nodes and ${app.model.edges.length} edges at the current thresholds`;
    this.pane.replaceChildren(
      h(
        "div",
        { class: "table-scroll", tabindex: 0, role: "region", "aria-label": "Nodes" },
        h(
          "table",
          {},
          h("caption", {}, count),
          h("thead", {}, h("tr", {}, head)),
          h(
            "tbody",
            {},
            rows.map(({ node }) => this.row(node)),
          ),
        ),
      ),
    );
  }

  row(node) {
    const { app } = this;
    return h(
      "tr",
      { class: app.state.clicked === node.id ? "current" : null },
      COLUMNS.map(([name, value]) => {
        if (name === "node") {
          return h(
            "th",
            { scope: "row" },
            h("span", { class: `chip ${node.kind}`, "aria-hidden": "true" }),
            h("button", { type: "button", class: "link", on: { click: () => app.open(node.id) } }, value(app, node)),
          );
        }
        if (name === "position") return h("td", { class: "number" }, app.model.graph.place(node.position));
        if (name === "layer") return h("td", { class: "number" }, node.layer < 0 ? "" : node.layer);
        const shown = value(app, node);
        return h(
          "td",
          { class: NUMBERS.has(name) ? "number" : null },
          typeof shown === "number" ? short(shown) : shown,
        );
      }),
    );
  }

  sort(name) {
    this.down = name === this.by ? !this.down : NUMBERS.has(name) && name !== "layer" && name !== "position";
    this.by = name;
    this.draw();
    [...this.pane.querySelectorAll("thead button")].find((button) => button.textContent.startsWith(name))?.focus();
  }
}
