// Changes in words.

import { visible } from "./dom.js";

/** `ablated a1_1360_14, 0_error_3 · 2 times 1_7_4` */
export function changeWords(changes) {
  const groups = new Map();
  for (const { node, how, value } of changes) {
    const name = how === "ablate" ? "ablated" : `${value} times`;
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(visible(node).split("@")[0]);
  }
  return [...groups]
    .map(([name, nodes]) => `${name} ${nodes.slice(0, 6).join(", ")}${nodes.length > 6 ? ` and ${nodes.length - 6} more` : ""}`)
    .join(" · ");
}
