// Edges on canvas. A picture reaches a quarter beyond the window and is moved as a whole while the reader pans; a new
// one is painted behind it, a few milliseconds a frame, and put in its place when it is complete.

const MARGIN = 0.25;
const SLICE = 7; // milliseconds of painting a frame
const MOST_LIT = 600;

/** Where a layer that was drawn at one view must stand at another. */
export function shiftLayer(element, drawn, view) {
  const ratio = view.k / drawn.k;
  const [x, y] = [view.x - drawn.x * ratio, view.y - drawn.y * ratio];
  const still = ratio === 1 && x === 0 && y === 0;
  element.style.transform = still ? "" : `translate(${x}px,${y}px) scale(${ratio})`;
}

export class EdgeCanvas {
  constructor(front, lit) {
    this.front = front;
    this.lit = lit;
    this.back = document.createElement("canvas");
    this.drawn = { k: 1, x: 0, y: 0 };
    this.litDrawn = { k: 1, x: 0, y: 0 };
    this.job = 0;
  }

  resize(width, height) {
    this.ratio = Math.min(2, window.devicePixelRatio || 1);
    this.marginX = Math.round(MARGIN * width);
    this.marginY = Math.round(MARGIN * height);
    for (const canvas of [this.front, this.lit]) {
      canvas.style.left = `${-this.marginX}px`;
      canvas.style.top = `${-this.marginY}px`;
      canvas.style.width = `${width + 2 * this.marginX}px`;
      canvas.style.height = `${height + 2 * this.marginY}px`;
      canvas.style.transformOrigin = `${this.marginX}px ${this.marginY}px`;
    }
    this.pixels = [this.ratio * (width + 2 * this.marginX), this.ratio * (height + 2 * this.marginY)].map(Math.round);
    for (const canvas of [this.front, this.lit, this.back]) [canvas.width, canvas.height] = this.pixels;
  }

  /** Move what is painted to where it belongs at a view. */
  follow(view) {
    shiftLayer(this.front, this.drawn, view);
    shiftLayer(this.lit, this.litDrawn, view);
  }

  /** Whether a view shows more than what is painted. */
  outgrown(view) {
    const ratio = view.k / this.drawn.k;
    const [x, y] = [view.x - this.drawn.x * ratio, view.y - this.drawn.y * ratio];
    return Math.abs(x) > 0.9 * this.marginX || Math.abs(y) > 0.9 * this.marginY || ratio > 1.5 || ratio < 0.7;
  }

  context(canvas, view) {
    const context = canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    const scale = this.ratio * view.k;
    const at = [this.ratio * (view.x + this.marginX), this.ratio * (view.y + this.marginY)];
    context.setTransform(scale, 0, 0, scale, ...at);
    context.lineCap = "round";
    return context;
  }

  /** Paint ground and all shown edges for a view; `done` is called when they are on the screen. */
  paint(scene, view, done = () => {}) {
    const job = ++this.job;
    const at = { ...view };
    const context = this.context(this.back, at);
    const box = this.box(at);
    paintGround(context, scene, box, at.k);
    const { edges } = scene.model;
    let next = 0;
    const slice = () => {
      if (job !== this.job) return;
      const end = performance.now() + SLICE;
      while (next < edges.length && (next % 64 || performance.now() < end)) {
        const edge = edges[next++];
        if (touches(scene.points, edge, box)) strokeEdge(context, scene, edge, look(scene.model, edge), at.k);
      }
      if (next < edges.length) {
        requestAnimationFrame(slice);
        return;
      }
      const front = this.front.getContext("2d");
      front.setTransform(1, 0, 0, 1, 0, 0);
      front.clearRect(0, 0, ...this.pixels);
      front.drawImage(this.back, 0, 0);
      this.drawn = at;
      done();
    };
    slice();
  }

  /** The part of the world that a picture covers. */
  box(view) {
    const [width, height] = this.pixels.map((size) => size / this.ratio);
    const left = (-view.x - this.marginX) / view.k;
    const top = (-view.y - this.marginY) / view.k;
    return { left, top, right: left + width / view.k, bottom: top + height / view.k };
  }

  /** Paint the edges that carry most of a flow, or one edge, over all others. */
  light(scene, view, flow, only) {
    const context = this.context(this.lit, view);
    this.litDrawn = { ...view };
    const { model } = scene;
    this.shown = [];
    if (flow) {
      const carried = [...model.edges].filter((edge) => flow.edges[edge] >= 0.004);
      carried.sort((a, b) => flow.edges[a] - flow.edges[b]);
      this.shown = carried.slice(-MOST_LIT);
      for (const edge of this.shown) {
        const part = Math.min(1, flow.edges[edge]);
        strokeEdge(context, scene, edge, { alpha: 0.12 + 0.85 * part ** 0.45, width: 0.5 + 3 * part ** 0.7 }, view.k);
      }
    }
    if (only >= 0) strokeEdge(context, scene, only, { alpha: 1, width: 2.2 + 2 * model.share[only] }, view.k);
  }
}

function look(model, edge) {
  const part = model.topScore > 0 ? model.score[edge] / model.topScore : 0;
  return { alpha: 0.05 + 0.8 * part ** 0.55, width: 0.35 + 2.8 * model.share[edge] ** 0.8 };
}

function strokeEdge(context, scene, edge, { alpha, width }, k) {
  const { points, model, colours } = scene;
  const at = 8 * edge;
  context.strokeStyle = model.graph.weight[edge] >= 0 ? colours.positive : colours.negative;
  context.globalAlpha = alpha;
  context.lineWidth = width / k ** 0.6;
  const frozen = model.graph.crosses(edge) && !model.graph.heads[edge].length;
  context.setLineDash(frozen ? [4 / k, 3 / k] : []);
  context.beginPath();
  context.moveTo(points[at], points[at + 1]);
  context.bezierCurveTo(points[at + 2], points[at + 3], points[at + 4], points[at + 5], points[at + 6], points[at + 7]);
  context.stroke();
}

function touches(points, edge, box) {
  const at = 8 * edge;
  const reach = 40;
  const left = Math.min(points[at], points[at + 6]) - reach;
  const right = Math.max(points[at], points[at + 6]) + reach;
  return right >= box.left && left <= box.right && points[at + 1] >= box.top && points[at + 7] <= box.bottom;
}

/** Bands of every other layer, and a faint line where each token's stream runs. */
function paintGround(context, { layout, colours }, box, k) {
  context.globalAlpha = 1;
  context.fillStyle = colours.band;
  for (const row of layout.rows) {
    if (row.sort !== "mlp" || row.layer % 2) continue;
    const last = layout.rows.filter((other) => other.layer === row.layer).at(-1);
    context.fillRect(box.left, row.top, box.right - box.left, last.top + last.height + last.lane - row.top);
  }
  context.strokeStyle = colours.stream;
  context.lineWidth = 0.75 / k;
  context.setLineDash([]);
  const [top, bottom] = [layout.rows[0], layout.rows.at(-1)];
  for (const column of layout.columns) {
    context.beginPath();
    context.moveTo(column.centre, top.top + top.height);
    context.lineTo(column.centre, bottom.top + bottom.height / 2);
    context.stroke();
  }
}
