// The pane of pinned nodes, and what can be done in it: select, group, open, unpin.

import { byId, h } from "./dom.js";
import { drawSubgraph, flowsBetween, itemsOf, placeItems } from "./subgraph_picture.js";

export class Subgraph {
  constructor(app, buttons) {
    this.app = app;
    this.pane = byId("subgraph");
    this.buttons = buttons;
  }

  colours() {
    const style = getComputedStyle(document.documentElement);
    const names = ["paper", "ink", "quiet", "band", "positive", "negative", "attention", "token", "faint"];
    return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  }

  /** The picture as it is now, at a width. */
  picture(width) {
    const { model, state } = this.app;
    const items = itemsOf(model, state);
    const size = placeItems(items, width, model.graph.tokens.length);
    for (const item of items) item.selected = item.ids.every((id) => state.selected.includes(id));
    const font = getComputedStyle(document.body).fontFamily.replaceAll('"', "'");
    return { svg: drawSubgraph(model, items, flowsBetween(model, items), size, this.colours(), font), size };
  }

  draw() {
    const { state } = this.app;
    const empty = !state.pinned.length;
    this.pane.classList.toggle("empty", empty);
    const focused = document.activeElement?.dataset?.item;
    if (empty) {
      const hint =
        "Pin nodes (shift-click, or P on the keyboard) to gather them here, then group them into named supernodes.";
      this.pane.replaceChildren(
        this.heading(),
        h("p", { class: "quiet" }, hint),
        h("span", { class: "spring" }),
        ...this.buttons.load(),
      );
      return;
    }
    const { svg } = this.picture(Math.max(260, this.pane.clientWidth - 24));
    svg.addEventListener("click", (event) => this.clicked(event));
    svg.addEventListener("keydown", (event) => this.pressed(event));
    svg.addEventListener("pointerover", (event) => {
      const item = event.target.closest(".card")?.item;
      if (item && !item.group) this.app.viewport.pretendHover(item.nodes[0].index);
    });
    svg.addEventListener("pointerleave", () => this.app.viewport.leave());
    this.pane.replaceChildren(this.heading(), this.actions(), h("div", { class: "cards" }, svg));
    if (focused) [...svg.querySelectorAll(".card")].find((card) => card.dataset.item === focused)?.focus();
  }

  heading() {
    const { pinned } = this.app.state;
    return h("h2", {}, "Subgraph", h("small", {}, pinned.length ? `${pinned.length} pinned` : "nothing pinned"));
  }

  actions() {
    const { state } = this.app;
    const count = state.selected.length;
    const form = h("form", {
      class: "group-form",
      on: {
        submit: (event) => {
          event.preventDefault();
          state.group(input.value.trim() || "supernode", [...state.selected]);
          this.app.say(`Grouped ${count} nodes`);
        },
      },
    });
    const input = h("input", {
      type: "text",
      placeholder: "Name of the supernode",
      "aria-label": "Name of the supernode",
    });
    form.append(input, h("button", { type: "submit" }, `Group ${count}`));
    const hint = h("span", { class: "quiet" }, "Shift-click cards (or Space) to select them for a group.");
    const unpin = h(
      "button",
      { type: "button", on: { click: () => state.set({ pinned: [], groups: [], selected: [] }) } },
      "Unpin all",
    );
    return h(
      "div",
      { class: "actions" },
      count ? form : hint,
      h("span", { class: "spring" }),
      unpin,
      this.buttons.save(),
      this.buttons.load(),
    );
  }

  toggle(item) {
    const { state } = this.app;
    const inside = item.ids.every((id) => state.selected.includes(id));
    const others = state.selected.filter((id) => !item.ids.includes(id));
    state.set({ selected: inside ? others : [...others, ...item.ids] });
  }

  clicked(event) {
    const flow = event.target.closest(".flow");
    if (flow) {
      const { model } = this.app;
      this.app.openEdge([...flow.edges].sort((a, b) => model.share[b] - model.share[a])[0]);
      return;
    }
    const item = event.target.closest(".card")?.item;
    if (!item) return;
    if (event.shiftKey || event.target.closest(".handle")) this.toggle(item);
    else this.open(item);
  }

  pressed(event) {
    const item = event.target.closest(".card")?.item;
    if (!item || !["Enter", " ", "p"].includes(event.key)) return;
    event.preventDefault();
    if (event.key === " ") this.toggle(item);
    else if (event.key === "Enter") this.open(item);
    else if (!item.group) this.app.state.pin(item.id);
  }

  open(item) {
    if (item.group) this.app.openGroup(item.group);
    else this.app.open(item.id);
  }
}
