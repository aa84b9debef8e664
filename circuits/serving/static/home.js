// The first page: a prompt with its options, and the graphs that were saved.

import { ago, data, path, post, Progress, say, show } from "./api.js";
import { h, visible } from "./dom.js";
import { changeWords } from "./words.js";

const progress = new Progress();

function number(name, label, value, { min = 0, max = 1, step = 0.01 } = {}) {
  const input = h("input", { type: "number", id: name, min, max, step, value });
  return [h("label", { for: name }, label), input];
}

function field(id, label, placeholder) {
  return [h("label", { for: id }, label), h("input", { type: "text", id, placeholder, autocomplete: "off", maxlength: 400 })];
}

function form() {
  const prompt = h("textarea", { id: "prompt-text", rows: 3, required: true, spellcheck: "false", autofocus: true });
  const button = h("button", { type: "submit", class: "main" }, "Trace");
  const explain = h("input", { type: "checkbox", id: "explain" });
  const options = h(
    "details",
    { class: "options" },
    h("summary", {}, "Options"),
    h(
      "div",
      { class: "fields" },
      field("targets", "Targets", "the top tokens"),
      field("minus", "Minus", "no difference"),
      number("node-threshold", "Node threshold", 0.8),
      number("edge-threshold", "Edge threshold", 0.98),
      h("label", { for: "max-features" }, "At most features"),
      h("input", { type: "number", id: "max-features", min: 1, step: 1, placeholder: "no limit" }),
    ),
    h("p", { class: "quiet" }, "Targets are tokens, separated by commas, or node ids. With one target, Minus makes it a difference of two logits."),
    h("label", { class: "check" }, explain, "Explain why the heads looked where they did"),
  );
  const value = (id) => document.getElementById(id).value.trim();
  const send = async (event) => {
    event.preventDefault();
    button.disabled = true;
    const result = await progress.run("/api/traces", {
      prompt: prompt.value,
      targets: value("targets").split(",").map((target) => target.trim()).filter(Boolean),
      minus: value("minus") || null,
      node_threshold: Number(value("node-threshold")),
      edge_threshold: Number(value("edge-threshold")),
      max_feature_nodes: value("max-features") ? Number(value("max-features")) : null,
      explain: explain.checked,
    });
    button.disabled = false;
    if (result) location.assign(path("graphs", result.graph));
  };
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) button.form.requestSubmit();
  });
  return h(
    "form",
    { class: "panel", on: { submit: send } },
    h("h1", {}, "Why did the model say that?"),
    h("label", { for: "prompt-text", class: "unseen" }, "Prompt"),
    prompt,
    options,
    h(
      "div",
      { class: "line" },
      button,
      h("span", { class: "quiet" }, `${visible(data.model)}, ${data.replacements.map(visible).join(" and ") || "no replacement"}; up to ${data.max_tokens} tokens`),
    ),
    ...progress.parts,
  );
}

function list(graphs) {
  const box = h("section", { class: "panel", "aria-label": "Saved graphs" }, h("h2", {}, "Saved graphs"));
  if (!graphs.length) box.append(h("p", { class: "quiet" }, "None yet. Every graph that is traced here is saved."));
  else box.append(h("ul", { class: "graphs" }, graphs.map((graph) => item(graph, box))));
  return box;
}

function item(graph, box) {
  const row = h("li", {});
  const rename = h("button", { type: "button", on: { click: () => renameBox(graph, row) } }, "Rename");
  const remove = h("button", { type: "button", on: { click: () => deleteBox(graph, row, box) } }, "Delete");
  const changes = graph.changes.length ? h("p", { class: "changed" }, changeWords(graph.changes)) : null;
  row.append(
    h("a", { href: path("graphs", graph.name) }, visible(graph.prompt) || graph.name),
    ...(changes ? [changes] : []),
    h(
      "p",
      { class: "quiet" },
      graph.target ? h("span", {}, "→ ", h("b", {}, `“${visible(graph.target)}”`), " · ") : null,
      `${graph.nodes} nodes · ${graph.edges} edges · ${ago(graph.saved)} · `,
      h("code", {}, graph.name),
    ),
    h("div", { class: "actions" }, rename, remove),
  );
  return row;
}

function renameBox(graph, row) {
  const input = h("input", { type: "text", value: graph.name, maxlength: 64, "aria-label": "New name of the graph" });
  const error = h("span", { class: "error", role: "alert" });
  const send = async (event) => {
    event.preventDefault();
    try {
      const { graph: name } = await post(path("api", "graphs", graph.name, "rename"), { name: input.value });
      say(`Renamed to ${name}`);
      row.replaceWith(item({ ...graph, name }, row.closest("section")));
    } catch (problem) {
      error.textContent = problem.message;
    }
  };
  row.querySelector(".actions").replaceChildren(
    h("form", { class: "rename", on: { submit: send } }, input, h("button", { type: "submit" }, "Save"), error),
  );
  input.select();
}

function deleteBox(graph, row, box) {
  const error = h("span", { class: "error", role: "alert" });
  const send = async () => {
    try {
      await post(path("api", "graphs", graph.name, "delete"));
      say(`Deleted ${graph.name}`);
      row.remove();
      if (!box.querySelector("li")) box.replaceWith(list([]));
    } catch (problem) {
      error.textContent = problem.message;
    }
  };
  const yes = h("button", { type: "button", class: "danger", on: { click: send } }, "Delete for good");
  const no = h("button", { type: "button", on: { click: () => row.replaceWith(item(graph, box)) } }, "Keep");
  row.querySelector(".actions").replaceChildren(yes, no, error);
  no.focus();
}

show(form(), list(data.graphs));
