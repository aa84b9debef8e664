// What is pinned, grouped, named, clicked and pruned: in memory, in the address, and as `qParams` of graph.json.
// The keys are those of Neuronpedia's graph viewer; `edgeThreshold` and `clickedEdge` are ours.

import { prunedWith } from "./pruning.js";

const LINK_TYPES = ["both", "input", "output"];

function list(value) {
  if (Array.isArray(value)) return value.filter((item) => typeof item === "string" && item);
  return typeof value === "string" ? value.split(",").filter(Boolean) : [];
}

function parsed(value) {
  if (typeof value !== "string") return value;
  try {
    return JSON.parse(value);
  } catch {
    return null;
  }
}

function threshold(value, most) {
  const given = value === null || value === "" ? NaN : Number(value);
  return given >= 0 && given <= 1 ? Math.min(given, most) : NaN;
}

export class State {
  constructor(graph) {
    this.graph = graph;
    this.listeners = [];
    const before = prunedWith(graph);
    this.most = { node: before.node ?? 1, edge: before.edge ?? 1 };
    this.start = { node: before.node ?? 0.8, edge: before.edge ?? 0.98 };
    this.foreign = {};
    this.selected = [];
    this.read(graph.qParams);
    if (location.hash.length > 1) this.read(Object.fromEntries(new URLSearchParams(location.hash.slice(1))));
  }

  /** Take what a qParams object or an address says; ids that are no nodes of this graph are left out. */
  read(given) {
    const known = (id) => this.graph.byId.has(id);
    this.foreign = { ...this.foreign, ...given };
    this.pinned = [...new Set(list(given.pinnedIds).filter(known))];
    const groups = parsed(given.supernodes);
    this.groups = [];
    const grouped = new Set();
    for (const group of Array.isArray(groups) ? groups : []) {
      if (!Array.isArray(group) || typeof group[0] !== "string") continue;
      const ids = list(group.slice(1)).filter((id) => known(id) && !grouped.has(id));
      ids.forEach((id) => grouped.add(id));
      if (ids.length) this.groups.push({ name: group[0], ids });
      this.pinned.push(...ids.filter((id) => !this.pinned.includes(id)));
    }
    const names = parsed(given.clerps);
    this.names = new Map();
    for (const pair of Array.isArray(names) ? names : []) {
      if (Array.isArray(pair) && known(pair[0]) && typeof pair[1] === "string") this.names.set(pair[0], pair[1]);
    }
    this.clicked = known(given.clickedId) ? given.clickedId : "";
    this.edge = this.graph.edgeNames.has(given.clickedEdge) ? given.clickedEdge : "";
    this.linkType = LINK_TYPES.includes(given.linkType) ? given.linkType : "both";
    const at = (key, side) => threshold(given[key] ?? null, this.most[side]);
    this.nodeThreshold = at("pruningThreshold", "node");
    this.edgeThreshold = at("edgeThreshold", "edge");
    this.density = threshold(given.densityThreshold ?? null, 1);
    if (Number.isNaN(this.nodeThreshold)) this.nodeThreshold = this.start.node;
    if (Number.isNaN(this.edgeThreshold)) this.edgeThreshold = this.start.edge;
    if (Number.isNaN(this.density)) this.density = 1;
  }

  /** The annotations as graph.json keeps them; keys of other viewers are passed on. */
  qParams() {
    const own = {
      pinnedIds: this.pinned,
      supernodes: this.groups.map(({ name, ids }) => [name, ...ids]),
      clickedId: this.clicked,
      linkType: this.linkType,
      pruningThreshold: this.nodeThreshold,
      edgeThreshold: this.edgeThreshold,
      densityThreshold: this.density,
    };
    const params = { sg_pos: "", ...this.foreign, ...own };
    for (const [key, value] of [
      ["clerps", [...this.names]],
      ["clickedEdge", this.edge],
    ]) {
      if (value.length) params[key] = value;
      else delete params[key];
    }
    return params;
  }

  hash() {
    const words = new URLSearchParams();
    const add = (key, value, usual) => value !== usual && words.set(key, value);
    add("pinnedIds", this.pinned.join(","), "");
    add("supernodes", this.groups.length ? JSON.stringify(this.groups.map(({ name, ids }) => [name, ...ids])) : "", "");
    add("clerps", this.names.size ? JSON.stringify([...this.names]) : "", "");
    add("clickedId", this.clicked, "");
    add("clickedEdge", this.edge, "");
    add("linkType", this.linkType, "both");
    add("pruningThreshold", String(this.nodeThreshold), String(this.start.node));
    add("edgeThreshold", String(this.edgeThreshold), String(this.start.edge));
    add("densityThreshold", String(this.density), "1");
    return words.toString();
  }

  on(listener) {
    this.listeners.push(listener);
  }

  /** Change fields and tell everybody which. */
  set(changes) {
    Object.assign(this, changes);
    const names = new Set(Object.keys(changes));
    for (const listener of this.listeners) listener(names);
  }

  click(id) {
    this.set({ clicked: id, edge: "" });
  }

  isPinned(id) {
    return this.pinned.includes(id);
  }

  groupOf(id) {
    return this.groups.find((group) => group.ids.includes(id));
  }

  pin(id) {
    if (!this.isPinned(id)) return this.set({ pinned: [...this.pinned, id] });
    const groups = this.groups.map((group) => ({ ...group, ids: group.ids.filter((other) => other !== id) }));
    return this.set({
      pinned: this.pinned.filter((other) => other !== id),
      selected: this.selected.filter((other) => other !== id),
      groups: groups.filter((group) => group.ids.length),
    });
  }

  /** One named supernode of nodes, which leave the groups that they were in. */
  group(name, ids) {
    const others = this.groups.map((group) => ({ ...group, ids: group.ids.filter((id) => !ids.includes(id)) }));
    const groups = [...others.filter((group) => group.ids.length), { name, ids }];
    const pinned = [...new Set([...this.pinned, ...ids])];
    this.set({ groups, pinned, selected: [] });
  }

  ungroup(group) {
    this.set({ groups: this.groups.filter((other) => other !== group) });
  }

  rename(id, name) {
    const names = new Map(this.names);
    if (name) names.set(id, name);
    else names.delete(id);
    this.set({ names });
  }
}
