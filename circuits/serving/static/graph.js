// A graph's page: the viewer, what to change in the model, and, after a change, before and after beside each other.
// Changes are always of the graph before any: a changed model is changed further by all changes at once.

import { data, path, post, Progress, say, show } from "./api.js";
import { clipped, h, signed, visible } from "./dom.js";
import { changeWords } from "./words.js";

const { graph, before, intervention } = data;
const progress = new Progress();

/** The viewer of a graph in a frame; what is clicked and grouped in it comes as messages. */
function frame(entry, title, told) {
  const box = h("iframe", {
    src: path("view", entry.name),
    title,
    sandbox: "allow-scripts allow-downloads",
  });
  addEventListener("message", (event) => {
    const { source, data: message } = event;
    if (source !== box.contentWindow || typeof message !== "object" || message?.circuits !== "state") return;
    told?.(message);
  });
  return box;
}

// --- what to change ---------------------------------------------------------------------------------------------------

class Bench {
  constructor() {
    this.chosen = null; // what would be changed: {name, nodes}
    this.changes = (intervention?.asked ?? []).map(({ nodes, how, value }) => ({ name: nodes.join(", "), nodes, how, value }));
    this.groups = [];
    this.target = h("span", { class: "target" });
    this.select = h("select", { "aria-label": "Supernode", on: { change: () => this.pickGroup() } });
    this.factor = h("input", { type: "number", value: 2, step: 0.1, min: -1000, max: 1000, "aria-label": "Factor" });
    this.ablate = h("button", { type: "button", on: { click: () => this.add("ablate") } }, "Ablate");
    this.scale = h("button", { type: "button", on: { click: () => this.add("scale") } }, "Scale ×");
    this.page = h("a", { class: "button", target: "_blank", rel: "noopener" }, "Feature page");
    this.list = h("ul", { class: "chips", "aria-label": "Changes" });
    this.run = h("button", { type: "button", class: "main", on: { click: () => this.send() } }, "Run changed");
    this.box = h(
      "section",
      { class: "bench", "aria-label": "Intervene" },
      h("div", { class: "line" }, this.target, this.select, this.ablate, this.scale, this.factor, this.page),
      (this.line = h("div", { class: "line" }, this.list, this.run)),
      ...progress.parts,
    );
    this.draw();
  }

  /** What the viewer says: the node that is open, and the supernodes. */
  hear({ node, group, groups }) {
    this.groups = Array.isArray(groups) ? groups : [];
    const wanted = node ? "" : group || (this.chosen?.group ? this.chosen.name : "");
    const found = this.groups.find(({ name }) => name === wanted);
    if (node) this.chosen = { name: node.name, nodes: [node.id], node };
    else this.chosen = found ? { name: found.name, nodes: found.ids, group: true } : null;
    this.draw();
  }

  pickGroup() {
    const group = this.groups[Number(this.select.value)];
    this.chosen = group ? { name: group.name, nodes: group.ids, group: true } : null;
    this.draw();
  }

  add(how) {
    const value = how === "ablate" ? 0 : Number(this.factor.value);
    if (!this.chosen || !Number.isFinite(value)) return;
    const { name, nodes } = this.chosen;
    const others = this.changes
      .map((change) => ({ ...change, nodes: change.nodes.filter((id) => !nodes.includes(id)) }))
      .filter((change) => change.nodes.length);
    this.changes = [...others, { name, nodes, how, value }];
    this.draw();
  }

  async send() {
    this.run.disabled = true;
    const changes = this.changes.map(({ nodes, how, value }) => ({ nodes, how, value }));
    const result = await progress.run(path("api", "graphs", (before ?? graph).name, "interventions"), { changes });
    this.run.disabled = false;
    if (result) location.assign(path("graphs", result.graph));
  }

  draw() {
    const { chosen } = this;
    const open = chosen?.node;
    const fixed = open?.kind === "logit";
    this.target.textContent = !chosen
      ? `Click a node${before ? " of the graph before" : ""} to change what it does.`
      : fixed
        ? "An output cannot be changed; click what feeds it."
        : chosen.group
          ? `Supernode “${visible(chosen.name)}” of ${chosen.nodes.length}`
          : clipped(visible(chosen.name), 90);
    this.target.classList.toggle("quiet", !chosen || fixed);
    this.select.hidden = !this.groups.length;
    const options = this.groups.map(({ name, ids }, index) =>
      h("option", { value: index, selected: chosen?.group && chosen.name === name }, `${clipped(visible(name), 40)} (${ids.length})`),
    );
    this.select.replaceChildren(h("option", { value: "" }, "Supernodes"), ...options);
    for (const part of [this.ablate, this.scale, this.factor]) part.hidden = !chosen || fixed;
    this.page.hidden = !open?.feature;
    if (open?.feature) this.page.href = path("features", open.dictionary, open.feature.number);
    this.list.replaceChildren(
      ...this.changes.map((change, index) => {
        const words = change.how === "ablate" ? "ablate" : `${change.value} ×`;
        const drop = () => {
          this.changes.splice(index, 1);
          this.draw();
        };
        const button = h("button", { type: "button", "aria-label": `Leave out: ${words} ${visible(change.name)}`, on: { click: drop } }, "×");
        return h("li", {}, h("b", {}, words), ` ${clipped(visible(change.name), 60)}`, button);
      }),
    );
    this.line.hidden = !this.changes.length;
  }
}

// --- what is kept -----------------------------------------------------------------------------------------------------

/** Saves pins, supernodes and names to the server's copy. */
class Keeper {
  constructor() {
    this.button = h("button", { type: "button", disabled: true, on: { click: () => this.save() } }, "Save annotations");
    this.note = h("span", { class: "quiet", role: "status" });
  }

  hear({ qParams }) {
    const now = JSON.stringify(qParams);
    if (this.saved === undefined) this.saved = now;
    this.params = qParams;
    this.button.disabled = now === this.saved;
    if (!this.button.disabled) this.note.textContent = "";
  }

  async save() {
    const now = JSON.stringify(this.params);
    try {
      await post(path("api", "graphs", graph.name, "annotations"), { qParams: this.params });
      this.saved = now;
      this.button.disabled = true;
      this.note.textContent = "saved";
    } catch (error) {
      this.note.textContent = error.message;
    }
  }
}

// --- before and after -------------------------------------------------------------------------------------------------

function logits() {
  const rows = intervention.tokens.map((row) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, `“${visible(row.text)}”`),
      [row.probability, row.new_probability].map((value) => h("td", {}, value.toFixed(3))),
      [row.logit, row.new_logit].map((value) => h("td", {}, value.toFixed(2))),
      h("td", { class: row.new_logit < row.logit ? "fell" : "rose" }, signed(row.new_logit - row.logit)),
    ),
  );
  const heads = ["token", "probability before", "after", "logit before", "after", "change"];
  return h(
    "section",
    { class: "panel logits", "aria-label": "Logits before and after" },
    h("h2", {}, `Next token after ${intervention.position} “${visible(data.tokens[intervention.position] ?? "")}”`),
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table of logits" },
      h("table", {}, h("thead", {}, h("tr", {}, heads.map((name) => h("th", { scope: "col" }, name)))), h("tbody", {}, rows))),
  );
}

function compared(after) {
  const gone = h("p", { class: "quiet" }, "The graph before has been deleted.");
  const pane = (title, link, inside, name) =>
    h("section", { class: `pane ${name}`, "aria-label": title }, h("h2", {}, link ? h("a", { href: link }, title) : title), inside);
  const both = h(
    "div",
    { class: "panes both" },
    pane("Before", before && path("graphs", before.name), before ? frame(before, "Graph before the change", (message) => bench.hear(message)) : gone, "before"),
    pane("After", null, after, "after"),
  );
  const views = [["both", "Side by side"], ["before", "Before"], ["after", "After"]];
  const tabs = h("div", { class: "tabs", role: "group", "aria-label": "Which graph" });
  const choose = (view) => {
    both.className = `panes ${view}`;
    tabs.replaceChildren(
      ...views.map(([name, title]) =>
        h("button", { type: "button", "aria-pressed": String(name === view), on: { click: () => choose(name) } }, title),
      ),
    );
    say(`Showing ${view === "both" ? "both graphs" : `the graph ${view}`}`);
  };
  choose("both");
  return { both, tabs };
}

const bench = new Bench();
const keeper = new Keeper();
const viewer = frame(graph, "Attribution graph", (message) => {
  if (!intervention) bench.hear(message);
  keeper.hear(message);
});
const { both, tabs } = intervention ? compared(viewer) : {};
const head = h(
  "header",
  { class: "graph-head" },
  h("h1", { class: "unseen" }, visible(graph.prompt)),
  h("p", {}, graph.name),
  graph.changes.length ? h("p", { class: "changed" }, changeWords(graph.changes)) : null,
  h("div", { class: "line" }, tabs ?? null, keeper.button, keeper.note, h("a", { class: "button", href: path("api", "graphs", graph.name), download: `${graph.name}.json` }, "graph.json")),
);
if (intervention) {
  const words =
    "The graph after is traced on the changed run itself: whatever the model recomputed is what is explained, and the changes are held.";
  const beside = h("div", {}, h("p", { class: "quiet note" }, words), before ? bench.box : null);
  show(head, h("div", { class: "result" }, logits(), beside), both);
} else show(head, bench.box, h("div", { class: "panes one" }, h("section", { class: "pane" }, viewer)));
