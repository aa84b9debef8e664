// The picture of pinned nodes: cards, one for a supernode or a node, with what passes between them.

import { clipped, percent, s } from "./dom.js";
import { pointAt } from "./curves.js";
import { shapePath } from "./node_layer.js";

const [CARD, GAP, ROW] = [30, 12, 64];
const LETTER = 6.3;

/** Supernodes and the pinned nodes that are in none. */
export function itemsOf(model, state) {
  const alone = state.pinned.filter((id) => !state.groupOf(id)).map((id) => ({ id, ids: [id], group: null }));
  const groups = state.groups.map((group) => ({ id: `group ${group.name}`, ids: group.ids, group }));
  return [...groups, ...alone].map((item) => {
    const nodes = item.ids.map((id) => model.graph.byId.get(id));
    const mean = (field) => nodes.reduce((sum, node) => sum + node[field], 0) / nodes.length;
    const only = nodes[0];
    const where = only.kind === "embedding" ? "" : ` · ${model.graph.tokenText(only.position)}`;
    const name = item.group ? item.group.name : model.shortName(only, 26) + (only.isFeature ? where : "");
    const width = Math.max(54, Math.min(200, [...clipped(name, 30)].length * LETTER + (item.group ? 50 : 40)));
    return { ...item, nodes, name: clipped(name, 30), width, depth: mean("depth"), position: mean("position") };
  });
}

/** Rows by depth, within a row by position; a row that is too wide is broken. */
export function placeItems(items, width, nTokens) {
  const rows = [];
  for (const item of [...items].sort((a, b) => b.depth - a.depth || a.position - b.position)) {
    const row = rows.at(-1);
    const wide = row?.items.reduce((sum, other) => sum + other.width + GAP, 0) + item.width;
    if (row && row.depth - item.depth < 0.5 && wide < width - 2 * GAP) row.items.push(item);
    else rows.push({ depth: item.depth, items: [item] });
  }
  rows.forEach((row, number) => {
    row.items.sort((a, b) => a.position - b.position);
    let left = GAP;
    for (const item of row.items) {
      const wanted = GAP + (item.position / Math.max(1, nTokens - 1)) * (width - 2 * GAP - item.width);
      item.x = Math.max(left, wanted);
      left = item.x + item.width + GAP;
      item.y = GAP + number * ROW;
    }
    let right = width - GAP;
    for (const item of [...row.items].reverse()) {
      item.x = Math.min(item.x, right - item.width);
      right = item.x - GAP;
    }
  });
  return { width, height: rows.length ? GAP + (rows.length - 1) * ROW + CARD + GAP : 0 };
}

/**
 * What passes between two cards: the signed part of the target's input, its members weighted by their influence.
 *
 * @returns [{source, target, weight, edges}] strongest last.
 */
export function flowsBetween(model, items) {
  const { graph } = model;
  const owner = new Map(items.flatMap((item) => item.nodes.map((node) => [node.index, item])));
  const flows = new Map();
  for (const item of items) {
    const weights = item.nodes.map((node) => node.influence + node.targetWeight);
    const total = weights.reduce((sum, weight) => sum + weight, 0) || 1;
    item.nodes.forEach((node, index) => {
      for (const edge of model.inputs[node.index]) {
        const source = owner.get(graph.source[edge]);
        if (!source || source === item) continue;
        const key = `${source.id}\n${item.id}`;
        if (!flows.has(key)) flows.set(key, { source, target: item, weight: 0, edges: [] });
        const flow = flows.get(key);
        flow.weight += (Math.sign(graph.weight[edge]) * model.share[edge] * weights[index]) / total;
        flow.edges.push(edge);
      }
    });
  }
  return [...flows.values()].sort((a, b) => Math.abs(a.weight) - Math.abs(b.weight));
}

/** The picture of the cards, with all its looks as attributes, so that it stands alone when it is exported. */
export function drawSubgraph(model, items, flows, size, look, font) {
  const taken = items.map((item) => [item.x, item.y, item.x + item.width, item.y + CARD]);
  const shown = flows.filter((flow) => Math.abs(flow.weight) >= 0.003);
  const lines = shown.map((flow) => drawFlow(flow, look));
  // The strongest choose their place first.
  const texts = [...shown].reverse().map((flow) => drawPercent(flow, taken, look, font));
  const cards = items.map((item) => drawCard(item, look, font));
  return s(
    "svg",
    {
      width: size.width,
      height: size.height,
      viewBox: `0 0 ${size.width} ${size.height}`,
      role: "group",
      "aria-label": "Pinned nodes",
    },
    s("g", {}, lines),
    s("g", {}, cards),
    s("g", { "aria-hidden": "true" }, texts),
  );
}

/** The Bézier points from the top of one card to the foot of another. */
function wayOf({ source, target }) {
  const [x1, y1] = [source.x + source.width / 2, source.y];
  const [x2, y2] = [target.x + target.width / 2, target.y + CARD];
  const rise = Math.max(20, (y1 - y2) / 2);
  return [x1, y1, x1, y1 - rise, x2, y2 + rise, x2, y2];
}

function drawFlow(flow, look) {
  const { source, target, weight, edges } = flow;
  const [x1, y1, ...rest] = wayOf(flow);
  const colour = weight >= 0 ? look.positive : look.negative;
  const part = Math.min(1, Math.abs(weight));
  const path = s(
    "path",
    {
      class: "flow",
      d: `M${x1} ${y1}C${rest.join(" ")}`,
      fill: "none",
      stroke: colour,
      "stroke-width": (0.8 + 6 * part ** 0.8).toFixed(2),
      "stroke-opacity": (0.3 + 0.6 * part ** 0.5).toFixed(2),
    },
    s(
      "title",
      {},
      `${source.name} → ${target.name}: ${percent(Math.abs(weight))} of the input${weight < 0 ? ", lowering it" : ""}`,
    ),
  );
  path.edges = edges;
  return path;
}

/** The share as a number on the line, where neither a card nor another number is. */
function drawPercent(flow, taken, look, font) {
  const part = Math.abs(flow.weight);
  if (part < 0.08) return null;
  for (const t of [0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8]) {
    const [x, y] = pointAt(wayOf(flow), 0, t);
    const box = [x - 14, y - 7, x + 14, y + 7];
    if (taken.some((other) => box[0] < other[2] && box[2] > other[0] && box[1] < other[3] && box[3] > other[1]))
      continue;
    taken.push(box);
    return s(
      "text",
      {
        x: x.toFixed(1),
        y: (y + 3.5).toFixed(1),
        "font-size": 10,
        "font-family": font,
        fill: look.ink,
        stroke: look.paper,
        "stroke-width": 3,
        "paint-order": "stroke",
        "text-anchor": "middle",
      },
      `${flow.weight < 0 ? "−" : ""}${Math.round(100 * part)}%`,
    );
  }
  return null;
}

function drawCard(item, look, font) {
  const [only] = item.nodes;
  const group = item.group;
  const selected = item.selected;
  const attention = /attention|mtc|value/.test(only.kind) && !group;
  const box = {
    width: item.width,
    height: CARD,
    rx: group ? 9 : 4,
    fill: look.paper,
    stroke: selected ? look.positive : attention ? look.attention : look.quiet,
    "stroke-width": selected ? 2.5 : 1.2,
  };
  const text = s(
    "text",
    {
      x: group ? 26 : 28,
      y: CARD / 2 + 4,
      "font-size": 12,
      "font-family": font,
      fill: look.ink,
      "font-weight": group ? 600 : 400,
    },
    item.name,
  );
  const open = /^(mtc_key|value_feature)$/.test(only.kind);
  const sign = group
    ? s(
        "text",
        { x: 15, y: CARD / 2 + 3.5, "font-size": 10, "font-family": font, "text-anchor": "middle", fill: look.quiet },
        item.ids.length,
      )
    : s("path", {
        d: shapePath(only.kind, 5),
        transform: `translate(15 ${CARD / 2})`,
        "stroke-width": 1.1,
        stroke: attention ? look.attention : look.ink,
        fill:
          attention && !open
            ? look.attention
            : only.kind === "embedding" || only.kind === "logit"
              ? look.token
              : look.paper,
      });
  const behind = group ? s("rect", { ...box, x: 3, y: 3, fill: look.band }) : null;
  const spoken = `${group ? `supernode of ${item.ids.length}: ` : ""}${item.name}`;
  const card = s(
    "g",
    {
      class: "card",
      transform: `translate(${item.x.toFixed(1)} ${item.y})`,
      tabindex: 0,
      role: "button",
      "aria-label": spoken,
      "aria-pressed": String(Boolean(selected)),
      "data-item": item.id,
    },
    behind,
    s("rect", box),
    s("rect", { class: "handle", width: 26, height: CARD, fill: "transparent" }),
    sign,
    text,
  );
  card.item = item;
  return card;
}
