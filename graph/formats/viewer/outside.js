// A page around this one (that of `circuits serve`) hears what is open and grouped. It asks nothing and gets no data but
// annotations; a page that stands alone tells nobody.

export function tellOutside(app) {
  if (parent === window) return;
  const { state, model } = app;
  const node = model.graph.byId.get(state.clicked);
  const open = node && {
    id: node.id,
    name: `${model.fullName(node)} at ${model.graph.place(node.position)}`,
    kind: node.kind,
    dictionary: node.dictionary,
    feature: node.isFeature ? { number: node.feature } : null,
  };
  const groups = state.groups.map(({ name, ids }) => ({ name, ids }));
  const message = { circuits: "state", node: open ?? null, group: app.group?.name ?? "", groups, qParams: state.qParams() };
  parent.postMessage(message, "*");
}
