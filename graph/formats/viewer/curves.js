// Edges as Bézier curves, along the ways of the SVG (graph/formats/svg_edges.py): an edge through attention rises in
// its source's column and crosses just below the layer whose heads carry it; what leaves a value crosses at once.

/** @returns {Float32Array} Eight numbers for each edge of the graph; only shown edges are filled. */
export function curvesOf(model, layout) {
  const points = new Float32Array(8 * model.graph.weight.length);
  for (const edge of model.edges) points.set(curve(model.graph, layout, edge), 8 * edge);
  return points;
}

function curve(graph, layout, edge) {
  const [source, target] = [graph.nodes[graph.source[edge]], graph.nodes[graph.target[edge]]];
  const x1 = layout.x[source.index];
  const y1 = layout.y[source.index] - layout.r[source.index];
  const x2 = layout.x[target.index];
  const y2 = layout.y[target.index] + layout.r[target.index];
  const rise = y1 - y2;
  if (source.position !== target.position) {
    const far = Math.min(1, Math.abs(x2 - x1) / layout.width);
    if (source.kind.startsWith("value")) {
      const above = Math.min((0.3 + 0.5 * far) * rise, 40 + 30 * far);
      return [x1, y1, x1, y1 - above, x2, y1 - above - 0.15 * rise, x2, y2];
    }
    const below = Math.min((0.3 + 0.5 * far) * rise, 60 + 40 * far);
    return [x1, y1, x1, y1 - (0.85 - 0.45 * far) * rise, x2, y2 + below, x2, y2];
  }
  const beside = (x1 + x2) / 2 - layout.columns[target.position].centre;
  const outward = beside > 1 || (Math.abs(beside) <= 1 && edge % 2) ? 1 : -1;
  let bend = rise > 60 ? outward * Math.min(0.12 * rise, 1.2 * layout.slot) : 0;
  if (source.kind === "mtc_key") bend = outward * Math.min(0.5 * rise, 0.6 * layout.slot);
  return [x1, y1, x1 + bend, y1 - 0.4 * rise, x2 + bend, y2 + 0.4 * rise, x2, y2];
}

/** The point at t from 0, the source, to 1, the target. */
export function pointAt(points, edge, t) {
  const at = 8 * edge;
  const [a, b, c, d] = [(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t ** 2, t ** 3];
  const along = (k) => a * points[at + k] + b * points[at + 2 + k] + c * points[at + 4 + k] + d * points[at + 6 + k];
  return [along(0), along(1)];
}

/** The edge nearest to a point, within a reach, of those given; -1 if there is none. Later ones go first. */
export function nearestEdge(points, edges, x, y, reach) {
  let [best, least] = [-1, reach * reach];
  for (let i = edges.length - 1; i >= 0; i--) {
    const at = 8 * edges[i];
    const [x0, x3] = [points[at], points[at + 6]];
    const bend = 40;
    if (x < Math.min(x0, x3) - bend || x > Math.max(x0, x3) + bend) continue;
    if (y > points[at + 1] + reach || y < points[at + 7] - reach) continue;
    let [fromX, fromY] = [points[at], points[at + 1]];
    for (let step = 1; step <= 16; step++) {
      const [toX, toY] = pointAt(points, edges[i], step / 16);
      const distance = toSegment(x, y, fromX, fromY, toX, toY);
      if (distance < least) [best, least] = [edges[i], distance];
      [fromX, fromY] = [toX, toY];
    }
  }
  return best;
}

function toSegment(x, y, x1, y1, x2, y2) {
  const [dx, dy] = [x2 - x1, y2 - y1];
  const length = dx * dx + dy * dy;
  const t = length > 0 ? Math.max(0, Math.min(1, ((x - x1) * dx + (y - y1) * dy) / length)) : 0;
  return (x - x1 - t * dx) ** 2 + (y - y1 - t * dy) ** 2;
}
