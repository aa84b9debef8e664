"""What long prompts and large replacements need: encoders and writers in files, bounded hop splits and patterns."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import CASES, build
from torch import Tensor

import circuits
from circuits import assemble, hop_work, offload
from circuits.graph import Graph
from circuits.kernels.encode import Activation, encode
from circuits.prompt import prepare
from circuits.recording import record
from circuits.replacements import encoding
from circuits.replacements.dictionary import Dictionary
from circuits.replacements.formats import native
from circuits.replacements.loading import load_replacement
from circuits.replacements.weights import LazyTensor

CASE = next((Path(__file__).parents[1] / "data" / "golden").iterdir())
IDS = list(range(1, 9))


@pytest.mark.parametrize(
    "activation",
    [
        Activation("relu"),
        Activation("jump_relu"),
        Activation("topk", 5),
        Activation("topk", 5, rectify=False),
        Activation("topk", 200),
    ],
    ids=str,
)
def test_encoding_by_blocks_of_features_is_encoding(activation: Activation) -> None:
    """Whatever the size of a block, the same features are active in the same order, among them top-k features whose
    rivals stand in other blocks; features of zero weight are never active."""
    generator = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(*shape, generator=generator) for shape in ((7, 6), (50, 6), (50,)))
    W[::3], b[::3] = 0.0, 0.0
    threshold = torch.rand(50, generator=generator)
    expected = encode(x, W, b, activation, threshold)
    for size in (1, 7, 50):
        parts = ((slice(i, min(i + size, 50)), (x @ W[i : i + size].T + b[i : i + size])) for i in range(0, 50, size))
        found = encoding.encode_blocks(((block, pre.unsqueeze(2)) for block, pre in parts), activation, threshold)
        for mine, theirs in zip(found[:4], expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_an_encoder_in_its_file_gives_the_same_graph_and_is_read_a_block_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With no memory for encoders nothing of them is held, the most that is read at once is a block, and the graph is
    the same to rounding."""
    monkeypatch.setattr(encoding, "FEWEST", 4)
    monkeypatch.setattr(encoding, "BLOCK_BYTES", 4 * 64 * 4)
    model = circuits.load(CASE / "model", CASE / "transcoders", memory=2**30)
    lazy = circuits.load(CASE / "model", CASE / "transcoders", memory=0)
    assert all(dictionary.is_held for dictionary in model.replacements[0].dictionaries)
    assert not any(dictionary.is_held for dictionary in lazy.replacements[0].dictionaries)
    encoders = {dictionary.encoder for dictionary in lazy.replacements[0].dictionaries}
    read: list[int] = []
    span = LazyTensor.span

    def counted(tensor: LazyTensor, first: int, last: int) -> Tensor:
        if tensor in encoders:
            read.append((last - first) * tensor.shape[1] * 4)
        return span(tensor, first, last)

    monkeypatch.setattr(LazyTensor, "span", counted)
    monkeypatch.setattr(LazyTensor, "all", lambda tensor: pytest.fail(f"{tensor.name} was read whole"))
    dictionary = lazy.replacements[0].dictionaries[0]
    x = torch.randn(5, dictionary.d_read, generator=torch.Generator().manual_seed(1))
    found, expected = dictionary.encode(x), model.replacements[0].dictionaries[0].encode(x)
    assert torch.equal(found.features, expected.features)
    torch.testing.assert_close(found.activations, expected.activations, rtol=1e-5, atol=1e-6)
    assert 0 < max(read) <= max(4 * 64 * 4, 4 * dictionary.d_read * 4)
    assert len(read) > 1
    same(circuits.trace(lazy, IDS), circuits.trace(model, IDS))


def test_encoders_are_held_as_far_as_the_budget_goes() -> None:
    """A budget for one encoder and a half holds one; `W_enc` reads as the same tensor either way."""
    whole = load_replacement(CASE / "transcoders").dictionaries
    size = 4 * whole[0].n_features * whole[0].d_read
    some = load_replacement(CASE / "transcoders", memory=size + size // 2).dictionaries
    assert sum(dictionary.is_held for dictionary in some) == 1
    for mine, theirs in zip(some, whole, strict=True):
        assert torch.equal(mine.W_enc, theirs.W_enc)
        features = torch.tensor([3, 0, 3])
        assert torch.equal(mine.encoder_rows(features), theirs.encoder_rows(features))


def test_float32_encoders_are_used_where_they_lie() -> None:
    """Without a budget they are not copied: a span is the file's own memory, which goes when it is let go of."""
    dictionaries = load_replacement(CASE / "transcoders").dictionaries
    assert not any(dictionary.is_held for dictionary in dictionaries)
    encoder = dictionaries[0].encoder
    assert isinstance(encoder, LazyTensor)
    assert encoder.span(2, 5).data_ptr() == encoder.span(0, 5).data_ptr() + 2 * 4 * encoder.shape[1]
    assert torch.equal(encoder.span(2, 5), encoder.all()[2:5])


@pytest.mark.parametrize("name", ["gpt2_mtc_ranks", "gpt2_own", "llama_lorsa", "gpt2_value"])
def test_dictionaries_of_every_movement_and_rank_may_stay_in_their_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved, and read with no memory for encoders and blocks of one feature: the same graph."""
    monkeypatch.setattr(encoding, "FEWEST", 1)
    monkeypatch.setattr(encoding, "BLOCK", 1)
    case = CASES[name]
    model = build(case)
    lazy = []
    for number, replacement in enumerate(model.replacements):
        native.save(replacement, tmp_path / str(number))
        lazy.append(load_replacement(tmp_path / str(number), memory=0))
    found = circuits.trace(circuits.Model(model.base, tuple(lazy)), case.token_ids)
    assert not any(dictionary.is_held for replacement in lazy for dictionary in replacement.dictionaries)
    same(found, circuits.trace(model, case.token_ids))


def test_what_does_not_fit_lies_in_a_file_and_the_graph_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no free memory at all patterns and writers lie in files without a name; not one number changes."""
    model = build(CASES["gpt2_clt_frozen"])
    expected = circuits.trace(model, CASES["gpt2_clt_frozen"].token_ids)
    mapped = []
    from_file = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda path, **how: mapped.append(path) or from_file(path, **how))
    monkeypatch.setattr(offload, "SHARE", 0.0)
    found = circuits.trace(model, CASES["gpt2_clt_frozen"].token_ids)
    assert mapped
    assert not any(Path(path).exists() for path in mapped)
    same(found, expected)


def test_patterns_of_all_layers_are_one_tensor() -> None:
    """A recording holds each layer's patterns once: views of one tensor, rows that sum to one."""
    model = build(CASES["llama_no_mlp"])
    prompt = prepare(model.base, CASES["llama_no_mlp"].token_ids)
    recording = record(model.base, torch.tensor(prompt.token_ids))
    patterns = recording.patterns
    assert patterns.untyped_storage().nbytes() == 4 * patterns.numel()
    torch.testing.assert_close(patterns.sum(-1), torch.ones(patterns.shape[:-1]))


def test_hop_splits_go_to_the_strongest_edges_within_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """With half of the work fewer edges are split, the strongest; each split is as before, and the metadata says so."""
    model, ids = build(CASES["gpt2_clt_frozen"]), CASES["gpt2_clt_frozen"].token_ids
    whole = circuits.trace(model, ids)
    assert "hops" not in whole.metadata
    monkeypatch.setattr(hop_work, "HOP_WORK", 2**14)
    some = circuits.trace(model, ids)
    about = some.metadata["hops"]
    assert 0 < about["edges"] < about["of"] == len(whole.edges)
    assert 0 < len(some.last_hops) < len(whole.last_hops)
    split = np.unique(some.last_hops.edge)
    chosen = np.isin(whole.last_hops.edge, split)
    np.testing.assert_allclose(some.last_hops.weight, whole.last_hops.weight[chosen], rtol=1e-4, atol=1e-6)


def test_patterns_in_a_graph_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the heads that a graph names it has the patterns of those that carry most, as many as the bound allows."""
    model, ids = build(CASES["gpt2_clt_frozen"]), CASES["gpt2_clt_frozen"].token_ids
    whole = circuits.trace(model, ids)
    monkeypatch.setattr(assemble, "PATTERN_BYTES", 2 * 4 * len(ids) ** 2)
    some = circuits.trace(model, ids)
    assert len(some.patterns) == 2 < len(whole.patterns)
    for at, pattern in some.patterns.items():
        assert np.array_equal(pattern, whole.patterns[at])


def test_a_copy_of_a_dictionary_keeps_its_encoder() -> None:
    """`W_enc` is a field like others: it may be left out of no constructor, and set."""
    dictionary = load_replacement(CASE / "transcoders").dictionaries[0]
    dictionary.W_enc = dictionary.W_enc * 2
    assert dictionary.is_held
    with pytest.raises(TypeError, match="W_enc"):
        Dictionary(name="no encoder")  # type: ignore[call-arg]


def same(found: Graph, expected: Graph) -> None:
    """The same nodes, and edges and influences to rounding."""
    assert len(found.nodes) == len(expected.nodes)
    assert len(found.edges) == len(expected.edges)
    for name in ("layer", "position", "feature"):
        assert np.array_equal(getattr(found.nodes, name), getattr(expected.nodes, name))
    np.testing.assert_allclose(found.nodes.influence, expected.nodes.influence, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found.edges.weight, expected.edges.weight, rtol=1e-3, atol=1e-5)
