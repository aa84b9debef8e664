"""Another engine's numbers: circuit-tracer's answers for the same models, transcoders and prompts.

One small case lies in `tests/data/golden`; all of `../shared/golden`, beside the checkout, are run where that folder
exists, and those of the folder that CIRCUITS_GOLDEN names. Its README says what is in `expected.npz`. A feature within
rounding of its threshold may be active in one engine only; it is then left out of the comparison, with the errors at
its position that take over what it wrote.
"""

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import Key, keys

import circuits
from circuits.graph import Graph, edge_scores, threshold
from circuits.loading import Model, load
from circuits.recording import record

CHECKOUT = Path(__file__).resolve().parents[2]
SMALL = CHECKOUT / "tests" / "data" / "golden" / "gpt2_clt"
SHARED = CHECKOUT.parent / "shared" / "golden"
MORE = Path(os.environ.get("CIRCUITS_GOLDEN", "no such folder"))
FOLDERS = [SMALL, *sorted(path.parent for folder in (SHARED, MORE) for path in folder.glob("*/expected.npz"))]
CLOSE = 1e-4


@dataclass(frozen=True)
class Golden:
    """One case: what is expected, over the identities in `nodes`, and the full graph that `circuits` finds."""

    folder: Path
    model: Model
    token_ids: tuple[int, ...]
    expected: dict[str, np.ndarray]
    nodes: list[Key]
    found: Graph

    @property
    def number(self) -> dict[Key, int]:
        """Identity -> row of the expected matrix."""
        return {key: i for i, key in enumerate(self.nodes)}


@cache
def golden(folder: Path) -> Golden:
    """Load a case and trace it unpruned."""
    with np.load(folder / "expected.npz") as archive:
        expected = dict(archive)
    n_tokens = int((folder / "tokens").read_text())
    ids = tuple(json.loads((folder / "prompt.json").read_text())["token_ids"][:n_tokens])
    model = load(folder / "model", folder / "transcoders")
    n_layers, last = model.base.shape.n_layers, n_tokens - 1
    features = expected["active_features"][expected["selected_features"]].tolist()
    nodes: list[Key] = [("mlp_feature", layer, position, feature) for layer, position, feature in features]
    nodes += [("mlp_error", layer, position, -1) for layer in range(n_layers) for position in range(n_tokens)]
    nodes += [("embedding", -1, position, token) for position, token in enumerate(ids)]
    nodes += [("logit", n_layers, last, token) for token in expected["logit_token_ids"].tolist()]
    settings = circuits.TraceSettings(left_out=0.0, unpruned=True)
    return Golden(folder, model, ids, expected, nodes, circuits.trace(model, ids, settings=settings))


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def case(request: pytest.FixtureRequest) -> Golden:
    """Every case that is here."""
    return golden(request.param)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} does not lie beside this checkout")
def test_shared_cases_are_run() -> None:
    """Where the folder of golden cases is, its cases are among those that run."""
    assert len(FOLDERS) > 1


def distance_to_threshold(case: Golden, key: Key) -> float:
    """How far a feature's pre-activation is from its threshold; for TopK, from the weakest entry let through."""
    _, layer, position, feature = key
    dictionary = next(d for r in case.model.replacements for d in r.dictionaries if d.layer == layer)
    recording = record(case.model.base, torch.tensor(case.token_ids))
    pre = dictionary.W_enc @ recording.read(dictionary.read)[position] + dictionary.b_enc
    if dictionary.activation.kind == "topk":
        assert dictionary.activation.k is not None
        cut = pre.topk(dictionary.activation.k).values[-1]
    else:
        cut = torch.zeros(()) if dictionary.threshold is None else dictionary.threshold.expand_as(pre)[feature]
    return float((pre[feature] - cut).abs())


def test_nodes(case: Golden) -> None:
    """The same nodes, but for features within rounding of their threshold; position 0 has no error here."""
    here = set(keys(case.found))
    there = {key for key in case.nodes if not (key[0] == "mlp_error" and key[2] == 0)}
    differ = here ^ there
    assert {key[0] for key in differ} <= {"mlp_feature"}
    for key in differ:
        assert distance_to_threshold(case, key) < CLOSE, f"{key} is active in one engine only"
    assert len(differ) <= 0.015 * len(there)


def test_adjacency(case: Golden) -> None:
    """Every edge to 1e-4 of the largest, activations and logits too."""
    number, names = case.number, keys(case.found)
    differ = {key for key in set(names) ^ set(case.nodes) if key[0] == "mlp_feature"}
    left_out = differ | {
        ("mlp_error", later, position, -1)
        for _, layer, position, _ in differ
        for later in range(layer, case.model.base.shape.n_layers)
    }
    n = len(case.nodes)
    place = np.array([-1 if key in left_out else number[key] for key in names])
    edges = case.found.edges
    both = (place[edges.source] >= 0) & (place[edges.target] >= 0)
    found = np.zeros((n, n), dtype=np.float32)
    found[place[edges.target[both]], place[edges.source[both]]] = edges.weight[both]
    compared = np.array([key not in left_out for key in case.nodes])
    expected = case.expected["adjacency"] * compared * compared[:, None]
    assert np.count_nonzero(expected) > n
    assert np.abs(found - expected).max() < CLOSE * np.abs(expected).max()
    common = np.flatnonzero(place >= 0)
    activation = dict(zip(case.nodes, case.expected["activation_values"][case.expected["selected_features"]]))
    at = [i for i in common if names[i][0] == "mlp_feature"]
    expected_activation = np.array([activation[names[i]] for i in at])
    assert np.abs(case.found.nodes.activation[at] - expected_activation).max() < CLOSE * expected_activation.max()
    probability = [case.found.nodes.probability[names.index(key)] for key in case.nodes if key[0] == "logit"]
    np.testing.assert_allclose(probability, case.expected["logit_probabilities"], atol=1e-5)


def test_scores_and_ledger(case: Golden) -> None:
    """Replacement and completeness score to 1e-4, where a feature is in one graph only to 1e-3; ledgers to 1e-4."""
    scores = case.found.metadata["scores"]
    same = {key for key in keys(case.found) if key[0] == "mlp_feature"} == {
        key for key in case.nodes if key[0] == "mlp_feature"
    }
    for name in ("replacement", "completeness"):
        expected = float(case.expected[f"{name}_score"])
        assert scores[name] == pytest.approx(expected, abs=CLOSE if same else 10 * CLOSE)
    assert 0.0 < case.found.metadata["ledger"]["max_relative_gap"] < CLOSE


def test_pruned_sets(case: Golden) -> None:
    """Pruned at 0.8 / 0.98 the same nodes and edges are left, but for those within 1e-4 of the cut."""
    settings = circuits.TraceSettings(left_out=0.0)
    pruned = circuits.trace(case.model, case.token_ids, settings=settings)
    names = keys(pruned)
    kept = {case.nodes[i] for i in np.flatnonzero(case.expected["node_mask"])}
    cumulative = dict(zip(case.nodes, case.expected["cumulative_scores"]))
    for key in set(names) ^ kept:
        assert abs(cumulative[key] - settings.node_threshold) < CLOSE, f"{key} is kept by one engine only"
    n = len(case.nodes)
    packed = case.expected["edge_mask_packed"]
    mask = np.unpackbits(packed)[: n * n].reshape(n, n) if packed.ndim == 1 else np.unpackbits(packed, axis=1)[:, :n]
    target, source = np.nonzero(mask)
    expected = {(case.nodes[i], case.nodes[j]) for i, j in zip(source, target)}
    found = {(names[i], names[j]) for i, j in zip(pruned.edges.source, pruned.edges.target)}
    assert len(expected) > 20
    near = near_the_cut(case, set(names))
    assert found ^ expected <= near
    assert len(found ^ expected) <= 0.001 * len(expected)


def near_the_cut(case: Golden, kept: set[Key]) -> set[tuple[Key, Key]]:
    """Edges whose score is within 1e-4, as a part of it, of the weakest score that pruning keeps."""
    chosen = case.found.select(np.array([key in kept for key in keys(case.found)]))
    scores = edge_scores(chosen.nodes, chosen.edges)
    cut = threshold(scores, 0.98)
    names = keys(chosen)
    rows = np.flatnonzero(np.abs(scores - cut) < CLOSE * cut)
    return {(names[chosen.edges.source[i]], names[chosen.edges.target[i]]) for i in rows}
