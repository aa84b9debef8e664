// Search over ids, names, labels, tokens and dictionaries; what is found is ringed in the picture.

import { h } from "./dom.js";

const MOST = 40;

export class Search {
  constructor(app) {
    this.app = app;
    this.input = h("input", {
      type: "search",
      id: "search",
      placeholder: "Search nodes  /",
      "aria-label": "Search nodes",
      autocomplete: "off",
      spellcheck: "false",
    });
    this.list = h("ul", { id: "found", hidden: true, "aria-label": "Found nodes" });
    this.element = h("div", { class: "search" }, this.input, this.list);
    this.input.addEventListener("input", () => this.run());
    this.input.addEventListener("focus", () => this.run());
    this.element.addEventListener("keydown", (event) => this.pressed(event));
    this.element.addEventListener("focusout", (event) => {
      if (!this.element.contains(event.relatedTarget)) this.list.hidden = true;
    });
  }

  focus() {
    this.input.focus();
    this.input.select();
  }

  run() {
    const words = this.input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const { model, viewport } = this.app;
    const found = words.length
      ? model.nodes.filter((node) => words.every((word) => this.textOf(node).includes(word)))
      : [];
    found.sort((a, b) => b.influence + b.targetWeight - a.influence - a.targetWeight);
    viewport.hits = new Set(found.map((node) => node.id));
    viewport.mark();
    this.list.hidden = !words.length;
    const rows = found
      .slice(0, MOST)
      .map((node) =>
        h(
          "li",
          {},
          h(
            "button",
            { type: "button", on: { click: () => this.choose(node.id) } },
            h("span", { class: `chip ${node.kind}`, "aria-hidden": "true" }),
            h("span", { class: "name" }, model.fullName(node)),
            h("span", { class: "note" }, `at ${model.graph.place(node.position)}`),
          ),
        ),
      );
    const count = found.length > MOST ? `${found.length} found, the first ${MOST} shown` : `${found.length} found`;
    this.list.replaceChildren(...rows, h("li", { class: "quiet count" }, count));
    if (words.length) this.app.say(count);
  }

  textOf(node) {
    const { model } = this.app;
    const words = [node.id, model.fullName(node), model.graph.tokens[node.position], node.label, node.dictionary];
    return words.join(" ").toLowerCase();
  }

  choose(id) {
    this.list.hidden = true;
    this.app.open(id);
    this.app.viewport.reveal(this.app.model.graph.byId.get(id).index);
    this.app.viewport.nodes.focus(id);
  }

  pressed(event) {
    const buttons = [...this.list.querySelectorAll("button")];
    const at = buttons.indexOf(document.activeElement);
    if (event.key === "Escape") {
      event.stopPropagation();
      this.input.value = "";
      this.run();
      this.input.focus();
    } else if (event.key === "Enter" && at < 0 && buttons.length) buttons[0].click();
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      const next = at + (event.key === "ArrowDown" ? 1 : -1);
      (next < 0 ? this.input : buttons[Math.min(next, buttons.length - 1)])?.focus();
    }
  }
}
