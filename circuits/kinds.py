"""The kinds of replacement that `circuits train` makes, and how each is built for a base model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from circuits.errors import CircuitsError
from circuits.model import BaseModel, Shape
from circuits.replacements.attention_layer import AttentionReplacementLayer
from circuits.replacements.attention_layer_heads import AttentionLayerSettings
from circuits.replacements.attention_sae import AttentionSAE, ResidualSAE
from circuits.replacements.clt import CrossLayerTranscoder
from circuits.replacements.coder import CoderSettings
from circuits.replacements.multitoken import MultiTokenTranscoder
from circuits.replacements.multitoken_settings import MultiTokenSettings, write_sites
from circuits.replacements.qk_diagonalization import QKDiagonalization, QKSettings
from circuits.replacements.side_by_side import SideBySide
from circuits.replacements.value_sae import AttentionValueSAE
from circuits.replacements.weakly_causal import WeaklyCausalTranscoder

Settings = CoderSettings | MultiTokenSettings | AttentionLayerSettings | QKSettings


@dataclass(frozen=True)
class Places:
    """Where a replacement reads and writes, as far as its kind leaves that open.

    layers
        Layers of attention to train for; all by default. Kinds that write to later layers take all.
    site
        Of an attention output SAE: what it reads and rebuilds.
    target
        Of an MTC: the attention output, or the stream after the layer.
    mlp
        Type 2 features, or MCTC features, write to MLP outputs too.
    later_attention
        Type 1 features write to later attention outputs.
    together
        One value SAE on all layers.
    heads
        Of QK diagonalization: only these, jointly; all by default.
    """

    layers: tuple[int, ...] = ()
    site: Literal["attn_out", "z"] = "attn_out"
    target: Literal["attention", "residual"] = "attention"
    mlp: bool = False
    later_attention: bool = True
    together: bool = False
    heads: tuple[int, ...] = ()


@dataclass(frozen=True)
class Kind:
    """One kind: what its settings are, whether it takes some layers only, and how it is built."""

    settings: type[Settings]
    some_layers: bool
    build: Callable[..., nn.Module]


def build_module(model: BaseModel, kind: str, places: Places, settings: Settings) -> nn.Module:
    """The untrained replacement of a kind.

    Raises
    ------
    CircuitsError
        The settings are another kind's, or the layers or heads are not in the model.
    """
    shape, found = model.shape, KINDS[kind]
    if not isinstance(settings, found.settings):
        raise CircuitsError(f"{kind} takes {found.settings.__name__}, but was given {type(settings).__name__}")
    if places.layers and not found.some_layers:
        raise CircuitsError(f"{kind} has dictionaries for every layer; leave the layers out")
    layers = places.layers or tuple(range(shape.n_layers))
    if not all(0 <= layer < shape.n_layers for layer in layers):
        raise CircuitsError(f"layers {layers} are not all in the model, which has layers 0 to {shape.n_layers - 1}")
    if not all(0 <= head < shape.n_heads for head in places.heads):
        raise CircuitsError(f"heads {places.heads} are not all in the model, which has heads 0 to {shape.n_heads - 1}")
    module: nn.Module = found.build(kind, shape, layers, places, settings)
    return module.to(model.device)


def _clt(kind: str, shape: Shape, layers: Sequence[int], places: Places, settings: CoderSettings) -> nn.Module:
    return CrossLayerTranscoder(shape.n_layers, shape.d_model, settings)


def _attention_sae(
    kind: str, shape: Shape, layers: Sequence[int], places: Places, settings: CoderSettings
) -> nn.Module:
    width = shape.d_model if places.site == "attn_out" else shape.n_heads * shape.d_head
    return AttentionSAE(layers, width, settings, site=places.site)


def _residual_sae(kind: str, shape: Shape, layers: Sequence[int], places: Places, settings: CoderSettings) -> nn.Module:
    return ResidualSAE(layers, shape.d_model, settings)


def _value_sae(kind: str, shape: Shape, layers: Sequence[int], places: Places, settings: CoderSettings) -> nn.Module:
    return AttentionValueSAE(layers, shape.n_kv_heads * shape.d_head, settings, together=places.together)


def _weakly_causal(
    kind: str, shape: Shape, layers: Sequence[int], places: Places, settings: CoderSettings
) -> nn.Module:
    return WeaklyCausalTranscoder(
        shape.n_layers,
        shape.d_model,
        settings,
        type1_writes_attention=places.later_attention,
        type2_writes_mlp=places.mlp,
    )


def _multitoken(
    kind: str, shape: Shape, layers: Sequence[int], places: Places, settings: MultiTokenSettings
) -> nn.Module:
    later = kind == "mctc"
    sites = [
        (layer, write_sites(layer, shape.n_layers, places.target, later=later, mlp=later and places.mlp))
        for layer in layers
    ]
    return MultiTokenTranscoder(sites, shape.n_heads, shape.d_model, settings, kind)


def _attention_layer(
    kind: str, shape: Shape, layers: Sequence[int], places: Places, settings: AttentionLayerSettings
) -> nn.Module:
    if settings.kind != kind:
        raise CircuitsError(f"{kind} was given the settings of {settings.kind}; its activation is the other one's")
    return AttentionReplacementLayer(layers, shape.d_model, settings)


def _qk(kind: str, shape: Shape, layers: Sequence[int], places: Places, settings: QKSettings) -> nn.Module:
    heads = places.heads or None
    return SideBySide(
        [QKDiagonalization(layer, shape.n_heads, shape.n_kv_heads, shape.d_head, settings, heads) for layer in layers]
    )


KINDS = {
    "clt": Kind(CoderSettings, False, _clt),
    "attention-sae": Kind(CoderSettings, True, _attention_sae),
    "residual-sae": Kind(CoderSettings, True, _residual_sae),
    "value-sae": Kind(CoderSettings, True, _value_sae),
    "weakly-causal": Kind(CoderSettings, False, _weakly_causal),
    "mtc": Kind(MultiTokenSettings, True, _multitoken),
    "single-head-mtc": Kind(MultiTokenSettings, True, _multitoken),
    "joint-mtc": Kind(MultiTokenSettings, True, _multitoken),
    "ranked-mtc": Kind(MultiTokenSettings, True, _multitoken),
    "mctc": Kind(MultiTokenSettings, False, _multitoken),
    "attention-layer": Kind(AttentionLayerSettings, True, _attention_layer),
    "lorsa": Kind(AttentionLayerSettings, True, _attention_layer),
    "qk": Kind(QKSettings, True, _qk),
}
