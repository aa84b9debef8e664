// One feature: its label, which can be written, and its page as the viewer shows it.

import { data, path, post, say, show } from "./api.js";
import { h, visible } from "./dom.js";
import { pagePanel } from "./page_panel.js";

let { page } = data;
const nothing = { model: { nodes: [] } }; // no graph is open beside it

function labelForm() {
  const byPerson = page.label_by === "person";
  const input = h("input", { type: "text", value: byPerson ? page.label : "", placeholder: visible(page.label ?? "") || "no label yet", maxlength: 500, "aria-label": "Label of the feature" });
  const error = h("span", { class: "error", role: "alert" });
  const send = async (event) => {
    event.preventDefault();
    try {
      page = await post(path("api", "features", page.dictionary, page.feature, "label"), { label: input.value });
      draw();
      say(page.label_by === "person" ? "Label saved" : "Label taken back");
    } catch (problem) {
      error.textContent = problem.message;
    }
  };
  return h(
    "form",
    { class: "label-form", on: { submit: send } },
    input,
    h("button", { type: "submit", class: "main" }, "Save label"),
    byPerson ? h("button", { type: "submit", on: { click: () => (input.value = "") } }, "Take it back") : null,
    error,
  );
}

function draw() {
  const { dictionary, feature } = page;
  const step = (by, words) =>
    feature + by >= 0 ? h("a", { class: "button", href: path("features", dictionary, feature + by) }, words) : null;
  show(
    h(
      "section",
      { class: "panel", id: "inspector" },
      h("p", { class: "quiet" }, `${visible(dictionary)} #${feature} · ${visible(page.kind ?? "")}`),
      h("h1", {}, visible(page.label ?? "") || "No label"),
      labelForm(),
      h("div", { class: "line" }, step(-1, "← previous"), step(1, "next →")),
      pagePanel(nothing, page),
    ),
  );
}

draw();
