// A supernode: its members, its name, and how much of the graph's influence they hold.

import { h, percent, short } from "./dom.js";
import { block, nodeButton } from "./parts.js";

export function groupPanel(app, group) {
  const { model, state } = app;
  const members = group.ids.map((id) => model.graph.byId.get(id));
  const total = model.graph.nodes.reduce((sum, node) => sum + node.influence, 0);
  const held = members.reduce((sum, node) => sum + node.influence, 0);
  const input = h("input", { type: "text", value: group.name, "aria-label": "Name of the supernode" });
  const rename = (event) => {
    event.preventDefault();
    state.set({
      groups: state.groups.map((other) =>
        other === group ? { ...group, name: input.value.trim() || group.name } : other,
      ),
    });
  };
  return [
    h("p", { class: "eyebrow" }, `Supernode of ${members.length}`),
    h("h2", {}, group.name),
    h(
      "div",
      { class: "actions" },
      h("form", { class: "rename", on: { submit: rename } }, input, h("button", { type: "submit" }, "Rename")),
      h("button", { type: "button", on: { click: () => state.ungroup(group) } }, "Ungroup"),
    ),
    total > 0 ? h("p", { class: "quiet" }, `${percent(held / total)} of the influence in the file.`) : null,
    block(
      "Members",
      h(
        "ul",
        { class: "plain" },
        members.map((node) =>
          h(
            "li",
            {},
            h("span", {}, nodeButton(app, node), h("small", {}, `at ${model.graph.place(node.position)}`)),
            h("span", { class: "value" }, short(node.influence)),
          ),
        ),
      ),
    ),
  ].filter(Boolean);
}
