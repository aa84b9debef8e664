// Thresholds, what is lit, picture or table, and light or dark.

import { byId, h, nextFrame } from "./dom.js";

function slider(app, { id, name, field, most, title }) {
  const shown = h("output", { for: id });
  const input = h("input", {
    type: "range",
    id,
    min: 0,
    max: most,
    step: 0.01,
    title,
    "aria-label": `${name}: ${title.toLowerCase()}`,
    "aria-describedby": "counts",
  });
  const show = () => {
    input.value = String(app.state[field]);
    shown.textContent = app.state[field].toFixed(2);
  };
  const apply = nextFrame(() => {
    const value = Number(input.value);
    app.state.set({ [field]: value >= most ? most : value });
  });
  input.addEventListener("input", apply);
  return { element: h("label", { class: "slider", for: id, title }, h("span", {}, name), input, shown), show };
}

export class Toolbar {
  constructor(app, search) {
    this.app = app;
    const { state, model } = app;
    this.sliders = [
      slider(app, {
        id: "node-threshold",
        name: "Nodes",
        field: "nodeThreshold",
        most: state.most.node,
        title: "Share of the influence that the kept nodes hold",
      }),
      slider(app, {
        id: "edge-threshold",
        name: "Edges",
        field: "edgeThreshold",
        most: state.most.edge,
        title: "Share of the edge scores that the kept edges hold",
      }),
    ];
    const densities = [...model.graph.pages.values()].some((page) => page.density !== undefined);
    if (densities)
      this.sliders.push(
        slider(app, {
          id: "density",
          name: "Density",
          field: "density",
          most: 1,
          title: "Leave out features that are active on more than this share of all tokens",
        }),
      );
    this.counts = h("span", { id: "counts", class: "quiet" });
    this.links = h(
      "select",
      {
        id: "links",
        "aria-label": "What is lit around a node",
        on: { change: () => state.set({ linkType: this.links.value }) },
      },
      [
        ["both", "up- and downstream"],
        ["input", "upstream"],
        ["output", "downstream"],
      ].map(([value, text]) => h("option", { value }, text)),
    );
    const view = (name, text) =>
      h("button", { type: "button", "aria-pressed": "false", on: { click: () => this.show(name) } }, text);
    this.views = { picture: view("picture", "Picture"), table: view("table", "Table") };
    const theme = h(
      "button",
      {
        type: "button",
        id: "theme",
        "aria-label": "Light or dark",
        title: "Light or dark",
        on: { click: () => this.turn() },
      },
      "◐",
    );
    byId("tools").append(
      search.element,
      h("span", { class: "tabs", role: "group", "aria-label": "View" }, ...Object.values(this.views)),
      theme,
    );
    byId("controls").append(
      ...this.sliders.map((one) => one.element),
      this.counts,
      h("span", { class: "spring" }),
      this.links,
    );
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => app.recolour());
    this.show("picture");
    this.draw();
  }

  draw() {
    const { model, state } = this.app;
    for (const one of this.sliders) one.show();
    this.links.value = state.linkType;
    const { nodes, weight } = model.graph;
    this.counts.textContent = `${model.nodes.length} of ${nodes.length} nodes, ${model.edges.length} of ${weight.length} edges`;
  }

  show(name) {
    for (const [other, button] of Object.entries(this.views)) {
      button.setAttribute("aria-pressed", String(other === name));
      byId(other).hidden = other !== name;
    }
    this.app.table.draw();
  }

  turn() {
    const root = document.documentElement;
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    this.app.recolour();
  }
}
