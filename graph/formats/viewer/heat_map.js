// Attention patterns: a heat map over all queries and keys, and one query's row as a line of tokens.

import { clipped, h, s, short, visible } from "./dom.js";

const NAMED = 26; // with more tokens, only the marked ones are named

/** Of a pattern's rows the largest absolute value, at least a little. */
function largest(rows) {
  let most = 1e-9;
  for (const row of rows) for (const value of row) most = Math.max(most, Math.abs(value));
  return most;
}

/**
 * A triangle of cells, queries down and keys across.
 *
 * @param rows For each query the values up to its own position.
 * @param marks [key, query] cells to mark.
 * @param scale The value that has the full colour; the pattern's largest by default.
 */
export function heatMap(graph, rows, marks, title, scale = largest(rows)) {
  const count = rows.length;
  const cell = Math.max(4, Math.min(16, Math.floor(286 / count)));
  const named = count <= NAMED;
  const gutter = named ? 54 : 44;
  const size = count * cell;
  const canvas = h("canvas", {
    width: 2 * size,
    height: 2 * size,
    css: { width: `${size}px`, height: `${size}px`, left: `${gutter}px` },
  });
  const context = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  context.scale(2, 2);
  context.fillStyle = colour("band");
  context.beginPath();
  rows.forEach((_, query) => context.rect(0, query * cell, (query + 1) * cell, cell));
  context.fill();
  rows.forEach((row, query) =>
    row.forEach((value, key) => {
      context.globalAlpha = Math.min(1, Math.abs(value) / scale) ** 0.8;
      context.fillStyle = value >= 0 ? colour("positive") : colour("negative");
      context.fillRect(key * cell, query * cell, cell - (cell > 6 ? 0.75 : 0), cell - (cell > 6 ? 0.75 : 0));
    }),
  );
  const markedQueries = new Set(marks.map(([, query]) => query));
  const markedKeys = new Set(marks.map(([key]) => key));
  const texts = [];
  graph.tokens.forEach((_, position) => {
    const text = clipped(graph.tokenText(position), 8);
    const lit = (marked) => (marked ? "lit" : null);
    if (named || markedQueries.has(position)) {
      texts.push(
        s(
          "text",
          {
            x: gutter - 5,
            y: position * cell + cell / 2 + 3,
            class: lit(markedQueries.has(position)),
            "text-anchor": "end",
          },
          text,
        ),
      );
    }
    if (named || markedKeys.has(position)) {
      const [x, y] = [gutter + position * cell + cell / 2 + 3, size + 6];
      texts.push(
        s(
          "text",
          { transform: `translate(${x} ${y}) rotate(-55)`, class: lit(markedKeys.has(position)), "text-anchor": "end" },
          text,
        ),
      );
    }
  });
  const boxes = marks.map(([key, query]) =>
    s("rect", {
      class: "mark",
      x: gutter + key * cell - 1.5,
      y: query * cell - 1.5,
      width: cell + 2,
      height: cell + 2,
      rx: 1,
    }),
  );
  const value = h("p", { class: "quiet heat-value" }, "\u00a0");
  const told = marks.map(
    ([key, query]) => `from query ${graph.place(query)} to key ${graph.place(key)}: ${short(rows[query]?.[key] ?? 0)}`,
  );
  const picture = h(
    "div",
    { class: "heat", role: "img", "aria-label": `${title}. ${told.join("; ")}`, css: { height: `${size + 46}px` } },
    canvas,
    s("svg", { width: gutter + size + 14, height: size + 46, "aria-hidden": "true" }, texts, boxes),
  );
  const usual = told.length === 1 ? told[0] : "\u00a0";
  value.textContent = usual;
  picture.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const key = Math.floor((event.clientX - box.left) / cell);
    const query = Math.floor((event.clientY - box.top) / cell);
    const inside = query >= 0 && query < count && key >= 0 && key <= query;
    value.textContent = inside
      ? `from query ${graph.place(query)} to key ${graph.place(key)}: ${short(rows[query][key])}`
      : usual;
  });
  picture.addEventListener("pointerleave", () => (value.textContent = usual));
  return h("figure", { class: "heat-figure" }, h("figcaption", {}, title), picture, value);
}

/** Tokens on a ground whose strength is a value, with the value as a tooltip. */
export function tokenLine(tokens, values, marked = new Set(), scale = 0) {
  const most = scale || Math.max(1e-9, ...values.map(Math.abs));
  return h(
    "p",
    { class: "token-line" },
    tokens.map((token, position) => {
      const value = values[position] ?? 0;
      const part = Math.min(1, Math.abs(value) / most);
      return h(
        "span",
        {
          class: `${marked.has(position) ? "marked " : ""}${value < 0 ? "below" : "above"}`,
          title: `${position} ${visible(token)}: ${short(value)}`,
          css: { "--part": `${Math.round(62 * part ** 0.8)}%` },
        },
        visible(token).replace(/^ /, "\u2009"),
      );
    }),
  );
}
