// Reads the data, builds the page, and redraws what a change of state touches.

import { byId, h, short, visible } from "./dom.js";
import { edgePanel } from "./edge_panel.js";
import { exportButtons, loadButton } from "./export.js";
import { GraphData } from "./graph_data.js";
import { groupPanel } from "./group_panel.js";
import { listenToKeys } from "./keyboard.js";
import { drawLegend } from "./legend.js";
import { Model } from "./model.js";
import { nodePanel } from "./node_panel.js";
import { tellOutside } from "./outside.js";
import { overviewPanel } from "./overview_panel.js";
import { Search } from "./search.js";
import { State } from "./state.js";
import { Subgraph } from "./subgraph.js";
import { Table } from "./table.js";
import { Toolbar } from "./toolbar.js";
import { Viewport } from "./viewport.js";

class App {
  constructor() {
    const read = (id) => JSON.parse(byId(id).textContent);
    const graph = new GraphData(read("graph-data"), read("page-data"));
    this.state = new State(graph);
    this.model = new Model(graph, this.state);
    this.group = null;
    this.qkForm = "lead";
    this.headline();
    this.viewport = new Viewport(this.model, this.state);
    this.subgraph = new Subgraph(this, { save: () => exportButtons(this), load: () => loadButton(this) });
    this.table = new Table(this);
    const search = new Search(this);
    this.toolbar = new Toolbar(this, search);
    drawLegend(graph);
    listenToKeys(this, search);
    this.state.on((changed) => this.changed(changed));
    addEventListener("hashchange", () => this.rehash());
    new ResizeObserver(() => this.subgraph.draw()).observe(byId("left"));
    this.subgraph.draw();
    this.inspect();
    tellOutside(this);
  }

  headline() {
    const { graph } = this.model;
    byId("prompt").textContent = visible(graph.prompt);
    const { scan, scores = {}, ledger = {} } = graph.metadata;
    const facts = [visible(scan ?? "")];
    for (const name of ["replacement", "completeness"]) {
      if (Number.isFinite(scores[name])) facts.push(`${name} ${scores[name].toFixed(3)}`);
    }
    if (Number.isFinite(ledger.max_relative_gap)) facts.push(`ledger gap ${short(ledger.max_relative_gap, 2)}`);
    byId("facts").textContent = facts.filter(Boolean).join(" · ");
  }

  changed(names) {
    const has = (...any) => any.some((name) => names.has(name));
    if (has("nodeThreshold", "edgeThreshold", "density")) {
      this.model.update();
      this.viewport.rebuild();
      this.table.draw();
    } else if (has("names", "pinned", "groups", "linkType", "clicked", "edge")) {
      if (has("names")) this.viewport.rebuild();
      this.viewport.mark();
    }
    if (has("names")) this.table.draw();
    if (has("clicked", "edge")) this.group = null;
    if (has("groups")) this.group = this.state.groups.find((group) => group.ids[0] === this.group?.ids[0]) ?? null;
    this.toolbar.draw();
    this.subgraph.draw();
    if (!(names.size === 1 && names.has("selected"))) this.inspect();
    this.writeHash();
    tellOutside(this);
  }

  writeHash() {
    clearTimeout(this.writing);
    this.writing = setTimeout(() => {
      const hash = this.state.hash();
      this.written = hash ? `#${hash}` : "";
      try {
        history.replaceState(null, "", this.written || location.pathname + location.search);
      } catch {
        // A page inside another (a notebook's) may have no address of its own; then nothing is kept there.
      }
    }, 120);
  }

  /** The reader changed the address by hand, or went back. */
  rehash() {
    if (location.hash === this.written) return;
    this.state.read(Object.fromEntries(new URLSearchParams(location.hash.slice(1))));
    this.state.set({
      pinned: this.state.pinned,
      groups: this.state.groups,
      names: this.state.names,
      nodeThreshold: this.state.nodeThreshold,
      clicked: this.state.clicked,
    });
  }

  /** Fill the panel at the side with what is open. */
  inspect() {
    const { state, model } = this;
    const edge = state.edge ? model.graph.edgeNames.get(state.edge) : -1;
    const node = model.graph.byId.get(state.clicked);
    const back = edge >= 0 || node || this.group;
    const parts =
      edge >= 0
        ? edgePanel(this, edge)
        : this.group
          ? groupPanel(this, this.group)
          : node
            ? nodePanel(this, node)
            : overviewPanel(this);
    const close = h(
      "button",
      {
        type: "button",
        class: "close",
        "aria-label": "Close",
        title: "Close (Esc)",
        on: {
          click: () => {
            if (edge >= 0 && node) state.set({ edge: "" });
            else state.set({ clicked: "", edge: "" });
          },
        },
      },
      edge >= 0 && node ? "←" : "×",
    );
    const panel = byId("inspector");
    panel.replaceChildren(...(back ? [close] : []), ...parts.flat(Infinity).filter(Boolean));
    const open = `${state.edge} ${this.group?.name ?? ""} ${state.clicked}`;
    if (open !== this.lastOpen) panel.scrollTop = 0;
    this.lastOpen = open;
  }

  open(id) {
    this.state.click(id);
    this.say(`Opened ${this.model.spokenName(this.model.graph.byId.get(id))}`);
  }

  openEdge(edge) {
    this.state.set({ edge: this.model.graph.edgeName(edge) });
    this.say(`Opened the edge ${this.model.edgeTitle(edge)}`);
  }

  openGroup(group) {
    this.group = group;
    this.state.clicked = this.state.edge = "";
    this.inspect();
    this.viewport.mark();
    tellOutside(this);
  }

  /** What opens the node of an id, undefined where the file has none. */
  opener(id) {
    return this.model.graph.byId.has(id) ? () => this.open(id) : undefined;
  }

  nameOfId(id) {
    const node = this.model.graph.byId.get(id);
    return node ? this.model.fullName(node) : this.model.graph.nameOfId(id);
  }

  recolour() {
    this.viewport.rebuild();
    this.subgraph.draw();
    this.inspect();
  }

  say(text) {
    byId("status").textContent = text;
  }
}

// For the console, and for tests.
window.circuits = new App();
