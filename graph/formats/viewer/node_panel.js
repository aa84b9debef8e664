// A node: what it is, its numbers, what it reads and what reads it.

import { h, short, signed } from "./dom.js";
import { block, edgeRows, figures } from "./parts.js";
import { mtcPanel } from "./mtc_panel.js";
import { pagePanel } from "./page_panel.js";

export function nodePanel(app, node) {
  const { model, state } = app;
  const { graph } = model;
  const label = model.label(node);
  const [inputs, outputs] = [model.inputs[node.index], model.outputs[node.index]];
  const pinned = state.isPinned(node.id);
  const page = graph.page(node);
  return [
    h(
      "p",
      { class: "eyebrow" },
      h("span", { class: `chip ${node.kind}`, "aria-hidden": "true" }),
      label ? graph.name(node) : "",
      label ? " · " : "",
      `at ${graph.place(node.position)}`,
    ),
    h("h2", {}, label || graph.name(node)),
    h(
      "div",
      { class: "actions" },
      h(
        "button",
        { type: "button", "aria-pressed": String(pinned), on: { click: () => state.pin(node.id) } },
        pinned ? "Unpin" : "Pin",
      ),
      node.isFeature
        ? h("button", { type: "button", on: { click: (event) => renameBox(app, node, event.target) } }, "Rename")
        : null,
      h("code", { title: "Id of the node" }, node.id),
    ),
    model.hasNode[node.index] ? null : h("p", { class: "quiet" }, "Left out at the current thresholds."),
    figures([
      ["probability", short(node.probability)],
      ["activation", short(node.activation)],
      ["pre-activation", short(node.preActivation)],
      ["bias", short(node.bias)],
      ["influence", short(node.influence)],
      ["predicted change", changed(node.predicted)],
      ["measured change", changed(node.measured)],
      ["dictionary", node.dictionary],
    ]),
    ...(node.kind.startsWith("mtc_") ? mtcPanel(app, node) : []),
    inputs.length ? block(`Inputs, ${inputs.length}`, edgeRows(app, inputs, "source")) : null,
    outputs.length ? block(`Outputs, ${outputs.length}`, edgeRows(app, outputs, "target")) : null,
    page ? pagePanel(app, page) : null,
  ].filter(Boolean);
}

const changed = (value) => (Number.isNaN(value) ? "–" : signed(value));

/** A line to write a name into; an empty one gives the old label back. */
function renameBox(app, node, button) {
  const input = h("input", {
    type: "text",
    "aria-label": "Name of the node",
    value: app.state.names.get(node.id) ?? "",
    placeholder: app.model.label(node),
  });
  const form = h(
    "form",
    {
      class: "rename",
      on: {
        submit: (event) => {
          event.preventDefault();
          app.state.rename(node.id, input.value.trim());
        },
      },
    },
    input,
    h("button", { type: "submit" }, "Save"),
  );
  button.replaceWith(form);
  input.focus();
}
