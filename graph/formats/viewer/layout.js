// Where everything stands: a column for each token, and for each layer a row for key sides, attention and MLP, as in
// the SVG (graph/formats/svg_layout.py), but grown to fill the room that the window has.

const SORTS = {
  embedding: "embedding",
  value_feature: "key",
  value_error: "key",
  mtc_key: "key",
  attention_feature: "attention",
  mtc_query: "attention",
  attention_error: "attention",
  mlp_feature: "mlp",
  mlp_error: "mlp",
  block_error: "mlp",
  logit: "logit",
};
export const ROW_NAMES = { embedding: "tokens", key: "key side", attention: "attention", mlp: "MLP", logit: "output" };
const KIND_ORDER = Object.keys(SORTS);
const LOGIT_SLOT = 21;
const LEAST_COLUMN = 11;
const LEAST_SLOT = 4.5;

// Least column and row, and a node's slot across and down: from a few tokens to many.
const ROOMS = [
  { column: 60, row: 36, slot: 26, line: 22 },
  { column: 30, row: 28, slot: 22, line: 19 },
  { column: 11.5, row: 24, slot: 14, line: 14.5 },
];

function cellsOf(model) {
  const cells = new Map();
  for (const node of model.nodes) {
    const sort = SORTS[node.kind];
    const key = `${sort} ${node.layer} ${node.position}`;
    if (!cells.has(key)) cells.set(key, { sort, layer: node.layer, position: node.position, nodes: [] });
    cells.get(key).nodes.push(node);
  }
  const rank = (node) => KIND_ORDER.indexOf(node.kind) + (node.isError ? 100 : 0);
  for (const cell of cells.values()) {
    if (cell.sort === "logit") cell.nodes.sort((a, b) => b.targetWeight - a.targetWeight);
    else cell.nodes.sort((a, b) => rank(a) - rank(b) || a.feature - b.feature || a.index - b.index);
  }
  return [...cells.values()];
}

/** For each layer how many edges its heads carry across columns. */
function crossing(model) {
  const counts = new Array(model.graph.nLayers).fill(0);
  for (const edge of model.edges) {
    const source = model.graph.nodes[model.graph.source[edge]];
    const target = model.graph.nodes[model.graph.target[edge]];
    if (source.position === target.position) continue;
    if (source.kind.startsWith("value")) counts[source.layer]++;
    else if (SORTS[target.kind] === "attention") counts[target.layer]++;
  }
  return counts;
}

/** How many lines a cell has; outputs always stand in one. */
function linesOf(cell, perLine) {
  return cell.sort === "logit" ? 1 : Math.ceil(cell.nodes.length / perLine[cell.position]);
}

/** Rows from the top down, each with the lane for crossing edges below it. */
function rowsOf(model, cells, perLine, space) {
  const { nLayers } = model.graph;
  const lines = new Map();
  for (const cell of cells) {
    const key = `${cell.sort} ${cell.layer}`;
    const needed = linesOf(cell, perLine);
    lines.set(key, Math.max(lines.get(key) ?? 0, needed));
  }
  const keyed = new Set(cells.filter((cell) => cell.sort === "key").map((cell) => cell.layer));
  const order = [["logit", nLayers]];
  for (let layer = nLayers - 1; layer >= 0; layer--) {
    order.push(["mlp", layer], ["attention", layer]);
    if (keyed.has(layer)) order.push(["key", layer]);
  }
  order.push(["embedding", -1]);
  const counts = crossing(model);
  return order.map(([sort, layer]) => {
    const count = lines.get(`${sort} ${layer}`) ?? 0;
    const height = count || sort === "embedding" ? Math.max(space.row, count * space.line + 12) : 10;
    const least = keyed.has(layer) ? 14 : 0;
    const lane = sort === "attention" ? Math.max(least, Math.min(90, 4.5 * Math.sqrt(counts[layer]))) : 0;
    return { sort, layer, height, lane, used: count > 0 };
  });
}

/** Half the height of a node at full size: by influence for features, small for errors. */
function radius(model, node) {
  if (node.isError) return 2.7;
  if (!node.isFeature) return 4.6;
  return 3.6 + 3.2 * Math.sqrt(model.topInfluence > 0 ? Math.min(1, node.influence / model.topInfluence) : 0);
}

const summed = (numbers) => numbers.reduce((sum, number) => sum + number, 0);
const heightOf = (rows) => summed(rows.map((row) => row.height + row.lane));

/** How large the room of a node is and how long the lines of cells are: so that nodes stand farthest apart. */
function bestPacking(model, cells, size) {
  let best = null;
  const first = size.width / model.graph.tokens.length >= 90 ? 0 : 1;
  for (const space of ROOMS.slice(first)) {
    for (const flatness of [3, 2, 1.4, 1, 0.7]) {
      const one = packing(model, cells, space, flatness, size);
      if (!best || one.scale * space.slot > 1.01 * best.scale * best.space.slot) best = one;
    }
  }
  return best;
}

function packing(model, cells, space, flatness, size) {
  const perLine = new Array(model.graph.tokens.length).fill(1);
  for (const cell of cells) {
    if (cell.sort === "logit") continue;
    const count = cell.nodes.length;
    const wanted = Math.min(count, Math.ceil(Math.sqrt(flatness * count)));
    perLine[cell.position] = Math.max(perLine[cell.position], wanted);
  }
  const widths = perLine.map((count) => Math.max(space.column, (count + 0.5) * space.slot));
  const rows = rowsOf(model, cells, perLine, space);
  // Columns are not made narrower than a token; the picture then reaches beyond the window.
  const across = Math.max(size.width / summed(widths), (LEAST_COLUMN * widths.length) / summed(widths));
  const scale = Math.max(LEAST_SLOT / space.slot, Math.min(1, across, size.height / heightOf(rows)));
  return { perLine, widths, rows, scale, space };
}

/**
 * Place all nodes that are shown.
 *
 * @param size Room for the picture in pixels: `width`, `height`.
 * @returns Positions by index of the node (`x`, `y`, radius `r`,
 *   and `reach`, where it is still pointed at), `columns`, `rows`, `width`, `height`, `slot`, and the
 *   `scale` at which it fits.
 */
export function layoutOf(model, size) {
  const { graph } = model;
  const cells = cellsOf(model);
  const { perLine, widths, rows, scale, space } = bestPacking(model, cells, size);
  const spare = Math.max(0, size.width / scale - summed(widths)) / widths.length;
  let left = 0;
  const columns = widths.map((width, position) => {
    const column = { position, left, width: width + spare, centre: left + (width + spare) / 2 };
    left += width + spare;
    return column;
  });
  const growth = Math.min(4, Math.max(1, size.height / scale / heightOf(rows)));
  let top = 0;
  for (const row of rows) {
    row.top = top;
    row.height *= growth;
    row.lane *= growth;
    top += row.height + row.lane;
  }
  const n = graph.nodes.length;
  const placed = { x: new Float32Array(n), y: new Float32Array(n), r: new Float32Array(n), reach: new Float32Array(n) };
  const larger = Math.min(2, scale ** -0.6);
  const rowOf = new Map(rows.map((row) => [`${row.sort} ${row.layer}`, row]));
  for (const cell of cells) {
    const row = rowOf.get(`${cell.sort} ${cell.layer}`);
    const column = columns[cell.position];
    const count = linesOf(cell, perLine);
    const length = cell.sort === "logit" ? cell.nodes.length : perLine[cell.position];
    const across =
      cell.sort === "logit" ? Math.max(space.slot, LOGIT_SLOT / scale) : space.slot * Math.min(1.5, growth);
    const slot = cell.sort === "logit" ? across : Math.min(across, column.width / (length + 0.4));
    const down = Math.min(space.line * growth, (row.height - 6) / count);
    // Many outputs would reach beyond the picture; they move to the left then.
    const half = ((Math.min(length, cell.nodes.length) - 1) / 2) * slot;
    const centre = Math.max(half, Math.min(column.centre, left - half - 4));
    cell.nodes.forEach((node, number) => {
      const line = Math.floor(number / length);
      const inLine = Math.min(length, cell.nodes.length - line * length);
      const place = number - line * length;
      placed.x[node.index] = centre + (place - (inLine - 1) / 2) * slot;
      placed.y[node.index] = row.top + row.height / 2 + (line - (count - 1) / 2) * down;
      const part = node.kind === "embedding" ? 0.42 : 0.6;
      placed.r[node.index] = Math.min(larger * radius(model, node), Math.max(2.4, part * Math.min(slot, down)));
      placed.reach[node.index] = Math.max(placed.r[node.index] + 1.5, Math.min(0.5 * Math.min(slot, down), 11));
    });
  }
  return { ...placed, columns, rows, width: left, height: top, slot: space.slot, scale };
}
