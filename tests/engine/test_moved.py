"""Features that move between positions: what their head loadings are by definition, and facts built by hand.

Loadings are written out with loops from patterns, activations and weights; the figures of `circuits.evaluation` with a
forward pass of the replaced model of one document at a time, in float64.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from plain_attention import IDENTITY, OWN, arrived, encoded, gated, own_patterns, strongest, with_identity
from plain_reference import Place, Reference
from tiny_models import CASES, N_HEADS, Case, Key, build, in_memory, keys
from tiny_replacements import MOVED_KINDS
from torch import Tensor

import circuits
from circuits.evaluation import cross_entropy, dictionary_figures
from circuits.graph import Graph
from circuits.loading import Model
from circuits.replacements import Decoder, Dictionary, Site
from circuits.replacements.movement import HeadLoading, OwnAttention

UNPRUNED = circuits.TraceSettings(left_out=0.0, unpruned=True)
Loading = tuple[int, int, int, int]  # layer, head, key position, query position


@cache
def traced(name: str) -> tuple[Graph, Reference, dict[tuple[Key, Key], dict[Loading, float]]]:
    """A case's whole graph, its reference with the graph's logits, and its loadings by edge."""
    case, model = CASES[name], build(CASES[name])
    graph = circuits.trace(model, case.token_ids, settings=UNPRUNED)
    reference = Reference(model.base.lm, model.replacements, case.token_ids, special=case.special)
    names = keys(graph)
    for kind, _, position, token in names:
        if kind == "logit":
            reference.add_token_target(token, position)
    table: dict[tuple[Key, Key], dict[Loading, float]] = {}
    h = graph.heads
    rows = zip(h.edge, h.layer.tolist(), h.head.tolist(), h.key.tolist(), h.query.tolist(), h.weight.tolist())
    for edge, *place, weight in rows:
        pair = names[graph.edges.source[edge]], names[graph.edges.target[edge]]
        table.setdefault(pair, {})[tuple(place)] = weight  # type: ignore[index]
    return graph, reference, table


def assert_loadings(found: dict[Loading, float], expected: dict[Loading, float], largest: float) -> None:
    """Both agree; what one of them leaves out is nothing."""
    for place in found.keys() | expected.keys():
        assert found.get(place, 0.0) == pytest.approx(expected.get(place, 0.0), abs=1e-5 * largest)


# --- loadings by definition ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["gpt2_mtc", "llama_mtc_top4", "gpt2_mtc_single_skip", "llama_mctc_clt", "llama_residual_all"]
)
def test_edges_between_the_sides_of_an_mtc(name: str) -> None:
    """`alpha_fh A_lh[p, s] a_f[s]` a head and `alpha_f,id a_f[s]` at s = p; the key side is the only source."""
    graph, reference, table = traced(name)
    seen: set[tuple[Key, Key]] = set()
    largest = float(np.abs(graph.heads.weight).max())
    for query in (key for key in reference.targets if key[0] == "mtc_query"):
        _, layer, p, feature = query
        movement = reference.owners[query].moved_by
        assert isinstance(movement, HeadLoading)
        alpha = movement.weights[feature].double()
        for key in (key for key in reference.targets if key[:2] == ("mtc_key", layer) and key[3] == feature):
            s, activation = key[2], reference.targets[key].pre_activation
            if s > p:
                continue
            expected = {(layer, h, s, p): float(alpha[h] * reference.patterns[layer][h, p, s]) for h in range(N_HEADS)}
            if s == p:
                expected[layer, IDENTITY, s, p] = float(alpha[-1])
            expected = {place: share * activation for place, share in expected.items()}
            assert_loadings(table.get((key, query), {}), expected, largest)
            seen.add((key, query))
    assert len(seen) > 50
    assert {pair for pair in table if pair[1][0] == "mtc_query"} <= seen


@pytest.mark.parametrize("name", ["gpt2_mtc_ranks", "llama_mtc_ranks"])
def test_edges_between_the_sides_of_a_feature_that_moves_vectors(name: str) -> None:
    """Key side to query side is `P_f[p, s] a_f[s] . u`, u the unit vector of what arrives; heads share it out."""
    graph, reference, table = traced(name)
    checked = 0
    for query in (key for key in reference.targets if key[0] == "mtc_query"):
        _, layer, p, feature = query
        dictionary = reference.owners[query]
        movement = dictionary.moved_by
        assert isinstance(movement, HeadLoading)
        moved = reference.moved[dictionary.name]
        alpha, pattern = movement.weights[feature].double(), with_identity(reference.patterns[layer])
        arrives = sum(alpha[h] * pattern[h, p, s] * moved[s, feature] for h in range(len(alpha)) for s in range(p + 1))
        assert reference.targets[query].pre_activation == pytest.approx(
            float(arrives.norm() if dictionary.rank > 1 else arrives), rel=1e-9
        )
        reader = arrives / arrives.norm() if dictionary.rank > 1 else torch.ones(1).double()
        for s in range(reference.first, p + 1):
            expected = {
                (layer, h if h < N_HEADS else IDENTITY, s, p): float(
                    alpha[h] * pattern[h, p, s] * moved[s, feature] @ reader
                )
                for h in range(len(alpha))
            }
            found = table.get((("mtc_key", layer, s, feature), query), {})
            assert_loadings(found, expected, float(np.abs(graph.heads.weight).max()))
            checked += any(found.values())
    assert checked > 100


def test_edges_through_a_pattern_of_its_own() -> None:
    """A Lorsa feature of layer 0 reads a token at s by `A_g[p, s] E_f N(embedding)`, head -2; position 0 included."""
    graph, reference, table = traced("llama_lorsa")
    largest = float(np.abs(graph.heads.weight).max())
    checked = 0
    for target in (key for key in reference.targets if key[:2] == ("attention_feature", 0)):
        _, _, p, feature = target
        dictionary = reference.owners[target]
        assert isinstance(dictionary.moved_by, OwnAttention)
        pattern = own_patterns(dictionary.moved_by, reference.recorded.attention_input[0])
        for s, token in enumerate(reference.ids):
            row = reference.weights.embedding[token] * reference.weights.norm_weights("attention", 0)[0]
            read = dictionary.W_enc[feature].double() @ row / reference.scales["attention", 0][s, 0]
            expected = (
                {(0, OWN, s, p): float(pattern[dictionary.moved_by.group[feature], p, s] * read)} if s <= p else {}
            )
            assert_loadings(table.get((("embedding", -1, s, token), target), {}), expected, largest)
            checked += s <= p
    assert checked > 50


@pytest.mark.parametrize("name", ["gpt2_value", "llama_value", "llama_value_over_frozen", "gpt2_mixed"])
def test_edges_of_values_carry_the_heads_that_move_them(name: str) -> None:
    """Scale one entry A_h[p, s] of the heads that move values: its derivative, for one source, is the loading."""
    graph, reference, table = traced(name)
    values = ("value_feature", "value_error")
    pairs = sorted(pair for pair in table if pair[0][0] in values)
    largest = float(np.abs(graph.heads.weight).max())
    random = np.random.default_rng(7)
    for i in random.choice(len(pairs), 40, replace=False):
        source, target = pairs[i]
        scale = torch.ones_like(reference.patterns[source[1]], requires_grad=True)
        patterns = {source[1]: reference.patterns[source[1]] * scale}
        read = reference.targets[target].read
        there = read(reference.run(reference.nothing(), patterns))
        (found,) = torch.autograd.grad(there - read(reference.without([source], patterns)), scale)
        expected = {(source[1], h, s, p): float(found[h, p, s]) for h, p, s in found.nonzero().tolist()}
        assert expected
        assert_loadings(table[source, target], expected, largest)


# --- facts built by hand ------------------------------------------------------------------------------------------


def changed(model: Model, name: str, **changes: object) -> Model:
    """The model with one dictionary changed."""
    replacements = [
        replace(r, dictionaries=tuple(replace(d, **changes) if d.name == name else d for d in r.dictionaries))  # type: ignore[arg-type]
        for r in model.replacements
    ]
    return Model(model.base, tuple(replacements))


def of_kind(graph: Graph, kind: str, layer: int) -> set[tuple[int, int]]:
    """(position, feature) of the nodes of a kind in a layer."""
    return {(p, f) for k, at, p, f in keys(graph) if (k, at) == (kind, layer)}


def test_without_the_identity_nothing_stays_where_it_is() -> None:
    """With its column zero no loading names the identity; the others of that layer are as they were."""
    case, model = CASES["gpt2_mtc"], build(CASES["gpt2_mtc"])
    (mtc,) = (d for r in model.replacements for d in r.dictionaries if d.name == "mtc.1")
    assert isinstance(mtc.moved_by, HeadLoading)
    weights = mtc.moved_by.weights.clone()
    weights[:, -1] = 0.0
    graphs = []
    for given in (model, changed(model, "mtc.1", moved_by=HeadLoading(weights))):
        graph = circuits.trace(given, case.token_ids, settings=UNPRUNED)
        names, h = keys(graph), graph.heads
        graphs.append({
            (names[graph.edges.source[e]], names[graph.edges.target[e]], int(head), int(s)): float(w)
            for e, layer, head, s, w in zip(h.edge, h.layer, h.head, h.key, h.weight, strict=True)
            if layer == 1 and w
        })  # fmt: skip
    assert any(head == IDENTITY for _, _, head, _ in graphs[0])
    assert not any(head == IDENTITY for _, _, head, _ in graphs[1])
    assert graphs[1] == pytest.approx({key: w for key, w in graphs[0].items() if key[2] != IDENTITY})


def test_only_the_strongest_features_of_a_context_move() -> None:
    """Each k drops the feature with the least activation summed over the context, the first position included."""
    case, model = CASES["gpt2_mtc"], build(CASES["gpt2_mtc"])
    (mtc,) = (d for r in model.replacements for d in r.dictionaries if d.name == "mtc.1")
    assert isinstance(mtc.moved_by, HeadLoading)
    reference = Reference(model.base.lm, model.replacements, case.token_ids, special=case.special)
    total = reference.moved["mtc.1"][..., 0].sum(0)
    order = total.argsort(descending=True).tolist()
    n_active = int((total > 0).sum())
    first_alone = reference.moved["mtc.1"][1:, :, 0].sum(0).argsort(descending=True).tolist()
    assert first_alone[:n_active] != order[:n_active]
    nodes = {}
    for k in range(1, n_active + 2):
        given = changed(model, "mtc.1", moved_by=HeadLoading(mtc.moved_by.weights, k))
        graph = circuits.trace(given, case.token_ids, settings=UNPRUNED)
        nodes[k] = of_kind(graph, "mtc_key", 1) | of_kind(graph, "mtc_query", 1)
        assert {f for _, f in nodes[k]} <= set(order[:k])
        assert order[k - 1 if k <= n_active else 0] in {f for _, f in nodes[k]}
        assert graph.metadata["ledger"]["max_relative_gap"] < 2e-5
    assert nodes[n_active] == nodes[n_active + 1]
    assert len(nodes[n_active - 1]) < len(nodes[n_active])


def test_a_residual_target_drops_what_reads_inside_its_block() -> None:
    """Nodes that read there are gone; past it go only writes of earlier nodes to sites above it."""
    case = CASES["llama_residual_weakly_causal"]
    model = build(case)
    graph = circuits.trace(model, case.token_ids, settings=UNPRUNED)
    kinds = {(kind, layer) for kind, layer, _, _ in keys(graph)}
    inside = {"mlp_feature", "attention_feature", "mlp_error", "attention_error", "value_feature"}
    assert not {(kind, layer) for kind, layer in kinds if layer == 1} & {(kind, 1) for kind in inside}
    assert {("block_error", 1), ("mtc_key", 1), ("mtc_query", 1), ("mlp_feature", 0), ("attention_feature", 2)} <= kinds
    assert len(of_kind(graph, "block_error", 1)) == len(case.token_ids) - 1
    names = keys(graph)
    writes_above = {"mlp_feature", "attention_feature"}
    past = [
        (names[s], names[t])
        for s, t, w in zip(graph.edges.source, graph.edges.target, graph.edges.weight, strict=True)
        if w and names[t][1] > 1 and names[s][1] < 1
    ]
    assert past
    assert {source[0] for source, _ in past} <= writes_above


def test_a_block_error_is_what_the_reconstruction_misses() -> None:
    """It writes the recorded stream after the block, less the decoders and the output bias."""
    case = CASES["llama_residual_all"]
    model = build(case)
    reference = Reference(model.base.lm, model.replacements, case.token_ids, special=case.special)
    with torch.no_grad():
        streams = model.base.lm(torch.tensor([case.token_ids]), output_hidden_states=True).hidden_states
    for layer in (0, 1):
        place: Place = ("block", layer)
        (bias,) = (
            d.output_biases[Site("resid_post", layer)]
            for r in model.replacements for d in r.dictionaries if d.layer == layer
        )  # fmt: skip
        for position in range(len(case.token_ids)):
            written = sum(
                s.writes[place] for s in reference.sources.values() if place in s.writes and s.position == position
            )
            torch.testing.assert_close((written + bias).float(), streams[layer + 1][0, position], rtol=1e-4, atol=1e-4)


# --- figures ------------------------------------------------------------------------------------------------------

DOCUMENTS = [(0, 3, 7, 1, 3, 10), (0, 5, 5, 2), (0, 9, 1, 4, 8, 6, 2, 7, 3), (0, 2, 10, 3, 1)]
EVALUATED = [
    "gpt2_mtc", "llama_mtc_top4", "llama_mctc_clt", "gpt2_mctc", "gpt2_residual_middle", "llama_residual_all",
    "gpt2_mtc_ranks", "llama_value", "llama_lorsa", "gpt2_own", "llama_mixed", "gpt2_weakly_causal",
    "llama_weakly_causal_mlp", "llama_residual_weakly_causal", "gpt2_residual_mctc", "llama_type1_alone",
    "gpt2_mtc_single_skip", "llama_mixed_frozen", "qwen3_clt_attn_out", "neox_parallel_mtc", "neox_parallel_skip_z",
    "neox_parallel_weakly_causal", "neox_sequential", "gemma2_mtc", "gemma2_value", "gemma2_z_skip",
    "gemma2_residual_before", "gemma2_weakly_causal_before",
]  # fmt: skip


def test_everything_is_evaluated() -> None:
    """The cases of the figures have every kind of dictionary but one, whose norm without gain is not captured."""
    kinds = {name.split(".")[0] for case in EVALUATED for name in CASES[case].moved}
    assert kinds == set(MOVED_KINDS) - {"lorsa-published"}


def activations(dictionary: Dictionary, read: Tensor, pattern: Tensor) -> tuple[Tensor, Tensor]:
    """Activations where features are encoded, and where they write; (S, F, r) both."""
    own = own_patterns(dictionary.moved_by, read) if isinstance(dictionary.moved_by, OwnAttention) else None
    active = gated(dictionary, encoded(dictionary, read, own))
    if not isinstance(dictionary.moved_by, HeadLoading):
        return active, active
    active = strongest(dictionary.moved_by, active)
    return active, arrived(dictionary.moved_by, active, with_identity(pattern))


def written(dictionary: Dictionary, site: Site, arrives: Tensor, read: Tensor) -> Tensor:
    """What a dictionary writes to a site, (S, D)."""
    rows = dictionary.decoders[site].rows.all().double()
    y = arrives.flatten(1) @ rows + dictionary.output_biases[site].double()
    return y + read @ dictionary.skip.double().T if dictionary.skip is not None else y


class Replaced:
    """A forward pass of one document with everything a dictionary writes taken from the dictionaries.

    They read the pass's own stream; patterns and norms are computed anew; the first position keeps its outputs. `keep`
    runs the base model instead, and only notes what the sites hold and what dictionaries would write; with `zero` the
    same outputs are nothing, so that a block replaced whole passes its input on.
    """

    def __init__(self, model: Model, ids: Sequence[int], *, keep: bool = False, zero: bool = False) -> None:
        self.base = base = Reference(model.base.lm, (), ids, special=False)
        cases = Reference(model.base.lm, model.replacements, ids, special=False)
        dropping = cases.dictionaries.values() if not keep else [
            (d, d.writes) for r in model.replacements for d in r.dictionaries
        ]  # fmt: skip
        self.dictionaries = list(dropping)
        self.keep, self.zero = keep, zero
        self.held: dict[Site, Tensor] = {}
        self.written: dict[Site, Tensor] = {}
        self.active: dict[str, Tensor] = {}
        x = base.embedded()
        for layer in range(base.weights.n_layers):
            x = self._block(layer, x)
        logits = base.norm(x, "final", 0, record=True) @ base.weights.unembedding.T
        cap = base.weights.logit_cap
        self.logits = logits if cap is None else cap * (logits / cap).tanh()

    def _block(self, layer: int, x: Tensor) -> Tensor:
        base, below = self.base, x
        normed = base.norm(x, "attention", layer, record=True)
        self.pattern = base.pattern(layer, normed)
        self._encode("resid_pre", layer, normed)
        values = base.values(layer, normed)
        self._encode("v", layer, values)
        z = base.head_outputs(layer, self._put("v", layer, values), self.pattern)
        self._encode("z", layer, z)
        attention = base.output(layer, self._put("z", layer, z))
        x = x + self._out("attn_out", layer, attention)
        normed = base.norm(below if base.weights.parallel else x, "mlp", layer, record=True)
        self._encode("resid_mid", layer, normed)
        x = x + self._out("mlp_out", layer, base.weights.mlp(layer, normed))
        return self._put("resid_post", layer, x, nothing=below)

    def _out(self, site: str, layer: int, output: Tensor) -> Tensor:
        """A sublayer's output as it is added to the stream: read and replaced behind its post-norm, or before it."""
        sublayer = "attention" if site == "attn_out" else "mlp"
        before = any(d.before_post_norm for d, _ in self.dictionaries)
        if not before:
            output = self.base.post(sublayer, layer, output, record=True)
        self._encode(site, layer, output)
        output = self._put(site, layer, output)
        return self.base.post(sublayer, layer, output, record=True) if before else output

    def _encode(self, site: str, layer: int, read: Tensor) -> None:
        for dictionary, writes in self.dictionaries:
            if dictionary.read.site == Site(site, layer):
                assert dictionary.read.norm == ("full" if site.startswith("resid") else "none")
                self.active[dictionary.name], arrives = activations(dictionary, read, self.pattern)
                for place in writes:
                    y = written(dictionary, place, arrives, read)
                    self.written[place] = self.written.get(place, 0) + y

    def _put(self, site: str, layer: int, output: Tensor, nothing: Tensor | None = None) -> Tensor:
        place = Site(site, layer)
        self.held[place] = output
        if self.keep or place not in self.written:
            return output
        put = self.written[place]
        if self.zero:
            put = torch.zeros_like(output) if nothing is None else nothing
        return torch.cat([output[:1], put[1:]])

    def loss(self, ids: Sequence[int]) -> float:
        """Summed cross-entropy."""
        chosen = self.logits[:-1].log_softmax(-1)[range(len(ids) - 1), list(ids[1:])]
        return -float(chosen.sum())


@pytest.mark.parametrize("name", EVALUATED)
def test_cross_entropy_of_the_replaced_model(name: str) -> None:
    """Of the base model, with dictionaries, and with the same outputs zero, over documents of several lengths."""
    model = build(CASES[name])
    found = cross_entropy(model.base, model.replacements, DOCUMENTS)
    count = sum(len(ids) - 1 for ids in DOCUMENTS)
    runs: list[dict[str, bool]] = [{"keep": True}, {}, {"zero": True}]
    expected = [sum(Replaced(model, ids, **run).loss(ids) for ids in DOCUMENTS) / count for run in runs]
    assert (found.base, found.replaced) == pytest.approx(tuple(expected[:2]), rel=1e-4)
    assert expected[0] != pytest.approx(expected[1], rel=1e-3)
    assert found.ablated == pytest.approx(expected[2], rel=1e-4)


@pytest.mark.parametrize("name", EVALUATED)
def test_figures_of_moved_dictionaries(name: str) -> None:
    """Normalized MSE and L0 of every dictionary on the base model, first positions as sources but not scored."""
    model = build(CASES[name])
    found = dictionary_figures(model.base, model.replacements, DOCUMENTS)
    runs = [Replaced(model, ids, keep=True) for ids in DOCUMENTS]
    dictionaries = [d for r in model.replacements for d in r.dictionaries]
    assert set(found) == {d.name for d in dictionaries}
    for dictionary in dictionaries:
        site = dictionary.writes[0]
        target = torch.cat([run.held[site][1:] for run in runs])
        rebuilt = torch.cat([run.written[site][1:] for run in runs])
        expected = float((target - rebuilt).pow(2).sum() / (target - target.mean(0)).pow(2).sum())
        figures = found[dictionary.name]
        assert figures["normalized_mse"] == pytest.approx(expected, rel=1e-4), dictionary.name
        active = torch.cat([run.active[dictionary.name][1:] for run in runs]).norm(dim=-1) > 0
        assert figures["l0"] == pytest.approx(float(active.double().sum(1).mean()), rel=1e-6), dictionary.name
        assert figures["dead_share"] == pytest.approx(float((~active.any(0)).double().mean())), dictionary.name


def test_a_document_does_not_change_another() -> None:
    """Moved features know their own context only: figures of documents together are those of each, taken together."""
    case = Case("llama", moved=("mtc-top4.1",), seed=60)
    model = build(case)
    together = cross_entropy(model.base, model.replacements, DOCUMENTS).replaced
    alone = [cross_entropy(model.base, model.replacements, [ids]).replaced * (len(ids) - 1) for ids in DOCUMENTS]
    assert together == pytest.approx(sum(alone) / sum(len(ids) - 1 for ids in DOCUMENTS), rel=1e-5)


def test_a_perfect_mtc_keeps_everything() -> None:
    """Every value of every head as a feature of its own head rebuilds the attention output: nothing is lost."""
    case = Case("gpt2", mlp_layers=(), mlp="transcoder", moved=("mtc.1",), seed=61)
    model = build(case)
    (mtc,) = model.replacements[0].dictionaries
    weights = Reference(model.base.lm, (), case.token_ids, special=True).weights
    (w_v, b_v), (w_o, b_o) = weights.projection(1, "v"), weights.projection(1, "o")
    signs = torch.cat([torch.ones(len(w_v)), -torch.ones(len(w_v))]).double()
    loading = torch.zeros(2 * len(w_v), N_HEADS + 1)
    loading[range(2 * len(w_v)), [i // weights.width for i in range(len(w_v))] * 2] = 1.0
    site = mtc.writes[0]
    rows = (torch.cat([w_o.T, w_o.T]) * signs[:, None]).float()
    decoder = replace(mtc.decoders[site], rows=type(mtc.decoders[site].rows)("W_dec", rows))  # type: ignore[call-arg]
    assert isinstance(decoder, Decoder)
    perfect = replace(
        mtc,
        W_enc=(torch.cat([w_v, w_v]) * signs[:, None]).float(),
        b_enc=(torch.cat([b_v, b_v]) * signs).float(),
        decoders={site: decoder},
        output_biases={site: b_o.float()},
        moved_by=HeadLoading(loading),
    )
    exact = (in_memory("perfect", [perfect]),)
    figures = dictionary_figures(model.base, exact, DOCUMENTS)["mtc.1"]
    assert figures["normalized_mse"] < 1e-10
    assert figures["l0"] == pytest.approx(len(w_v))
    kept = cross_entropy(model.base, exact, DOCUMENTS)
    assert kept.kept == pytest.approx(1.0, abs=1e-4)
    assert abs(kept.ablated - kept.base) > 0.05
    graph = circuits.trace(Model(model.base, exact), case.token_ids, settings=UNPRUNED)
    errors = graph.nodes.kind[graph.edges.source] == "attention_error"
    assert errors.any()
    assert np.abs(graph.edges.weight[errors]).max() < 1e-5 * np.abs(graph.edges.weight).max()
