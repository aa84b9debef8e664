// The picture by keyboard: one tab stop, arrows between nodes, and the strongest edges up and down.

const TYPING = new Set(["INPUT", "SELECT", "TEXTAREA"]);

export function listenToKeys(app, search) {
  const { viewport, state } = app;
  document.addEventListener("keydown", (event) => {
    if (TYPING.has(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") {
      event.preventDefault();
      search.focus();
    } else if (event.key === "Escape") state.set({ clicked: "", edge: "" });
    else if (event.key === "+" || event.key === "=") viewport.zoomBy(1.4);
    else if (event.key === "-") viewport.zoomBy(1 / 1.4);
    else if (event.key === "0" && event.target.tagName !== "BUTTON") {
      viewport.fit();
      viewport.settle();
    }
  });
  viewport.nodes.svg.addEventListener("keydown", (event) => {
    const id = event.target.dataset?.id;
    if (!id || event.ctrlKey || event.metaKey || event.altKey) return;
    const node = viewport.model.graph.byId.get(id);
    const act = actions(app, node)[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });
  viewport.nodes.svg.addEventListener("focusin", (event) => {
    const node = viewport.model.graph.byId.get(event.target.dataset?.id);
    if (!node) return;
    viewport.reveal(node.index);
    if (event.target.matches(":focus-visible")) viewport.pretendHover(node.index);
  });
  viewport.nodes.svg.addEventListener("focusout", () => viewport.leave());
}

function actions(app, node) {
  const { viewport, state } = app;
  const to = (other) => other && viewport.nodes.focus(other.id);
  const { model } = viewport;
  const end = (edges, side) => edges.length && model.graph.nodes[model.graph[side][edges[0]]];
  const open = () => app.open(node.id);
  return {
    ArrowLeft: () => to(neighbour(viewport, node, -1, 0)),
    ArrowRight: () => to(neighbour(viewport, node, 1, 0)),
    ArrowUp: () => to(neighbour(viewport, node, 0, -1)),
    ArrowDown: () => to(neighbour(viewport, node, 0, 1)),
    Enter: open,
    " ": open,
    p: () => state.pin(node.id),
    i: () => to(end(model.inputs[node.index], "source")),
    o: () => to(end(model.outputs[node.index], "target")),
  };
}

/** The nearest node in a direction; what lies aside counts more than what lies ahead. */
function neighbour(viewport, node, dx, dy) {
  const { layout, model } = viewport;
  let [best, least] = [null, Infinity];
  for (const other of model.nodes) {
    const x = layout.x[other.index] - layout.x[node.index];
    const y = layout.y[other.index] - layout.y[node.index];
    const ahead = x * dx + y * dy;
    if (ahead < 2) continue;
    const cost = ahead + 3 * Math.abs(dx ? y : x);
    if (cost < least) [best, least] = [other, cost];
  }
  return best;
}
