// The dictionaries that have feature pages, and a way to one of them.

import { data, path, show } from "./api.js";
import { h, visible } from "./dom.js";

function row({ name, kind, features }) {
  const input = h("input", { type: "number", min: 0, max: features - 1, step: 1, required: true, "aria-label": `Feature of ${visible(name)}` });
  const go = (event) => {
    event.preventDefault();
    location.assign(path("features", name, Number(input.value)));
  };
  return h(
    "li",
    {},
    h("b", {}, visible(name)),
    h("span", { class: "quiet" }, `${visible(kind)}, ${features.toLocaleString("en")} features`),
    h("form", { class: "rename", on: { submit: go } }, input, h("button", { type: "submit" }, "Open")),
  );
}

const { dictionaries } = data;
show(
  h(
    "section",
    { class: "panel" },
    h("h1", {}, "Feature pages"),
    dictionaries.length
      ? h("ul", { class: "dictionaries" }, dictionaries.map(row))
      : h("p", { class: "quiet" }, "There are none for this model. `circuits features build` makes them from text."),
  ),
);
