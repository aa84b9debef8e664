// The annotated graph as files: the subgraph's picture as SVG or PNG, and all of it as graph.json with its annotations.

import { byId, h, s, visible } from "./dom.js";

const WIDTH = 900; // of the exported picture, in pixels
const HEAD = 44;

function download(blob, name) {
  const url = URL.createObjectURL(blob);
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

/** graph.json as it was, with the annotations of now: everything else to the byte. */
export function annotatedJson(state) {
  // The page writes "<" as an escape; a backslash that is itself escaped begins none.
  const text = byId("graph-data").textContent.replace(/\\\\|\\u003c/g, (found) => (found === "\\u003c" ? "<" : found));
  const params = JSON.stringify(state.qParams());
  return text.replace(/^"qParams": .*,$/m, () => `"qParams": ${params},`);
}

/** The subgraph as an SVG document that needs nothing beside it. */
function standaloneSvg(app) {
  const { svg, size } = app.subgraph.picture(WIDTH);
  const look = app.subgraph.colours();
  const font = getComputedStyle(document.body).fontFamily.replaceAll('"', "'");
  const height = size.height + HEAD;
  const inside = [...svg.childNodes];
  inside.forEach((group) => group.removeAttribute("aria-hidden"));
  for (const handle of svg.querySelectorAll(".handle")) handle.remove();
  for (const card of svg.querySelectorAll(".card"))
    for (const name of ["tabindex", "role", "aria-pressed", "data-item"]) card.removeAttribute(name);
  const title = visible(app.model.graph.prompt);
  const shown = [...title].length > 110 ? [...title].slice(0, 109).join("") + "…" : title;
  const whole = s(
    "svg",
    { width: WIDTH, height, viewBox: `0 0 ${WIDTH} ${height}`, role: "img" },
    s("title", {}, `Subgraph of “${title}”`),
    s("rect", { width: WIDTH, height, fill: look.paper }),
    s("text", { x: 12, y: 26, "font-size": 13, "font-weight": 600, "font-family": font, fill: look.ink }, `“${shown}”`),
    s("g", { transform: `translate(0 ${HEAD - 6})` }, inside),
  );
  return { text: new XMLSerializer().serializeToString(whole), width: WIDTH, height };
}

async function png(app) {
  const { text, width, height } = standaloneSvg(app);
  const url = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
  const picture = new Image();
  picture.src = url;
  await picture.decode();
  const canvas = h("canvas", { width: 2 * width, height: 2 * height });
  canvas.getContext("2d").drawImage(picture, 0, 0, 2 * width, 2 * height);
  URL.revokeObjectURL(url);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

/** Buttons that save, and one that takes the annotations of a saved graph.json. */
export function exportButtons(app) {
  const slug =
    String(app.model.graph.metadata.slug ?? "graph")
      .replace(/[^a-z0-9-]+/gi, "-")
      .slice(0, 60) || "graph";
  const button = (name, title, act) => h("button", { type: "button", title, on: { click: act } }, name);
  return [
    button("SVG", "Save the subgraph as SVG", () =>
      download(new Blob([standaloneSvg(app).text], { type: "image/svg+xml" }), `${slug}.svg`),
    ),
    button("PNG", "Save the subgraph as PNG", async () => download(await png(app), `${slug}.png`)),
    button("JSON", "Save the graph with its annotations; circuits and Neuronpedia read it", () =>
      download(new Blob([annotatedJson(app.state)], { type: "application/json" }), `${slug}.json`),
    ),
  ];
}

/** A line to open the annotations of a graph.json that was saved here. */
export function loadButton(app) {
  const input = h("input", {
    type: "file",
    accept: ".json,application/json",
    class: "unseen",
    tabindex: -1,
    "aria-hidden": "true",
  });
  input.addEventListener("change", async () => {
    const [file] = input.files;
    input.value = "";
    if (!file) return;
    try {
      const { qParams } = JSON.parse(await file.text());
      if (typeof qParams !== "object" || qParams === null) throw new TypeError("no qParams");
      app.state.read(qParams);
      app.state.set({
        pinned: app.state.pinned,
        groups: app.state.groups,
        nodeThreshold: app.state.nodeThreshold,
        clicked: app.state.clicked,
      });
      app.say(`Loaded ${app.state.pinned.length} pinned nodes`);
    } catch {
      app.say(`${visible(file.name)} is no graph.json with annotations`);
    }
  });
  return [
    h(
      "button",
      { type: "button", title: "Load the annotations of a saved graph.json", on: { click: () => input.click() } },
      "Load",
    ),
    input,
  ];
}
