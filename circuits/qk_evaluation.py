"""How good QK diagonalizations are: normalized pattern MSE, L0, and the cross-entropy with their patterns in place."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from circuits.capturing import capturing
from circuits.evaluation import CrossEntropy
from circuits.families import part
from circuits.model import BaseModel
from circuits.replacements.formats.qk_format import QKReplacement
from circuits.replacements.qk_figures import measure
from circuits.replacements.qk_score import QKDictionary
from circuits.text import Document, groups, pad

IMPLEMENTATION = "circuits-qk"


def qk_figures(model: BaseModel, replacement: QKReplacement, documents: Sequence[Document]) -> dict[str, Any]:
    """Figures of every dictionary on held-out documents, and the cross-entropy kept.

    Cross-entropy: all heads that are predicted run with their predicted patterns on the run's own queries and keys; the
    ablated model has uniform patterns there. The first position keeps its pattern, which is itself.
    """
    figures = {}
    for dictionary in replacement.dictionaries:
        figures[dictionary.name] = measure(dictionary, _batches(model, dictionary, documents))
    sums, count = [0.0, 0.0, 0.0], 0
    for group in groups(sorted(documents, key=len)):
        ids, mask = pad(group, model.device)
        wanted = mask[:, 1:]
        count += int(wanted.sum())
        for i, how in enumerate(("base", "predicted", "uniform")):
            with torch.no_grad(), _patterns(model, replacement.dictionaries, how):
                logits = model.lm(input_ids=ids, use_cache=False).logits[:, :-1].float()
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            sums[i] += float(losses.view_as(wanted)[wanted].sum())
    loss = CrossEntropy(*(total / count for total in sums))
    kept = {"base": loss.base, "replaced": loss.replaced, "ablated": loss.ablated, "kept": loss.kept}
    return {"dictionaries": figures, "cross_entropy": kept, "held_out_tokens": count}


def _batches(model: BaseModel, dictionary: QKDictionary, documents: Sequence[Document]) -> list[dict[str, Tensor]]:
    """Queries, keys and patterns of the documents, as the trainer has them."""
    layer, found = dictionary.of.layer, []
    names = (f"q.{layer}", f"k.{layer}", f"pattern.{layer}")
    for group in groups(sorted(documents, key=len)):
        ids, mask = pad(group, model.device)
        kept: dict[str, Tensor] = {}
        with torch.no_grad(), capturing(model, names, kept):
            part(model.lm, model.family.trunk)(input_ids=ids, use_cache=False)
        found.append({name: kept[name] for name in (*names, f"q.{layer}:none", f"k.{layer}:none")} | {"mask": mask})
    return found


@contextmanager
def _patterns(model: BaseModel, dictionaries: Sequence[QKDictionary], how: str) -> Iterator[None]:
    """Within the context the heads of `dictionaries` run with other patterns."""
    if how == "base":
        yield
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    by_layer: dict[int, list[QKDictionary]] = {}
    for dictionary in dictionaries:
        by_layer.setdefault(dictionary.of.layer, []).append(dictionary)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        output, pattern = eager(module, query, key, value, mask, **options)
        if module.layer_idx not in by_layer:
            return output, pattern
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        q, k = (x.transpose(1, 2).flatten(2).float() for x in (query * scaling, key))
        pattern = pattern.clone()
        for dictionary in by_layer[module.layer_idx]:
            heads = list(dictionary.of.heads)
            pattern[:, heads, 1:] = _other(dictionary, q, k, how)[:, :, 1:].to(pattern.dtype)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return (pattern @ value).transpose(1, 2), pattern

    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
    config: Any = model.lm.config
    before = config._attn_implementation
    config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = before


def _other(dictionary: QKDictionary, q: Tensor, k: Tensor, how: str) -> Tensor:
    """(C, H', S, S): patterns that a dictionary predicts, or uniform ones."""
    if how == "uniform":
        n = q.shape[1]
        rows = torch.ones(n, n, device=q.device).tril()
        return (rows / rows.sum(1, keepdim=True)).expand(len(q), len(dictionary.of.heads), n, n)
    return dictionary.pattern(q, k)
