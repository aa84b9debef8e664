// Pieces that several panels are made of.

import { h, percent, short, signed } from "./dom.js";

/** A heading with what belongs to it. */
export function block(title, ...children) {
  return h("section", { class: "block" }, h("h3", {}, title), children);
}

/** Name and value pairs. */
export function figures(pairs) {
  const shown = pairs.filter(([, value]) => value !== "–" && value !== "");
  return h(
    "dl",
    { class: "figures" },
    shown.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
  );
}

/** A bar of a part of the largest: from the middle where there are signs, else from the left. */
function bar(part, bySign) {
  const size = `${(Math.min(1, Math.abs(part)) * (bySign ? 50 : 100)).toFixed(1)}%`;
  return h(
    "span",
    { class: bySign ? "bar" : "bar plain-bar", "aria-hidden": "true" },
    h("i", { class: part < 0 ? "below" : "above", css: { width: size } }),
  );
}

/**
 * Rows with a name, a bar and a value; a row with `act` is a button.
 *
 * @param rows [{name, weight, note, act, pressed}]
 */
export function barRows(rows, { most = 0, label = "", bySign = true } = {}) {
  const largest = most || Math.max(1e-12, ...rows.map((row) => Math.abs(row.weight)));
  return h(
    "ul",
    { class: "bars", "aria-label": label || null },
    rows.map((row) => {
      const inside = [
        h("span", { class: "name" }, row.name),
        bar(row.weight / largest, bySign),
        h("span", { class: "value" }, bySign ? signed(row.weight) : short(row.weight)),
        row.note ? h("span", { class: "note" }, row.note) : null,
      ];
      if (!row.act) return h("li", {}, h("div", { class: "row" }, inside));
      const pressed = row.pressed === undefined ? null : String(row.pressed);
      return h(
        "li",
        {},
        h("button", { type: "button", class: "row", "aria-pressed": pressed, on: { click: row.act } }, inside),
      );
    }),
  );
}

/** The first rows, and a button for the rest. */
export function long(items, shown, draw) {
  const box = h("div", {}, draw(items.slice(0, shown)));
  if (items.length <= shown) return box;
  const more = h("button", { type: "button", class: "more" }, `Show all ${items.length}`);
  more.addEventListener("click", () => box.replaceChildren(draw(items)));
  box.append(more);
  return box;
}

/** A node as a button that opens it; on hover it is shown in the picture. */
export function nodeButton(app, node, text) {
  return h(
    "button",
    {
      type: "button",
      class: "link",
      on: {
        click: () => app.open(node.id),
        pointerenter: () => app.viewport.pretendHover(node.index),
        pointerleave: () => app.viewport.leave(),
      },
    },
    text ?? app.model.fullName(node),
  );
}

/** Inputs or outputs of a node: each a button that opens the edge. */
export function edgeRows(app, edges, side) {
  const { model } = app;
  const { graph } = model;
  return long(edges, 10, (some) =>
    h(
      "ul",
      { class: "edges" },
      some.map((edge) => {
        const end = graph.nodes[graph[side][edge]];
        const head = model.strongestHead(edge);
        const weight = graph.weight[edge];
        return h(
          "li",
          {},
          h(
            "button",
            {
              type: "button",
              class: "edge-row",
              on: {
                click: () => app.openEdge(edge),
                pointerenter: () => app.viewport.pretendHover(end.index),
                pointerleave: () => app.viewport.leave(),
              },
            },
            h("span", { class: `chip ${end.kind}`, "aria-hidden": "true" }),
            h("span", { class: "name" }, model.fullName(end)),
            h("span", { class: "value" }, signed(weight)),
            h(
              "span",
              { class: "note" },
              end.kind === "embedding" ? `at ${end.position}` : `at ${graph.place(end.position)}`,
              head ? h("b", {}, ` ${head}`) : null,
            ),
            h("span", { class: "value quiet" }, percent(model.share[edge])),
          ),
        );
      }),
    ),
  );
}
