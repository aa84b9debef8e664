"""What a forward pass of the base model has at any site, for a whole batch of documents.

Beside the sites of the stream there are those inside attention, each (batch, S, width), and the patterns:

    q.l        queries after rotary position and norms, times the score scale, (H x E): scores are q . k
    k.l        keys after rotary position and norms, (K x E)
    v.l        values, (K x E)
    pattern.l  attention patterns [query, key], (batch, H, S, S)

and `attn_before.l`, `mlp_before.l`, the sublayers' own outputs before a post-norm.

H query heads, K key-value heads, E head width, S positions.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, device, nn

from circuits.errors import CircuitsError
from circuits.families import part
from circuits.model import BaseModel
from circuits.replacements.sites import ReadSite, Site

IMPLEMENTATION = "circuits"
INSIDE = ("q", "k", "v", "pattern")
Wanted = Sequence[ReadSite | Site | str]


@contextmanager
def capturing(model: BaseModel, wanted: Wanted, kept: dict[str, Tensor]) -> Iterator[None]:
    """Within the context a forward pass leaves every wanted site in `kept`, float32 on the model's device, under the
    site's name.

    wanted
        Sites, read sites, or "pattern.l". A read site that joins several layers has their values side by side.
    """
    names = [site for one in wanted for site in _single(one)]
    handles: list[Any] = []
    for site, norm, name in names:
        if site.partition(".")[0] not in INSIDE:
            _hook(model, site, norm, _keeper(kept, name, model.device), handles)
    inside = {site for site, _, _ in names if site.partition(".")[0] in INSIDE}
    try:
        with _inside_attention(model, inside, kept):
            yield
    finally:
        for handle in handles:
            handle.remove()


def joined(kept: dict[str, Tensor], wanted: ReadSite | Site | str) -> Tensor:
    """What `wanted` holds, put together from what was captured."""
    if isinstance(wanted, ReadSite) and wanted.also:
        import torch

        return torch.cat([kept[name] for _, _, name in _single(wanted)], dim=-1)
    return kept[str(wanted)]


def _single(wanted: ReadSite | Site | str) -> list[tuple[str, str, str]]:
    """(site, norm, name in what is kept) of every single site that is needed."""
    if isinstance(wanted, ReadSite):
        if wanted.site.name in INSIDE:
            return [(str(site), "none", str(site) if wanted.also else str(wanted)) for site in wanted.sites]
        return [(str(wanted.site), wanted.norm, str(wanted))]
    return [(str(wanted), "none", str(wanted))]


def _keeper(kept: dict[str, Tensor], name: str, home: device) -> Callable[[Tensor], None]:
    return lambda value: kept.__setitem__(name, value.to(home).float())


def _hook(model: BaseModel, site: str, norm: str, keep: Callable[[Tensor], None], handles: list[Any]) -> None:
    name, _, layer = site.partition(".")
    family, block = model.family, model.blocks[int(layer)]
    outputs = {"attn_out": family.attention_out, "mlp_out": family.mlp_out}
    outputs |= {"attn_before": family.attention, "mlp_before": family.mlp}
    inputs = {"resid_pre": family.attention_norm, "resid_mid": family.mlp_norm, "z": family.attention_output}
    if norm == "scale":
        raise CircuitsError(f"training on {site}:scale is not supported; use the norm 'full' or 'none'")
    if name == "resid_post":
        _hook_output(block, keep, handles)
    elif norm == "full":
        _hook_output(part(block, inputs[name]), keep, handles)
    elif name in outputs:
        _hook_output(part(block, outputs[name]), keep, handles)
    else:
        module = part(block, inputs[name])
        handles.append(
            module.register_forward_pre_hook(
                lambda _, args, kwargs: keep(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
        )


def _hook_output(module: nn.Module, keep: Callable[[Tensor], None], handles: list[Any]) -> None:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        keep(output[0] if isinstance(output, tuple) else output)

    handles.append(module.register_forward_hook(hook))


@contextmanager
def _inside_attention(model: BaseModel, names: set[str], kept: dict[str, Tensor]) -> Iterator[None]:
    """Within the context every attention layer leaves those of its `names` in `kept`.

    Transformers lets an attention function of one's own be registered; ours calls the family's eager one.
    """
    if not names:
        yield
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        output, pattern = eager(module, query, key, value, mask, **options)
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        found = {"q": query * scaling, "k": key, "v": value}
        for name, heads in found.items():
            if (site := f"{name}.{module.layer_idx}") in names:
                kept[site] = kept[f"{site}:none"] = heads.transpose(1, 2).flatten(2).to(model.device).float()
        if (site := f"pattern.{module.layer_idx}") in names:
            kept[site] = pattern.to(model.device).float()
        return output, pattern

    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
    config: Any = model.lm.config
    before = config._attn_implementation
    config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = before
