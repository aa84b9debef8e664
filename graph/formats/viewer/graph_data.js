// The graph as the page works with it, read from graph.json (see graph/formats/json_file.py).

import { quoted, tokenText, visible } from "./dom.js";

export const FEATURES = new Set(["value_feature", "mtc_key", "attention_feature", "mtc_query", "mlp_feature"]);
export const ERRORS = new Set(["value_error", "attention_error", "mlp_error", "block_error"]);
// Within a layer above its values, from below; see `depth` in graph/influence.py.
const STEPS = {
  mtc_key: 2,
  attention_feature: 3,
  mtc_query: 3,
  attention_error: 3,
  mlp_feature: 4,
  mlp_error: 4,
  block_error: 4,
};
export const STAYS = -3;
const SPECIAL_HEADS = { "-1": "id", "-2": "own", "-3": "stays", "-4": "rest" };
export const KIND_NAMES = {
  embedding: "token",
  value_feature: "value",
  value_error: "value error",
  mtc_key: "MTC key",
  attention_feature: "attention",
  mtc_query: "MTC query",
  attention_error: "attention error",
  mlp_feature: "MLP",
  mlp_error: "MLP error",
  block_error: "block error",
  logit: "output",
};
const CONSTANTS = { bias: "biases", position: "position embedding", first: "what the first position writes" };
const PREFIXES = { v: "value", k: "mtc_key", a: "attention", q: "mtc_query", r: "block", "": "mlp" };

/** `L2H5`, `L2 id`, `stays`: as `head_name` of graph/tables.py. */
export function headName(layer, head) {
  const name = SPECIAL_HEADS[head];
  if (name === undefined) return `L${layer}H${head}`;
  return head <= STAYS ? name : `L${layer} ${name}`;
}

const number = (value) => (value === null || value === undefined ? NaN : value);

function readNode(raw, index) {
  const kind = raw.kind;
  return {
    index,
    id: raw.node_id,
    kind,
    layer: raw.model_layer,
    position: raw.ctx_idx,
    feature: raw.feature_index,
    dictionary: raw.dictionary,
    activation: number(raw.activation),
    preActivation: number(raw.pre_activation),
    bias: number(raw.bias),
    influence: raw.node_influence,
    cumulative: raw.influence,
    targetWeight: raw.target_weight,
    probability: number(raw.probability),
    predicted: number(raw.predicted),
    measured: number(raw.measured),
    label: raw.label,
    isFeature: FEATURES.has(kind),
    isError: ERRORS.has(kind),
    isTarget: kind === "logit" || raw.target_weight > 0,
    depth: kind === "embedding" ? 0 : 4 * raw.model_layer + (STEPS[kind] ?? 1),
  };
}

export class GraphData {
  constructor(content, pages) {
    this.prompt = content.graph.prompt;
    this.tokens = content.graph.tokens;
    this.nLayers = content.graph.n_layers;
    this.metadata = content.metadata;
    this.ownKeys = new Set(content.graph.metadata_keys);
    this.qParams = content.qParams ?? {};
    this.nodes = content.nodes.map(readNode);
    this.byId = new Map(this.nodes.map((node) => [node.id, node]));
    const links = content.links;
    this.source = Int32Array.from(links, (link) => this.byId.get(link.source).index);
    this.target = Int32Array.from(links, (link) => this.byId.get(link.target).index);
    this.weight = Float32Array.from(links, (link) => link.weight);
    this.heads = links.map((link) => link.heads ?? []);
    this.firstHops = links.map((link) => link.first_hops ?? []);
    this.lastHops = links.map((link) => link.last_hops ?? []);
    this.patterns = new Map(Object.entries(content.patterns));
    this.scores = new Map();
    for (const score of content.qk ?? []) this.scores.set(scoreKey(score), score);
    this.pages = new Map(pages.map((page) => [`${page.dictionary}/${page.feature}`, page]));
    this.edgeNames = new Map(links.map((link, edge) => [`${link.source}->${link.target}`, edge]));
  }

  /** Whether heads carry the edge between two positions, or from the key side to the query side of a feature. */
  crosses(edge) {
    const source = this.nodes[this.source[edge]];
    return source.position !== this.nodes[this.target[edge]].position || source.kind === "mtc_key";
  }

  mediated(edge) {
    return this.heads[edge].length + this.firstHops[edge].length > 0;
  }

  edgeName(edge) {
    return `${this.nodes[this.source[edge]].id}->${this.nodes[this.target[edge]].id}`;
  }

  score(layer, head, query, key, owner) {
    return this.scores.get(scoreKey({ layer, head, query, key, owner: head === -2 ? owner : "" }));
  }

  page(node) {
    return this.pages.get(`${node.dictionary}/${node.feature}`);
  }

  /** `14 “ to”` */
  place(position) {
    return `${position} ${quoted(this.tokens[position])}`;
  }

  /** `attention L2 #153`, `token “ Mary”`: what a node is, without where it stands. */
  name(node) {
    if (node.kind === "embedding") return `token ${quoted(this.tokens[node.position])}`;
    if (node.kind === "logit") return `output ${quoted(node.label)}`;
    const place = `${KIND_NAMES[node.kind]} L${node.layer}`;
    return node.isError ? place : `${place} #${node.feature}`;
  }

  /** The same for an id that pruning may have left out of the graph, or a constant of a score. */
  nameOfId(id) {
    if (CONSTANTS[id]) return CONSTANTS[id];
    const node = this.byId.get(id);
    if (node) return this.name(node);
    const [site, feature, position] = id.split("_");
    if (site === "E") return `token ${quoted(this.tokens[Number(position)] ?? "")}`;
    const found = /^([a-z]?)(\d+)$/.exec(site);
    if (!found || PREFIXES[found[1]] === undefined) return visible(id);
    const kind = PREFIXES[found[1]];
    const what = KIND_NAMES[kind] ?? (kind === "mlp" ? "MLP" : kind);
    return feature === "error" ? `${what} error L${found[2]}` : `${what} L${found[2]} #${feature}`;
  }

  /** Where the node of an id stands, NaN for constants. */
  positionOfId(id) {
    return CONSTANTS[id] ? NaN : Number(id.split("_")[2]);
  }

  tokenText(position) {
    return tokenText(this.tokens[position]);
  }
}

function scoreKey(score) {
  return [score.layer, score.head, score.query, score.key, score.owner].join(" ");
}
