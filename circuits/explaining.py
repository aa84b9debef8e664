"""What a node reads, what an edge carries, by which heads, and why they looked there.

Everything is made of the graph's own numbers and of the prompt laid out again: the ledger of the target, head loadings
and hops, QK attributions, and of each feature the tokens that it gets its input from (`circuits.origins`).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from circuits.assemble import table_numbers
from circuits.errors import CircuitsError
from circuits.graph import STAYS, Graph, Heads, head_name
from circuits.head_steps import part_names, strongest_heads, with_scores
from circuits.loading import Model
from circuits.origins import token_origins
from circuits.prompt import prepare
from circuits.sweep import Sweep
from circuits.targets import Target, TokenTarget
from circuits.tracing import lay_out

READS, WRITES, LOOKS = 8, 5, 3


@dataclass(frozen=True)
class Part:
    """A node, or a named constant, as it is told: its id, where it stands, and the token it gets most from.

    `origin` is that token's position and `share` how much of what the node reads comes from there; -1 where the node is
    no feature.
    """

    id: str
    position: int
    origin: int = -1
    share: float = 0.0


@dataclass(frozen=True)
class Line:
    """An edge: what stands at its other end, its weight, its share of the target's absolute input, and its heads."""

    part: Part
    weight: float
    share: float
    heads: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Meeting:
    """A pair of a QK attribution: what is on the query side and on the key side, at which key, and its weight.

    `at` is the key that the pair scores for. Through frozen attention a node is there on later keys than its own.
    """

    query: Part
    key: Part
    at: int
    weight: float


@dataclass(frozen=True)
class Look:
    """Why one head looked from a query at a key.

    `lead` is the score less the mean of the other keys' scores, weighted with their attention; `pairs` are its
    strongest parts, `score_pairs` those of the score alone. `loading` is what the head carries of the edges that are
    explained. `owner` is the id of the feature whose own pattern it is, "" for the base model's heads.
    """

    layer: int
    head: str
    query: int
    key: int
    attention: float
    score: float
    lead: float
    loading: float
    pairs: tuple[Meeting, ...]
    score_pairs: tuple[Meeting, ...]
    qk_features: tuple[tuple[str, float], ...]
    owner: str = ""

    @property
    def place(self) -> tuple[str, str, int, int]:
        """Which head it is, and where it looks: what one look is told by."""
        return self.head, self.owner, self.query, self.key


@dataclass(frozen=True)
class Link:
    """One step of a chain from tokens to an output: a node, and the heads through which it was reached."""

    part: Part
    weight: float
    heads: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Explanation:
    """See the head of this file. `words` tell it in sentences; `facts` are the subject's own figures by name."""

    subject: str
    facts: dict[str, float]
    reads: tuple[Line, ...]
    writes: tuple[Line, ...]
    first_hops: tuple[tuple[str, float], ...]
    last_hops: tuple[tuple[str, float], ...]
    looks: tuple[Look, ...]
    chain: tuple[Link, ...]
    words: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return asdict(self)


def explain(model: Model, graph: Graph, what: str) -> Explanation:
    """Explain a node or an edge of a graph.

    Parameters
    ----------
    model
        The model that the graph was traced on (`circuits.loading.model_of` finds it).
    what
        A node id, or two joined by `->`: `a2_153_7`, `E_17_3->a2_153_7`.

    Raises
    ------
    CircuitsError
        When the graph has no such node or edge.
    """
    source, target = subject_of(graph, what)
    sweep = lay_out(model, prepare(model.base, graph.token_ids), _targets(graph))
    return _Teller(graph, sweep, model).tell(source, target)


def subject_of(graph: Graph, what: str) -> tuple[int | None, int]:
    """The source, if an edge is meant, and the target or node."""
    places = {name: i for i, name in enumerate(graph.node_ids())}
    names = [name.strip() for name in what.split("->")]
    for name in names:
        if name not in places or len(names) > 2:
            near = [known for known in places if known.split("_")[0] == name.split("_")[0]][:6]
            shown = ", ".join(near or list(places)[:6])
            raise CircuitsError(
                f"{name!r} is no node of this graph; name a node such as {shown}, or an edge as SOURCE->TARGET"
            )
    if len(names) == 1:
        return None, places[names[0]]
    source, target = (places[name] for name in names)
    if not ((graph.edges.source == source) & (graph.edges.target == target)).any():
        raise CircuitsError(
            f"there is no edge from {names[0]} to {names[1]} in this graph; `circuits explain GRAPH {names[1]}` "
            "lists what it reads"
        )
    return source, target


def _targets(graph: Graph) -> list[Target]:
    """The graph's tokens as targets, so that they can be laid out again; other outputs are left out."""
    nodes = graph.nodes
    return [
        TokenTarget(int(nodes.feature[i]), int(nodes.position[i]))
        for i in np.flatnonzero((nodes.kind == "logit") & ~np.isnan(nodes.probability))
    ]


class _Teller:
    """Tells about one graph, with its prompt laid out."""

    def __init__(self, graph: Graph, sweep: Sweep, model: Model) -> None:
        self.graph, self.sweep, self.model = graph, sweep, model
        self.ids = graph.node_ids()
        self.origins = token_origins(sweep)
        self.number = table_numbers(graph, sweep)
        self.parts = {str(name): i for i, name in enumerate(part_names(sweep.table, np.arange(len(sweep.table))))}
        self.strength = np.abs(graph.edges.weight).astype(np.float64)
        self.input = np.bincount(graph.edges.target, weights=self.strength, minlength=len(graph.nodes))

    def tell(self, source: int | None, target: int) -> Explanation:
        """Everything about a node, or about the edge from `source` to it."""
        graph, edges = self.graph, self.graph.edges
        incoming = np.flatnonzero(edges.target == target)
        told = incoming if source is None else incoming[edges.source[incoming] == source]
        subject = self.ids[target] if source is None else f"{self.ids[source]} -> {self.ids[target]}"
        outgoing = np.flatnonzero(edges.source == target) if source is None else np.zeros(0, dtype=np.int64)
        chain, passed = self._chain(source, target)
        looks = self._looks(told)
        told_already = {look.place for look in looks}
        further = (look for look in self._looks(passed) if look.place not in told_already)
        looks += tuple(further)[: LOOKS - len(looks)]
        reads = tuple(self._line(edge, edges.source[edge]) for edge in self._largest(told, READS))
        return Explanation(
            subject=subject,
            facts=self._facts(source, target, told),
            reads=reads,
            writes=tuple(self._line(edge, edges.target[edge]) for edge in self._scored(outgoing, WRITES)),
            first_hops=self._hops(graph.first_hops, told),
            last_hops=self._hops(graph.last_hops, told),
            looks=looks,
            chain=chain,
            words=tuple(self._words(reads, looks, source, target)),
        )

    def part(self, name: str, position: int = -1) -> Part:
        """A node by its id, in the graph or not, or a named constant that stands at `position`."""
        place = self.parts.get(name)
        if place is None:
            number = self.ids.index(name) if name in self.ids else -1
            return Part(name, int(self.graph.nodes.position[number]) if number >= 0 else position)
        at = int(self.sweep.table.position[place])
        if self.sweep.table.dictionary[place] < 0:
            return Part(name, at, at if self.sweep.table.kind[place] == "embedding" else -1, 1.0)
        tokens = self.origins[place, :-1]
        return Part(name, at, int(tokens.argmax()), float(tokens.max()))

    def _facts(self, source: int | None, target: int, told: np.ndarray) -> dict[str, float]:
        nodes, edges = self.graph.nodes, self.graph.edges
        facts = {
            "activation": float(nodes.activation[target]),
            "pre-activation": float(nodes.pre_activation[target]),
            "bias": float(nodes.bias[target]),
            "influence": np.nan if nodes.is_target[target] else float(nodes.influence[target]),
            "predicted effect of ablating": float(nodes.predicted[target]),
            "measured effect of ablating": float(nodes.measured[target]),
        }
        if source is not None:
            weight = float(edges.weight[told[0]])
            facts = {"weight": weight, "share of what the target reads": abs(weight) / max(self.input[target], 1e-30)}
        else:
            kept = float(edges.weight[told].sum())
            facts["sum of its edges"] = kept
            facts["sum of edges left out"] = facts["pre-activation"] - facts["bias"] - kept
        return {name: value for name, value in facts.items() if not np.isnan(value)}

    def _largest(self, edges: np.ndarray, count: int) -> np.ndarray:
        return edges[np.argsort(-self.strength[edges], kind="stable")][:count]

    def _scored(self, edges: np.ndarray, count: int) -> np.ndarray:
        """The edges with the largest share of their targets' input, times the influence of these."""
        nodes, target = self.graph.nodes, self.graph.edges.target
        score = self.strength[edges] / np.maximum(self.input[target[edges]], 1e-30)
        score = score * (nodes.influence + nodes.target_weight)[target[edges]]
        return edges[np.argsort(-score, kind="stable")][:count]

    def _line(self, edge: int, end: int) -> Line:
        target = self.graph.edges.target[edge]
        return Line(
            self.part(self.ids[end]),
            float(self.graph.edges.weight[edge]),
            float(self.strength[edge] / max(self.input[target], 1e-30)),
            self._heads(edge),
        )

    def _heads(self, edge: int) -> tuple[tuple[str, float], ...]:
        """The strongest heads of an edge, keys summed; those of its last hop where attention is frozen."""
        for heads in (self.graph.heads, self.graph.last_hops):
            mine = heads.take((heads.edge == edge) & (heads.head > STAYS))
            if len(mine):
                return _summed(mine)[:3]
        return ()

    def _hops(self, hops: Heads, edges: np.ndarray) -> tuple[tuple[str, float], ...]:
        mine = hops.take(np.isin(hops.edge, edges))
        return _summed(mine, places=True)[:6]

    def _looks(self, edges: np.ndarray) -> tuple[Look, ...]:
        """The heads that carry most of these edges, and why they looked."""
        graph = self.graph
        tables = (graph.heads, graph.first_hops, graph.last_hops)
        able = np.concatenate([strongest_heads(heads).edge for heads in tables])
        crossing = self._largest(edges[np.isin(edges, able)], LOOKS)
        if not len(crossing):
            return ()
        explained = with_scores(graph, self.sweep, self.model.qk, edges=crossing)
        loadings: dict[tuple[int, ...], float] = {}
        for heads in tables:
            mine = strongest_heads(heads.take(np.isin(heads.edge, crossing)))
            for *name, weight in zip(*(c.tolist() for c in (mine.layer, mine.head, mine.query, mine.key, mine.weight))):
                loadings[tuple(name)] = max(loadings.get(tuple(name), 0.0), abs(weight))
        looks = [self._look(explained, i, loadings) for i in range(len(explained.scores))]
        return tuple(sorted(looks, key=lambda look: -look.loading)[:LOOKS])

    def _look(self, graph: Graph, number: int, loadings: dict[tuple[int, ...], float]) -> Look:
        scores, pairs = graph.scores, graph.pairs.take(graph.pairs.score == number)
        layer, head, query, key = (
            int(column[number]) for column in (scores.layer, scores.head, scores.query, scores.key)
        )

        def meetings(form: str) -> tuple[Meeting, ...]:
            mine = pairs.take(pairs.form == form)
            rows = zip(mine.query_node.tolist(), mine.key_node.tolist(), mine.key.tolist(), mine.weight.tolist())
            return tuple(Meeting(self.part(q, query), self.part(k, at), at, w) for q, k, at, w in rows)

        features = pairs.take(pairs.form == "qk_feature")
        return Look(
            layer=layer,
            head=head_name(head, layer=layer),
            query=query,
            key=key,
            attention=float(scores.attention[number]),
            score=float(scores.score[number]),
            lead=float(scores.lead[number]),
            loading=loadings.get((layer, head, query, key), 0.0),
            pairs=meetings("lead"),
            score_pairs=meetings("score"),
            qk_features=tuple(zip(features.key_node.tolist(), features.weight.tolist())),
            owner=str(scores.owner[number]),
        )

    def _chain(self, source: int | None, target: int) -> tuple[tuple[Link, ...], np.ndarray]:
        """From a token through the subject to an output, by the strongest edge at every step; and these edges."""
        edges, nodes = self.graph.edges, self.graph.nodes
        below, at = [], target
        while True:
            incoming = np.flatnonzero((edges.target == at) & ~nodes.is_error[edges.source])
            if source is not None and at == target:
                incoming = incoming[edges.source[incoming] == source]
            if not len(incoming):
                break
            chosen = int(self._largest(incoming, 1)[0])
            below.append((at, chosen))
            at = int(edges.source[chosen])
        links = [Link(self.part(self.ids[at]), 0.0, ())]
        for node, edge in reversed(below):
            links.append(Link(self.part(self.ids[node]), float(edges.weight[edge]), self._heads(edge)))
        at, passed = target, [edge for _, edge in below]
        while len(outgoing := np.flatnonzero(edges.source == at)):
            edge = int(self._scored(outgoing, 1)[0])
            at = int(edges.target[edge])
            passed.append(edge)
            links.append(Link(self.part(self.ids[at]), float(edges.weight[edge]), self._heads(edge)))
        return tuple(links), np.array(passed, dtype=np.int64)

    def _words(self, reads: Sequence[Line], looks: Sequence[Look], source: int | None, target: int) -> list[str]:
        from circuits.story import tell_looks, tell_reads

        return [*tell_reads(self.graph, reads, self.ids[target], source), *tell_looks(self.graph, looks)]


def _summed(heads: Heads, *, places: bool = False) -> tuple[tuple[str, float], ...]:
    """Heads by name with their summed loadings, the strongest first; with `places`, from and to which position."""
    sums: dict[str, float] = {}
    for layer, head, key, query, weight in zip(
        *(column.tolist() for column in (heads.layer, heads.head, heads.key, heads.query, heads.weight)), strict=True
    ):
        name = head_name(head, layer=layer if layer >= 0 else None)
        if places and head > STAYS:
            name += f" {key}->{query}"
        sums[name] = sums.get(name, 0.0) + weight
    return tuple(sorted(sums.items(), key=lambda item: -abs(item[1])))
