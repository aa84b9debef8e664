"""A previous-token head, an induction pair and a skip-trigram: every number of their graphs written down.

The expected numbers follow from the docstrings of `hand_built`: an edge is the source's vector, times the norm that
the reader sees it through, times pattern and values where it passes through a head, times the reader.
"""

from math import sqrt

import hand_built
import numpy as np
import pytest
import torch
from hand_built import SKIP, norm

import circuits
from circuits import TokenTarget
from circuits.graph import Graph
from circuits.recording import record

UNPRUNED = circuits.TraceSettings(left_out=0.0, unpruned=True)
Loading = tuple[int, int, int, int]  # layer, head, key position, query position


def incoming(graph: Graph, target: str) -> dict[str, float]:
    """Source -> weight of every edge into a target that is not zero to rounding."""
    names = graph.node_ids()
    into = np.flatnonzero(graph.edges.target == names.index(target))
    weights = {names[graph.edges.source[edge]]: float(graph.edges.weight[edge]) for edge in into}
    return {source: weight for source, weight in weights.items() if abs(weight) > 1e-5}


def loadings(graph: Graph, source: str, target: str) -> dict[Loading, float]:
    """The head loadings of one edge that are not zero to rounding."""
    names, heads = graph.node_ids(), graph.heads
    pair = (graph.edges.source == names.index(source)) & (graph.edges.target == names.index(target))
    (edge,) = np.flatnonzero(pair)
    rows = np.flatnonzero((heads.edge == edge) & (np.abs(heads.weight) > 1e-5))
    places = zip(*(column[rows].tolist() for column in (heads.layer, heads.head, heads.key, heads.query)), strict=True)
    return dict(zip(places, heads.weight[rows].tolist(), strict=True))


def ledger(graph: Graph, node: str) -> tuple[float, float]:
    """Bias and pre-activation of a target."""
    i = graph.node_ids().index(node)
    return float(graph.nodes.bias[i]), float(graph.nodes.pre_activation[i])


def close(expected: object) -> object:
    """Equal to 1e-5."""
    return pytest.approx(expected, rel=1e-5, abs=1e-5)


class TestPreviousToken:
    """Prompt 3 1 0 2. Token 1 is at place 1, so head 0 brings it to place 2, and head 1 to places 1 to 3."""

    ids = (3, 1, 0, 2)

    @pytest.fixture
    def graph(self) -> Graph:
        """Everything, from the logits of words 1 and 0 at place 2."""
        return circuits.trace(hand_built.previous_token(), self.ids, [TokenTarget(1, 2), TokenTarget(0, 2)], UNPRUNED)

    def test_patterns(self) -> None:
        """Head 0 is the previous-token head to the last bit, head 1 is uniform."""
        patterns = record(hand_built.previous_token().base, torch.tensor(self.ids)).patterns[0]
        expected = torch.zeros(4, 4)
        expected[[0, 1, 2, 3], [0, 0, 1, 2]] = 1.0
        assert torch.equal(patterns[0], expected)
        torch.testing.assert_close(patterns[1], torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None])

    def test_attention_feature(self, graph: Graph) -> None:
        """It is active at places 1 to 3, with sqrt 8 from head 0 at place 2, and sqrt 8 / (p + 1) from head 1 at each.

        Only token 1 and the encoder's bias are in it: position embeddings pass no value, the model has no bias.
        """
        features = [name for name in graph.node_ids() if name.startswith("a0_0_")]
        assert features == ["a0_0_1", "a0_0_2", "a0_0_3"]
        for place in (1, 2, 3):
            head_0, head_1 = sqrt(8) * (place == 2), sqrt(8) / (place + 1)
            target = f"a0_0_{place}"
            assert incoming(graph, target) == close({"E_1_1": head_0 + head_1})
            expected = {(0, 0, 1, place): head_0} if head_0 else {}
            assert loadings(graph, "E_1_1", target) == close(expected | {(0, 1, 1, place): head_1})
            assert ledger(graph, target) == close((-0.5, head_0 + head_1 - 0.5))

    def test_mlp_feature(self, graph: Graph) -> None:
        """Half of PREVIOUS(1), of squared length 2, so each unit of PREVIOUS(1) counts once, times the norm.

        The stream is TOKEN + PLACE + sqrt 8 PREVIOUS + sqrt 8 / 3 (three SOME): 2 + 2 + 16 + 16/3 squared. Of its
        sqrt 8 PREVIOUS(1) the attention feature wrote its activation, and the attention error the rest.
        """
        n = norm(32, 20 + 16 / 3)
        a = sqrt(8) * 4 / 3 - 0.5
        assert incoming(graph, "0_0_2") == close({"a0_0_2": a * n, "a0_error_2": (sqrt(8) - a) * n})
        assert ledger(graph, "0_0_2") == close((0.0, sqrt(8) * n))

    def test_logits(self, graph: Graph) -> None:
        """A logit's reader is PREVIOUS(k) less the mean of the four, so PREVIOUS(1) counts 2 (3/4) or 2 (-1/4).

        The MLP writes nothing, so its error takes back what the MLP feature writes: a quarter of its activation.
        """
        n = norm(32, 20 + 16 / 3)
        a, b = sqrt(8) * 4 / 3 - 0.5, sqrt(8) * n / 4
        for token, part in ((1, 1.5), (0, -0.5)):
            expected = {"a0_0_2": a, "a0_error_2": sqrt(8) - a, "0_0_2": b, "0_error_2": -b}
            found = incoming(graph, f"1_{token}_2")
            assert found == close({source: vector * n * part for source, vector in expected.items()})
            assert ledger(graph, f"1_{token}_2") == close((0.0, sqrt(8) * n * part))


class TestInduction:
    """Prompt BOS 1 2 3 1: the second 1 looks at 2, before which a 1 has been seen, and says 2."""

    ids = (0, 1, 2, 3, 1)

    @pytest.fixture
    def graph(self) -> Graph:
        """Everything, from the logits of words 2 and 3 at the last place."""
        return circuits.trace(hand_built.induction(), self.ids, [TokenTarget(2), TokenTarget(3)], UNPRUNED)

    def test_patterns(self) -> None:
        """The previous-token head and the matching head are hard, the others uniform."""
        patterns = record(hand_built.induction().base, torch.tensor(self.ids)).patterns
        assert patterns[0, 0, 4].tolist() == [0, 0, 0, 1, 0]
        assert patterns[1, 1, 4].tolist() == [0, 0, 1, 0, 0]
        for layer, head in ((0, 1), (1, 0)):
            assert patterns[layer, head, 4].tolist() == pytest.approx([0.2] * 5)

    def test_previous_token_feature(self, graph: Graph) -> None:
        """At place 2 the word before is 1: sqrt 8 through head 0 from place 1, nothing through the silent head 1."""
        assert [name for name in graph.node_ids() if name.startswith("a0_0_")] == ["a0_0_2"]
        assert incoming(graph, "a0_0_2") == close({"E_1_1": sqrt(8)})
        assert loadings(graph, "E_1_1", "a0_0_2") == close({(0, 0, 1, 2): sqrt(8)})
        assert ledger(graph, "a0_0_2") == close((-1.0, sqrt(8) - 1))

    def test_induction_feature(self, graph: Graph) -> None:
        """At place 4: word 2 at place 2 through both heads, and BEFORE(1) there through the matching head.

        Of the sqrt 8 BEFORE(1) at place 2 the feature of layer 0 wrote sqrt 8 - 1, the attention error 1; value 4 is
        half of it, read three times.
        """
        n = norm(16, 10)
        expected = {"E_2_2": 2.2 * n, "a0_0_2": 1.5 * n * (sqrt(8) - 1), "a0_error_2": 1.5 * n}
        assert incoming(graph, "a1_0_4") == close(expected)
        assert loadings(graph, "E_2_2", "a1_0_4") == close({(1, 0, 2, 4): 0.2 * n, (1, 1, 2, 4): 2 * n})
        assert loadings(graph, "a0_0_2", "a1_0_4") == close({(1, 1, 2, 4): 1.5 * n * (sqrt(8) - 1)})
        assert loadings(graph, "a0_error_2", "a1_0_4") == close({(1, 1, 2, 4): 1.5 * n})
        assert ledger(graph, "a1_0_4") == close((0.0, n * (2.2 + 1.5 * sqrt(8))))

    def test_logits(self, graph: Graph) -> None:
        """NEXT(2) counts 3/4 for word 2 and -1/4 for word 3.

        Attention writes n NEXT(2) by head 1, and by head 0 n/10 NEXT of each of the five words, 1 being there twice:
        the stream's squared length is 10 + n^2 (1.1^2 + 0.1^2 + 0.2^2 + 0.1^2). What the feature wrote too much of
        NEXT(2) the error takes back.
        """
        n = norm(16, 10)
        final = norm(16, 10 + n**2 * 1.27)
        activation = n * (2.2 + 1.5 * sqrt(8))
        written = {0: 0.1 * n, 1: 0.2 * n, 2: 1.1 * n, 3: 0.1 * n}
        mean = sum(written.values()) / 4
        for token in (2, 3):
            part = 0.75 if token == 2 else -0.25
            error = written[token] - mean - activation * part
            expected = {"a1_0_4": activation * part * final, "a1_error_4": error * final}
            assert incoming(graph, f"2_{token}_4") == close(expected)
            assert ledger(graph, f"2_{token}_4") == close((0.0, (written[token] - mean) * final))


class TestSkipTrigram:
    """Prompt 1 3 2: from word 2 the head gives 3/5 to word 1, 1/5 to each of the others."""

    ids = (1, 3, 2)
    n = norm(16, 1 + 0.6**2)

    def test_pattern(self) -> None:
        """The pattern is the softmax of log 3, 0, 0."""
        pattern = record(hand_built.skip_trigram(replace_attention=False).base, torch.tensor(self.ids)).patterns[0, 0]
        assert pattern[2].tolist() == pytest.approx([0.6, 0.2, 0.2])
        assert pattern[1].tolist() == pytest.approx([0.5, 0.5, 0.0])

    def test_frozen_attention(self) -> None:
        """Without an attention replacement the edges pass through the head, and the graph names no loading.

        The transcoder feature sees 0.6 KEEP and LETTER(2), both times n, less 1. The logit sees MIND, 3/4 of it after
        the mean, times n: the feature's activation, 1/4 KEEP through the skip connection, and the error, which takes
        both back as the MLP writes nothing.
        """
        graph = circuits.trace(hand_built.skip_trigram(replace_attention=False), self.ids, [TokenTarget(3)], UNPRUNED)
        n = self.n
        activation, skipped = 1.6 * n - 1, SKIP * 0.6 * n
        assert incoming(graph, "0_0_2") == close({"E_1_0": 0.6 * n, "E_2_2": n})
        assert ledger(graph, "0_0_2") == close((-1.0, activation))
        expected = {"0_0_2": activation, "E_1_0": skipped, "0_error_2": -activation - skipped}
        assert incoming(graph, "1_3_2") == close({source: v * 0.75 * n for source, v in expected.items()})
        assert ledger(graph, "1_3_2") == close((0.0, 0.0))
        assert len(graph.heads) == 0
        assert graph.metadata["attention"] == ["frozen"]

    def test_replaced_attention(self) -> None:
        """With one, the path has a node: the feature reads 0.6 of KEEP and writes half of that, the error the rest."""
        graph = circuits.trace(hand_built.skip_trigram(replace_attention=True), self.ids, [TokenTarget(3)], UNPRUNED)
        n = self.n
        activation = 1.6 * n - 1
        for place, weight in ((0, 1.0), (1, 0.5), (2, 0.6)):
            assert incoming(graph, f"a0_0_{place}") == close({"E_1_0": weight})
            assert loadings(graph, "E_1_0", f"a0_0_{place}") == close({(0, 0, 0, place): weight})
            assert ledger(graph, f"a0_0_{place}") == close((0.0, weight))
        assert incoming(graph, "0_0_2") == close({"a0_0_2": 0.3 * n, "a0_error_2": 0.3 * n, "E_2_2": n})
        expected = {"0_0_2": activation, "a0_0_2": SKIP * 0.3 * n, "a0_error_2": SKIP * 0.3 * n}
        expected["0_error_2"] = -sum(expected.values())
        assert incoming(graph, "1_3_2") == close({source: v * 0.75 * n for source, v in expected.items()})
        assert graph.metadata["attention"] == ["replaced"]
