"""Dictionaries that were trained on a model as TransformerLens processes it, made to fit Hugging Face's own.

TransformerLens changes weights when it loads a model (`HookedTransformer.process_weights_`), so that some activations
are not Hugging Face's. What differs at the sites that dictionaries read and write, for a model with weights W_V, W_O,
value biases b_V, and b the bias of the norm before attention:

    fold_norm               nothing is left of gain and bias behind a norm: what was read with them is read without.
                            W_V takes the gain, b_V becomes b_V + W_V b
    fold_value_biases       patterns sum to one, so each z loses its value bias: z' = z - b_V, and b_O gains W_O b_V
    center_writing_weights  everything that is written has its mean over the model's width taken off, with LayerNorm
                            only: x' = x - mean x for streams and sublayer outputs

A reader of x' is a reader of x with other weights, W_enc x' = (W_enc - row means) x, and so is a skip connection. One
of z' has another bias, and so has a writer of z'. What a dictionary writes in place of x' lacks the mean, which every
norm takes off: it is left to the error. Features and activations are those on TransformerLens's model, to rounding.
"""

from dataclasses import replace

import torch
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.families import part
from circuits.model import BaseModel
from circuits.replacements.dictionary import Dictionary, Replacement
from circuits.replacements.processing import Processing

CENTRED = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


def undo(base: BaseModel, replacement: Replacement) -> Replacement:
    """The same replacement in terms of Hugging Face's activations; itself where nothing was processed."""
    processing = replacement.processing
    if replacement.format == "saelens" and not (processing and processing.fold_norm):
        _check_normalized(base, replacement)
    if processing is None:
        return replacement
    dictionaries = tuple(_undone(base, dictionary, processing) for dictionary in replacement.dictionaries)
    return replace(replacement, dictionaries=dictionaries, processing=None)


def _check_normalized(base: BaseModel, replacement: Replacement) -> None:
    """Refuse who reads `hook_normalized` of an unfolded LayerNorm: TransformerLens 2 has gain and bias in it, 3 not."""
    for dictionary in replacement.dictionaries:
        if base.family.norm == "layer" and dictionary.read.norm == "scale":
            raise CircuitsError(
                f"{dictionary.source}: reads hook_normalized of a LayerNorm that was not folded, and does not say "
                "whether TransformerLens 2 (behind gain and bias) or 3 (before them) trained it; name the hook "
                "mlp.hook_in if it was 2, and set fold_ln in model_from_pretrained_kwargs if it was 3"
            )


def _undone(base: BaseModel, dictionary: Dictionary, processing: Processing) -> Dictionary:
    read = dictionary.read
    if read.site.layer >= base.shape.n_layers:
        return dictionary  # refused with its name when it is checked against the model
    if read.norm == "full" and processing.fold_norm:
        read = replace(read, norm="scale")
    W_enc, b_enc, biases = dictionary.W_enc, dictionary.b_enc, dict(dictionary.output_biases)
    skip = dictionary.skip
    centres = processing.center_writing_weights and base.family.norm == "layer"
    if centres and read.site.name in CENTRED and read.norm == "none":
        W_enc = W_enc - W_enc.mean(1, keepdim=True)
        skip = skip if skip is None else skip - skip.mean(1, keepdim=True)
    if processing.fold_value_biases:
        if read.site.name == "z" and (lost := _lost(base, read.site.layer, processing, W_enc)) is not None:
            b_enc = b_enc - W_enc @ lost
        for site in dictionary.writes:
            if site.name == "z" and (lost := _lost(base, site.layer, processing, W_enc)) is not None:
                biases[site] = lost if biases.get(site) is None else biases[site] + lost
    return replace(dictionary, read=read, W_enc=W_enc, b_enc=b_enc, output_biases=biases, skip=skip)


def _lost(base: BaseModel, layer: int, processing: Processing, like: Tensor) -> Tensor | None:
    """What z of a layer has lost, (H x E,): its value biases, with what the norm's bias became of them."""
    if base.family.sinks is not None:
        raise CircuitsError(f"{base.name}: value biases cannot be unfolded where patterns do not sum to one")
    weights, shape = base.attention_weights(layer).to(base.device), base.shape
    values = torch.zeros(shape.n_kv_heads, shape.d_head, device=base.device)
    if weights.b_v is not None:
        values = values + weights.b_v
    path = base.family.attention_norm
    bias = base.norm_parameters(part(base.blocks[layer], path))[1]
    if processing.fold_norm and bias is not None:
        values = values + weights.w_v @ bias
    if not values.any():
        return None
    return values.repeat_interleave(shape.n_heads // shape.n_kv_heads, dim=0).flatten().to(like)
