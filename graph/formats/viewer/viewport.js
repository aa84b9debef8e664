// The picture: its layers, its view, and the pointer on it. Moving shifts painted layers; they are painted anew when
// the hand rests.

import { byId, h, nextFrame, percent, signed, visible } from "./dom.js";
import { Axes, LEFT } from "./axes.js";
import { curvesOf, nearestEdge } from "./curves.js";
import { EdgeCanvas } from "./edge_canvas.js";
import { layoutOf } from "./layout.js";
import { figuresLine, NodeLayer } from "./node_layer.js";

const REST = 110; // milliseconds without a move after which layers are painted anew
const RIGHT = 46; // room for the slanted names of outputs
const [LEAST, MOST] = [0.15, 14];

export class Viewport {
  constructor(model, state) {
    this.model = model;
    this.state = state;
    this.stage = byId("stage");
    this.canvas = new EdgeCanvas(byId("edges"), byId("lit-edges"));
    this.nodes = new NodeLayer(byId("nodes"));
    this.axes = new Axes(byId("axes"), model.graph);
    this.view = { k: 1, x: 0, y: 0 };
    this.untouched = true;
    this.hits = new Set();
    this.hover = { node: -1, edge: -1 };
    this.pointers = new Map();
    this.move = nextFrame(() => this.follow());
    this.pointAtFrame = nextFrame(() => this.pointAt());
    this.listen();
    this.zoomButtons();
    new ResizeObserver(nextFrame(() => this.resize())).observe(this.stage);
  }

  colours() {
    const style = getComputedStyle(document.documentElement);
    const names = ["positive", "negative", "band", "stream"];
    return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  }

  resize() {
    const [width, height] = [this.stage.clientWidth, this.stage.clientHeight];
    if (!width || !height || (width === this.width && height === this.height)) return;
    [this.width, this.height] = [width, height];
    this.canvas.resize(width, height);
    this.rebuild();
  }

  /** Lay out and draw what is left at the current thresholds. */
  rebuild() {
    if (!this.width) return;
    const outputs = this.model.nodes.filter((node) => node.kind === "logit").length;
    this.head = outputs ? 74 : 16;
    const size = {
      width: this.width - LEFT - RIGHT,
      height: this.height - this.head - this.axes.depthFor((this.width - LEFT) / this.model.graph.tokens.length),
    };
    this.layout = layoutOf(this.model, size);
    this.scene = {
      model: this.model,
      layout: this.layout,
      points: curvesOf(this.model, this.layout),
      colours: this.colours(),
    };
    const focused = document.activeElement?.dataset?.id;
    this.axes.build(this.model, this.layout);
    this.nodes.build(this.scene);
    if (this.untouched) this.fit();
    this.settle();
    if (focused) this.nodes.focus(focused);
  }

  /** Show the whole picture, or where columns would become too narrow its right end, with the outputs. */
  fit() {
    const { layout } = this;
    const roomX = this.width - LEFT - RIGHT;
    const column = layout.width / layout.columns.length;
    const depth = this.axes.depthFor(column * layout.scale);
    const roomY = this.height - this.head - depth;
    const k = Math.min(layout.scale, Math.max(LEAST, roomY / layout.height));
    const left = LEFT + Math.max(0, (roomX - k * layout.width) / 2);
    const x = k * layout.width > roomX ? this.width - RIGHT - k * layout.width : left;
    this.view = { k, x, y: this.head + Math.max(0, (roomY - k * layout.height) / 2) };
    this.untouched = true;
  }

  follow() {
    const { layout, view } = this;
    this.bottom = this.axes.depthFor((view.k * layout.width) / layout.columns.length);
    this.canvas.follow(view);
    this.nodes.follow(view);
    this.axes.follow(view, this.width, this.height, this.bottom);
    clearTimeout(this.resting);
    this.resting = setTimeout(() => this.settle(), REST);
    if (this.canvas.outgrown(view) && !this.painting) this.paint();
  }

  paint() {
    this.painting = true;
    this.canvas.paint(this.scene, this.view, () => {
      this.painting = false;
      this.canvas.follow(this.view);
      this.stage.dataset.painted = String(Number(this.stage.dataset.painted ?? 0) + 1);
    });
  }

  settle() {
    clearTimeout(this.resting);
    const { layout, view } = this;
    this.bottom = this.axes.depthFor((view.k * layout.width) / layout.columns.length);
    this.paint();
    this.canvas.follow(view);
    this.nodes.settle(view);
    this.axes.follow(view, this.width, this.height, this.bottom);
    this.mark();
  }

  /** Show what is clicked, pinned, found and under the pointer. */
  mark() {
    if (!this.scene) return;
    const { state, model } = this;
    this.nodes.mark(state, this.hits);
    const clicked = model.graph.byId.get(state.clicked)?.index ?? -1;
    const clickedEdge = state.edge ? model.graph.edgeNames.get(state.edge) : -1;
    const node = this.hover.node >= 0 ? this.hover.node : clicked;
    const edge = this.hover.edge >= 0 ? this.hover.edge : this.hover.node >= 0 ? -1 : clickedEdge;
    const flow = node >= 0 && model.hasNode[node] ? this.flowOf(node) : null;
    const only = edge >= 0 && model.hasEdge[edge] ? edge : -1;
    const ends = only >= 0 ? [model.graph.source[only], model.graph.target[only]] : [];
    this.canvas.light(this.scene, this.view, flow, only);
    this.canvas.follow(this.view);
    const alone = only >= 0 && !flow ? { nodes: new Float64Array(model.graph.nodes.length) } : null;
    this.nodes.light(flow ?? alone, ends);
    const lit = only >= 0 ? [only] : flow ? this.canvas.shown.filter((one) => flow.edges[one] > 0.02) : model.edges;
    this.nodes.names.over(lit, model.graph.byId.get(state.clicked));
    this.stage.classList.toggle("focused", Boolean(flow) || only >= 0);
    const at = [...ends, ...(node >= 0 ? [node] : [])].map((index) => model.graph.nodes[index].position);
    this.axes.light(new Set(at));
  }

  flowOf(node) {
    const key = `${node} ${this.state.linkType}`;
    if (this.lastFlow?.key !== key || this.lastFlow.share !== this.model.share) {
      this.lastFlow = { key, share: this.model.share, flow: this.model.flow(node) };
    }
    return this.lastFlow.flow;
  }

  zoomBy(factor, x = this.width / 2, y = this.height / 2) {
    const k = Math.min(MOST, Math.max(LEAST, this.view.k * factor));
    const ratio = k / this.view.k;
    this.view = { k, x: x - (x - this.view.x) * ratio, y: y - (y - this.view.y) * ratio };
    this.untouched = false;
    this.move();
  }

  panBy(x, y) {
    this.view = { ...this.view, x: this.view.x + x, y: this.view.y + y };
    this.untouched = false;
    this.move();
  }

  /** Move a node into sight where it is not. */
  reveal(index) {
    const [x, y] = [this.view.x + this.view.k * this.layout.x[index], this.view.y + this.view.k * this.layout.y[index]];
    const across = x < LEFT + 10 ? LEFT + 60 - x : x > this.width - 20 ? this.width - 80 - x : 0;
    const low = this.height - this.bottom - 20;
    const down = y < 20 ? 60 - y : y > low ? low - 40 - y : 0;
    if (across || down) this.panBy(across, down);
  }

  zoomButtons() {
    const button = (text, name, act) =>
      h("button", { type: "button", "aria-label": name, title: name, on: { click: act } }, text);
    byId("zoom").append(
      button("+", "Zoom in", () => this.zoomBy(1.4)),
      button("−", "Zoom out", () => this.zoomBy(1 / 1.4)),
      button("⤢", "Show all", () => {
        this.fit();
        this.settle();
      }),
    );
  }

  listen() {
    const { stage } = this;
    stage.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    stage.addEventListener("pointerdown", (event) => this.down(event));
    stage.addEventListener("pointermove", (event) => this.moved(event));
    stage.addEventListener("pointerup", (event) => this.up(event));
    stage.addEventListener("pointercancel", (event) => this.pointers.delete(event.pointerId));
    stage.addEventListener("pointerleave", () => this.leave());
    stage.addEventListener("dblclick", (event) => this.zoomBy(1.8, ...this.at(event)));
    // Focusing a node may scroll the box around it, which would tear the layers apart.
    stage.addEventListener("scroll", () => stage.scrollTo(0, 0));
  }

  at(event) {
    const box = this.stage.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  wheel(event) {
    event.preventDefault();
    const size = event.deltaMode ? 20 : 1;
    if (event.shiftKey) this.panBy(-event.deltaY * size - event.deltaX * size, 0);
    else this.zoomBy(Math.exp(-Math.max(-60, Math.min(60, event.deltaY * size)) * 0.006), ...this.at(event));
  }

  down(event) {
    if (event.button > 0) return;
    this.pointers.set(event.pointerId, this.at(event));
    this.pressed = {
      at: this.at(event),
      node: event.target.closest?.(".node")?.dataset.id,
      moved: false,
      shift: event.shiftKey,
    };
  }

  moved(event) {
    const [x, y] = this.at(event);
    const before = this.pointers.get(event.pointerId);
    if (!before) {
      this.last = { x, y, target: event.target, clientX: event.clientX, clientY: event.clientY };
      this.pointAtFrame();
      return;
    }
    if (this.pointers.size === 2) this.pinch(event.pointerId, x, y);
    else if (this.pressed && Math.hypot(x - this.pressed.at[0], y - this.pressed.at[1]) > 4) this.pressed.moved = true;
    if (this.pressed?.moved) {
      this.stage.setPointerCapture(event.pointerId);
      this.leave();
      if (this.pointers.size === 1) this.panBy(x - before[0], y - before[1]);
    }
    this.pointers.set(event.pointerId, [x, y]);
  }

  pinch(id, x, y) {
    const [other] = [...this.pointers].filter(([key]) => key !== id).map(([, point]) => point);
    const before = this.pointers.get(id);
    const ratio =
      Math.hypot(x - other[0], y - other[1]) / Math.max(1, Math.hypot(before[0] - other[0], before[1] - other[1]));
    this.pressed.moved = true;
    this.zoomBy(ratio, (x + other[0]) / 2, (y + other[1]) / 2);
  }

  up(event) {
    this.pointers.delete(event.pointerId);
    const { pressed } = this;
    this.pressed = null;
    if (!pressed || pressed.moved) return;
    if (pressed.node) {
      this.nodes.focus(pressed.node);
      if (pressed.shift) this.state.pin(pressed.node);
      else this.state.click(pressed.node);
      return;
    }
    const edge = this.edgeAt(...pressed.at);
    if (edge >= 0) this.state.set({ edge: this.model.graph.edgeName(edge) });
    else this.state.set({ clicked: "", edge: "" });
  }

  /** The edge under a point; where a node is clicked only among those that are lit. */
  edgeAt(x, y) {
    const { view, scene } = this;
    if (y > this.height - this.bottom || x < LEFT) return -1;
    const lit = this.state.clicked && this.canvas.shown.length ? this.canvas.shown : this.model.edges.slice(-1500);
    return nearestEdge(scene.points, lit, (x - view.x) / view.k, (y - view.y) / view.k, 5 / view.k);
  }

  pointAt() {
    if (!this.last || !this.scene) return;
    const { x, y, target } = this.last;
    const id = target.closest?.(".node")?.dataset.id;
    const node = id ? this.model.graph.byId.get(id).index : -1;
    const edge = node < 0 ? this.edgeAt(x, y) : -1;
    const changed = node !== this.hover.node || edge !== this.hover.edge;
    this.hover = { node, edge };
    if (changed) this.mark();
    this.stage.style.cursor = node >= 0 || edge >= 0 ? "pointer" : "";
    this.showTip(node, edge);
  }

  showTip(node, edge) {
    const tip = byId("tooltip");
    tip.hidden = node < 0 && edge < 0;
    if (tip.hidden) return;
    const { model } = this;
    if (node >= 0) {
      const shown = model.graph.nodes[node];
      tip.replaceChildren(
        h("strong", {}, model.fullName(shown)),
        h("span", {}, `at ${model.graph.place(shown.position)}`),
        h("span", { class: "quiet" }, figuresLine(shown)),
      );
    } else {
      const head = model.strongestHead(edge);
      const told = `${signed(model.graph.weight[edge])} · ${percent(model.share[edge])} of the target’s input`;
      tip.replaceChildren(
        h("strong", {}, visible(model.edgeTitle(edge))),
        h("span", {}, told),
        (head && h("span", { class: "quiet" }, `most through ${head}; click to see its attention`)) || "",
      );
    }
    const { clientX, clientY } = this.last;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(6, Math.min(clientX + 14, innerWidth - box.width - 8))}px`;
    tip.style.top = `${clientY + 18 + box.height > innerHeight ? clientY - box.height - 10 : clientY + 18}px`;
  }

  leave() {
    byId("tooltip").hidden = true;
    this.last = null;
    if (this.hover.node < 0 && this.hover.edge < 0) return;
    this.hover = { node: -1, edge: -1 };
    this.mark();
  }

  /** What the pointer does, for a node in a list or in the subgraph. */
  pretendHover(index) {
    this.hover = { node: index, edge: -1 };
    this.mark();
  }
}
