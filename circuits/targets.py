"""What a graph explains: tokens of the output, a difference of two tokens, feature nodes, or any direction."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.graph import FEATURE_KINDS, ID_PREFIXES
from circuits.linearize import LinearizedModel
from circuits.model import BaseModel
from circuits.prompt import Prompt, single_token, token_texts
from circuits.recording import Recording

AUTOMATIC_MASS, AUTOMATIC_COUNT = 0.95, 10


@dataclass(frozen=True)
class TopTokens:
    """The most probable tokens at a position (default: the last) up to 95 % of the probability, at most ten."""

    position: int = -1


@dataclass(frozen=True)
class TokenTarget:
    """The logit of one token, less the mean over the vocabulary, at a position (default: the last)."""

    token_id: int
    position: int = -1


@dataclass(frozen=True)
class TokenDifference:
    """The logit of one token less that of another, at a position (default: the last)."""

    token_id: int
    other_id: int
    position: int = -1


@dataclass(frozen=True)
class Direction:
    """A covector (D,) of the stream at a position; `site` is `resid_final` (after the final norm), or a raw stream
    site such as `resid_pre.2`, `resid_mid.0` or `resid_post.3`."""

    vector: Tensor
    position: int = -1
    site: str = "resid_final"
    name: str = "direction"


@dataclass(frozen=True)
class FeatureTarget:
    """A feature node: the `kind` of its node, layer, position and feature number."""

    kind: str
    layer: int
    feature: int
    position: int = -1


Target = TopTokens | TokenTarget | TokenDifference | Direction | FeatureTarget


@dataclass
class Readers:
    """Output readers at one depth, (B, ...): local stream covectors with constant, recorded value and labels.

    `weight` is the starting influence: the probability of a token, shared equally otherwise.
    """

    depth: int
    positions: list[int] = field(default_factory=list)
    covectors: list[Tensor] = field(default_factory=list)
    constants: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)


def parse_target(model: BaseModel, text: str, position: int = -1) -> Target:
    """A target in the words of the command line: a node id, a token's text or its id.

    A node id carries its own position: `2_153_7` (MLP), `a2_153_7` (attention), `k2_153_7` and `q2_153_9` (key side and
    query side of an MTC feature), `v2_153_7` (value feature).
    """
    if found := re.fullmatch(r"([akqv]?)(\d+)_(\d+)_(\d+)", text):
        kind = {ID_PREFIXES[kind]: kind for kind in FEATURE_KINDS}[found[1]]
        return FeatureTarget(kind, int(found[2]), int(found[3]), int(found[4]))
    return TokenTarget(token_id(model, text), position)


def token_id(model: BaseModel, text: str) -> int:
    """The id of a token given as text, or as its id where the text is a number and no token."""
    try:
        return single_token(model, text)
    except CircuitsError:
        if text.isdigit():
            return int(text)
        raise


def expand(linear: LinearizedModel, targets: Sequence[Target]) -> list[Target]:
    """The targets with every `TopTokens` replaced by the tokens that it stands for."""
    expanded: list[Target] = []
    for target in targets:
        if isinstance(target, TopTokens):
            probabilities = linear.output_probabilities(_place(target.position, linear.recording))
            top, ids = probabilities.topk(min(AUTOMATIC_COUNT, len(probabilities)))
            count = int((top.cumsum(0) < AUTOMATIC_MASS).sum()) + 1
            expanded += [TokenTarget(int(i), target.position) for i in ids[:count].tolist()]
        else:
            expanded.append(target)
    return expanded


def output_readers(linear: LinearizedModel, prompt: Prompt, targets: Sequence[Target]) -> list[Readers]:
    """Expanded token and direction targets as stream covectors, grouped by the depth that they read below."""
    groups: dict[int, Readers] = {}
    for target in targets:
        if isinstance(target, FeatureTarget | TopTokens):
            continue
        position = _place(target.position, linear.recording)
        site = target.site if isinstance(target, Direction) else "resid_final"
        depth = _depth(site, linear)
        readers = groups.setdefault(depth, Readers(depth))
        reader, token_id, label, probability = _describe(linear, prompt, target, position)
        _add_reader(linear, readers, site, reader, position)
        readers.token_ids.append(token_id)
        readers.labels.append(label)
        readers.probabilities.append(probability)
        readers.weights.append(probability if isinstance(target, TokenTarget) else 1.0)
    return [groups[depth] for depth in sorted(groups, reverse=True)]


def _describe(
    linear: LinearizedModel, prompt: Prompt, target: TokenTarget | TokenDifference | Direction, position: int
) -> tuple[Tensor, int, str, float]:
    model = linear.model
    if isinstance(target, Direction):
        if target.vector.shape != (model.shape.d_model,):
            raise CircuitsError(
                f"direction {target.name!r} has shape {tuple(target.vector.shape)}, expected ({model.shape.d_model},)"
            )
        return target.vector.float().to(model.device), -1, target.name, float("nan")
    named = [target.token_id] + ([target.other_id] if isinstance(target, TokenDifference) else [])
    for token_id in named:
        if not 0 <= token_id < model.shape.vocabulary:
            raise CircuitsError(f"target token id {token_id} is not in the vocabulary of {model.shape.vocabulary}")
    rows = model.unembedding_rows(named)
    texts = token_texts(model, named)
    if isinstance(target, TokenDifference):
        return rows[0] - rows[1], target.token_id, " minus ".join(texts), float("nan")
    probability = float(linear.output_probabilities(position)[target.token_id])
    return rows[0] - model.unembedding_mean, target.token_id, texts[0], probability


def _add_reader(linear: LinearizedModel, readers: Readers, site: str, reader: Tensor, position: int) -> None:
    recording = linear.recording
    constant = 0.0
    if site == "resid_final":
        value = float(reader @ recording.resid_final[position])
        norm = recording.final_norm
        if norm.bias is not None:
            constant = float(reader @ norm.bias)
        reader = norm.pull(reader, slice(position, position + 1))[0]
    else:
        name, _, layer = site.partition(".")
        value = float(reader @ _stream(recording, name, int(layer))[position])
    readers.positions.append(position)
    readers.covectors.append(reader)
    readers.constants.append(constant)
    readers.values.append(value)


def _stream(recording: Recording, name: str, layer: int) -> Tensor:
    if name == "resid_post":
        return recording.resid_post(layer)
    stream: Tensor = getattr(recording, name)[layer]
    return stream


def _depth(site: str, linear: LinearizedModel) -> int:
    n_layers = linear.model.shape.n_layers
    if site == "resid_final":
        return 2 * n_layers + 1
    name, _, layer = site.partition(".")
    if name not in ("resid_pre", "resid_mid", "resid_post") or not layer.isdigit() or int(layer) >= n_layers:
        raise CircuitsError(
            f"a direction cannot be read at {site!r}; use resid_final or resid_pre.L, resid_mid.L, resid_post.L "
            f"with L below {n_layers}"
        )
    return linear.read_depth(name, int(layer))


def _place(position: int, recording: Recording) -> int:
    n = recording.n_positions
    if not -n <= position < n:
        raise CircuitsError(f"target position {position} is outside the prompt of {n} tokens")
    return position % n


def feature_places(targets: Sequence[Target], recording: Recording) -> list[FeatureTarget]:
    """The feature targets with their positions counted from the front."""
    found = [target for target in targets if isinstance(target, FeatureTarget)]
    return [FeatureTarget(t.kind, t.layer, t.feature, _place(t.position, recording)) for t in found]


def stack(readers: Readers, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Positions (B,), covectors (B, D) and constants (B,) of a group as tensors."""
    return (
        torch.tensor(readers.positions, device=device),
        torch.stack(readers.covectors),
        torch.tensor(readers.constants, device=device),
    )
