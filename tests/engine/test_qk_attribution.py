"""QK attributions: all pairs add up to the recorded score, and equal a plain reference and what can be written down."""

import numpy as np
import pytest
import torch
from hand_built import induction, norm
from plain_reference import Reference
from tiny_models import CASES, Case, build, keys

import circuits
from circuits import TokenTarget, qk_attribution, score_circuits
from circuits.assemble import table_numbers
from circuits.graph import OWN_HEAD
from circuits.head_steps import part_names
from circuits.loading import load
from circuits.prompt import prepare
from circuits.qk_attribution import Explained, HeadStep, QKAttribution
from circuits.score_circuits import ScoreCircuit, SideReader
from circuits.sweep import Sweep
from circuits.tracing import lay_out

UNPRUNED = circuits.TraceSettings(left_out=0.0, unpruned=True, explain=True)


def laid_out(case: Case) -> Sweep:
    """A tiny model's prompt before its sweep."""
    model = build(case)
    return lay_out(model, prepare(model.base, case.token_ids), [TokenTarget(3)])


def every_step(sweep: Sweep) -> list[HeadStep]:
    """All heads of all layers from the last two queries at all keys, and all features with patterns of their own."""
    shape, n = sweep.linear.model.shape, sweep.linear.recording.n_positions
    places = [(query, key) for query in (n - 2, n - 1) for key in range(query + 1)]
    windows = [sweep.linear.model.score_weights(layer).window or n for layer in range(shape.n_layers)]
    steps = [
        HeadStep(layer, head, query, key)
        for layer in range(shape.n_layers)
        for head in range(shape.n_heads)
        for query, key in places
        if query - key < windows[layer]
    ]
    table = sweep.table
    for node in np.flatnonzero(table.kind == "attention_feature").tolist():
        if type(sweep.linear.dictionaries[table.dictionary[node]].moved_by).__name__ == "OwnAttention":
            query = int(table.position[node])
            steps += [HeadStep(int(table.layer[node]), OWN_HEAD, query, key, node) for key in range(query + 1)]
    return steps


def pair_sums(explained: Explained) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of every single pair of a block's scores and of their relative forms, multiplied out, in float64."""
    block = explained.block
    sums, relative = [], []
    for circuit, key in zip(explained.circuit.tolist(), explained.key.tolist(), strict=True):
        pairs = block.pairs(circuit, slice(None)).double()
        at_key = torch.zeros(block.position + 1, dtype=torch.float64)
        at_key.index_add_(0, block.key_of, pairs.sum(0))
        sums.append(at_key[key])
        attention = block.circuits[circuit].pattern[block.position, : block.position + 1].double()
        relative.append(((torch.arange(block.position + 1) == key).double() - attention) @ at_key)
    return torch.stack(sums), torch.stack(relative)


@pytest.mark.parametrize("name", CASES)
def test_pairs_add_up(name: str) -> None:
    """All pairs add up to the recorded score and, weighted, to `log A - sum A log A` of the recorded pattern."""
    check_sums(CASES[name])


@pytest.mark.parametrize("family", ["olmo2", "gemma3", "mistral", "qwen2", "phi3"])
def test_pairs_add_up_in_further_families(family: str) -> None:
    """Norms of queries over all heads at once, windows, biases and a rotary base a layer."""
    check_sums(Case(family, attention={0: "z", 2: "attn_out"}, seed=94))  # type: ignore[arg-type]


def check_sums(case: Case) -> None:
    """Every step of a case."""
    sweep = laid_out(case)
    count = 0
    for explained in QKAttribution.of(sweep).explain(every_step(sweep)):
        block, circuit, key = explained.block, explained.circuit, explained.key
        sums, relative = pair_sums(explained)
        recorded = block.scores[circuit, key]
        torch.testing.assert_close(sums, recorded, rtol=1e-4, atol=1e-4)
        pattern = torch.stack([block.circuits[c].pattern[block.position, : block.position + 1] for c in circuit])
        logs = pattern.double().clamp(min=1e-300).log()
        expected = logs.gather(1, key.unsqueeze(1)).squeeze(1) - (pattern * logs).sum(1)
        torch.testing.assert_close(relative, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(explained.relative, expected, rtol=1e-4, atol=1e-4)
        assert float(explained.gaps.max()) < 1e-4
        count += len(explained.steps)
    assert count == len(set(every_step(sweep)))


@pytest.mark.parametrize("name", ["gpt2_clt_frozen", "llama_clt_middle_frozen", "llama_clt_attn_out_not_special"])
def test_parts_equal_the_reference(name: str) -> None:
    """A node's part of a query is what the query loses, in float64, when the node is taken out of the frozen model."""
    case = CASES[name]
    model = build(case)
    graph = circuits.trace(model, case.token_ids, [TokenTarget(3)], UNPRUNED)
    sweep = laid_out(case)
    reference = Reference(model.base.lm, model.replacements, case.token_ids, special=case.special)
    layer, head, place = 2, 1, sweep.linear.recording.n_positions - 1
    (explained,) = QKAttribution.of(sweep).explain([HeadStep(layer, head, place, 1)])
    query, weights = explained.block.query, model.base.score_weights(layer)
    whole = reference.run(reference.nothing()).attention_input[layer][place]
    compared = 0
    for key, node in zip(keys(graph), table_numbers(graph, sweep).tolist(), strict=True):
        if key not in reference.sources:
            continue
        lost = (whole - reference.without([key]).attention_input[layer][place]).float()
        expected = weights.turn((weights.w_q[head] @ lost)[None], torch.tensor([place]))[0] * weights.scale
        row = (query.sources == node).nonzero()
        found = query.vectors[0, int(row[0, 0])] if len(row) else torch.zeros_like(expected)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        compared += 1
    assert compared > 10


@pytest.mark.parametrize("name", CASES)
def test_pushed_equal_pulled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys by pushing nodes up equal those by pulling covectors down, part by part.

    The cases have skip connections, replaced values, blocks that are cut, and parallel blocks.
    """
    sweep = laid_out(CASES[name])
    linear, shape, n = sweep.linear, sweep.linear.model.shape, sweep.linear.recording.n_positions
    pushed, pulled = (SideReader(linear, sweep.table) for _ in range(2))
    compared = 0
    for layer in range(shape.n_layers):
        if not linear.passed(2 * layer + 1):
            continue
        weights = linear.model.score_weights(layer)
        heads = [ScoreCircuit(linear, layer, head, weights) for head in range(shape.n_heads)]
        asked = {place: range(1 + place % shape.n_heads) for place in range(n)}
        for side in ("query", "key"):
            found = pushed.read(heads, side, asked)
            with monkeypatch.context() as patch:
                patch.setattr(score_circuits, "PUSH_BUDGET", -1)
                expected = pulled.read(heads, side, asked)
            for place in range(n):
                # Shifted by the number of constants, nodes and constants number the rows of one table.
                tables = [
                    torch.zeros(len(asked[place]), len(sweep.table) + 3, shape.d_head).index_add(
                        1, of.sources + 3, of.vectors
                    )
                    for of in (found[place], expected[place])
                ]
                torch.testing.assert_close(*tables, rtol=1e-4, atol=1e-5)
                compared += int((tables[1].abs().amax((0, 2)) > 0).sum())
        assert pushed._pushed is not None
        assert pulled._pushed is None
    assert compared > 50 or not any(linear.passed(2 * layer + 1) for layer in range(shape.n_layers))


@pytest.mark.parametrize("first_look", [1, 3])
def test_strongest_pairs(first_look: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few parts are looked at first, the strongest pairs are the largest of all pairs multiplied out."""
    monkeypatch.setattr(qk_attribution, "FIRST_LOOK", first_look)
    sweep = laid_out(CASES["gpt2_clt_frozen"])
    for explained in QKAttribution.of(sweep).explain(every_step(sweep)):
        block, (scores, leads) = explained.block, explained.strongest_pairs(10)
        for i, (circuit, key) in enumerate(zip(explained.circuit.tolist(), explained.key.tolist(), strict=True)):
            pairs = block.pairs(circuit, slice(None))
            own = (pairs[:, block.key_of == key]).flatten()
            lead = (pairs * explained.lead_shares[i].float()[block.key_of]).flatten()
            for every, found in ((own, scores), (lead, leads)):
                expected = every.abs().topk(10).values
                torch.testing.assert_close(found.weight[i].abs(), expected, rtol=1e-4, atol=1e-6)


def test_a_soft_cap_is_said() -> None:
    """A graph whose scores are capped says that the cap's secant stands for it; others say nothing."""
    for family, capped in (("gemma2", True), ("llama", False)):
        case = next(case for case in CASES.values() if case.family == family)
        graph = circuits.trace(build(case), case.token_ids, [TokenTarget(3)], UNPRUNED)
        assert ("secant" in graph.metadata["qk"].get("soft_cap", "")) == capped


class TestInduction:
    """Prompt BOS 1 2 3 1 of the hand-built model: at 4 head 1 of layer 1 looks where BEFORE is the own word, at 2."""

    ids = (0, 1, 2, 3, 1)

    @pytest.fixture
    def sweep(self) -> Sweep:
        """Before the sweep, from the logit of word 2."""
        model = induction()
        return lay_out(model, prepare(model.base, self.ids), [TokenTarget(2)])

    def test_numbers(self, sweep: Sweep) -> None:
        """The score is 100 n^2: n WORD(1) ten times meets n sqrt 8 BEFORE(1) ten times, over sqrt 8.

        Of BEFORE(1) the feature of layer 0 wrote sqrt 8 - 1, the attention error 1; nothing else meets anything, since
        no other WORD stands at 4. At all other keys BEFORE is another word: their scores are 0.
        """
        n = norm(16, 10)
        (explained,) = QKAttribution.of(sweep).explain([HeadStep(1, 1, 4, 2)])
        assert explained.block.scores[0].tolist() == pytest.approx([0, 0, 100 * n**2, 0, 0], abs=1e-3)
        pairs, _ = explained.strongest_pairs(5)
        names = [tuple(part_names(sweep.table, side[0].numpy()).tolist()) for side in (pairs.query, pairs.key)]
        assert list(zip(*names, strict=True))[:2] == [("E_1_4", "a0_0_2"), ("E_1_4", "a0_error_2")]
        expected = [100 * n**2 * (8**0.5 - 1) / 8**0.5, 100 * n**2 / 8**0.5, 0, 0, 0]
        assert pairs.weight[0].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-4)
        assert float(explained.lead) == pytest.approx(100 * n**2, rel=1e-5)

    def test_explained(self, sweep: Sweep) -> None:
        """`explain` names the planted pair first, and tells its story: the word before meets the current word."""
        model = induction()
        graph = circuits.trace(model, self.ids, [TokenTarget(2)], UNPRUNED)
        assert graph.metadata["qk"]["max_relative_gap"] < 1e-5
        explanation = circuits.explain(model, graph, "a1_0_4")
        look = explanation.looks[0]
        assert (look.head, look.query, look.key) == ("L1H1", 4, 2)
        first = look.pairs[0]
        assert (first.query.id, first.key.id) == ("E_1_4", "a0_0_2")
        assert (first.key.origin, first.key.share) == (1, pytest.approx(1.0))
        assert "the current token" in " ".join(explanation.words)
        edge = circuits.explain(model, graph, "E_2_2->a1_0_4")
        assert edge.reads[0].part.id == "E_2_2"
        assert edge.looks[0].head == "L1H1"

    def test_pairs_are_told_at_the_key_that_they_score_for(self) -> None:
        """Through frozen attention a node stands on later keys too: the explanation keeps the key of each pair."""
        model = load(None, "clt")
        settings = circuits.TraceSettings(explain=True)
        graph = circuits.trace(model, "When Mary and John went to the store, John gave a drink to", settings=settings)
        look = circuits.explain(model, graph, "E_1053_2->4_1053_14").looks[0]
        scores, pairs = graph.scores, graph.pairs
        at = (scores.query == look.query) & (scores.key == look.key) & (scores.layer == look.layer)
        (number,) = np.flatnonzero(at & (scores.head == int(look.head.partition("H")[2])))
        kept = pairs.take((pairs.score == number) & (pairs.form == "lead"))
        expected = zip(kept.query_node.tolist(), kept.key_node.tolist(), kept.key.tolist(), kept.weight.tolist())
        told = [(pair.query.id, pair.key.id, pair.at, pytest.approx(pair.weight, rel=1e-3)) for pair in look.pairs]
        assert list(expected) == told
        assert any(pair.at != pair.key.position for pair in look.pairs)

    def test_unknown(self) -> None:
        """What the graph does not have is refused, with names that it has."""
        model = induction()
        graph = circuits.trace(model, self.ids, [TokenTarget(2)], UNPRUNED)
        with pytest.raises(circuits.CircuitsError, match="a1_0_4"):
            circuits.explain(model, graph, "a1_7_4")
        with pytest.raises(circuits.CircuitsError, match="no edge from"):
            circuits.explain(model, graph, "a1_0_4->E_2_2")
