"""Three transformers built by hand, whose graphs can be written down: what each does is told where it is built.

Every word and every message has a direction of its own in the stream, so norms are square roots of small numbers.
Patterns are hard to float precision (scores 80 apart and more) or have values such as 1/2 and 3/5.
"""

from math import cos, log, sin, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from circuits.kernels.encode import Activation
from circuits.loading import Model
from circuits.model import BaseModel
from circuits.replacements import Decoder, Dictionary, ReadSite, Replacement, Site
from circuits.replacements.weights import HeldTensor


def pair(index: int) -> Tensor:
    """Direction `index` of a stream of width 32 that layer norm centres: (.., 1, -1, ..), of squared length 2."""
    vector = torch.zeros(32)
    vector[2 * index : 2 * index + 2] = torch.tensor([1.0, -1.0])
    return vector


def unit(index: int) -> Tensor:
    """Direction `index` of a stream of width 16 under RMS norm, of length 1."""
    return torch.eye(16)[index]


def feature(
    name: str, read: str, encoder: Tensor, bias: float, write: str, decoder: Tensor, skip: Tensor | None = None
) -> Dictionary:
    """A dictionary with one ReLU feature and no output bias."""
    site = Site.parse(write)
    return Dictionary(
        name=name,
        kind=name.split(".")[0],
        read=ReadSite.parse(read),
        writes=(site,),
        activation=Activation("relu"),
        W_enc=encoder[None],
        b_enc=torch.tensor([bias]),
        decoders={site: Decoder(HeldTensor("W_dec", decoder[None]))},
        skip=skip,
    )


def assembled(lm: nn.Module, name: str, dictionaries: list[Dictionary]) -> Model:
    """The model with its dictionaries."""
    replacement = Replacement(name, Path("memory") / name, "memory", tuple(dictionaries))
    return Model(BaseModel(lm, None, name), (replacement,))


def _blank(lm: nn.Module) -> nn.Module:
    """All weights zero, all gains one."""
    for name, parameter in lm.named_parameters():
        is_gain = parameter.ndim == 1 and not name.endswith("bias")
        parameter.data.fill_(1.0 if is_gain else 0.0)
    return lm


# --- a previous-token head ---------------------------------------------------------------------------------------

TOKEN, PLACE, PREVIOUS, SOME = (lambda i, first=first: pair(first + i) for first in (0, 4, 8, 12))


def previous_token() -> Model:
    """GPT-2, one layer, two heads, four words, four places; MLP zero.

    The stream at p is TOKEN(t_p) + PLACE(p), so layer norm multiplies it by sqrt(32 / 4).
    Head 0 looks at p - 1 (the first token at itself), sees TOKEN(t) as sqrt 8, and writes sqrt 8 PREVIOUS(t).
    Head 1 looks at all alike and writes sqrt 8 SOME(t) / (p + 1) for each.
    The attention feature asks for token 1: its reader is 1/2 (PREVIOUS(1) + SOME(1)), its bias -1/2, and it writes
    PREVIOUS(1). The MLP feature reads 1/2 PREVIOUS(1) from the norm and writes 1/4 PREVIOUS(1). Logit k is PREVIOUS(k).
    """
    config: Any = GPT2Config(
        vocab_size=4, n_positions=4, n_embd=32, n_layer=1, n_head=2, layer_norm_epsilon=1e-12, n_inner=4,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    lm: Any = _blank(GPT2LMHeadModel(config))
    block = lm.transformer.h[0]
    w_qkv, w_o = block.attn.c_attn.weight.data, block.attn.c_proj.weight.data  # (in, out) both
    for i in range(4):
        lm.transformer.wte.weight.data[i] = TOKEN(i)
        lm.transformer.wpe.weight.data[i] = PLACE(i)
        lm.lm_head.weight.data[i] = PREVIOUS(i)
        w_qkv[:, max(i - 1, 0)] += 5 * PLACE(i)  # query of head 0: the place before
        w_qkv[:, 32 + i] = 5 * PLACE(i)  # key of head 0: the own place
        for head, message in ((0, PREVIOUS), (1, SOME)):
            w_qkv[:, 64 + 16 * head + i] = TOKEN(i) / 2
            w_o[16 * head + i] = message(i)
    attention = feature("attention-sae.0", "attn_out.0", (PREVIOUS(1) + SOME(1)) / 2, -0.5, "attn_out.0", PREVIOUS(1))
    mlp = feature("clt.0", "resid_mid.0:full", PREVIOUS(1) / 2, 0.0, "mlp_out.0", PREVIOUS(1) / 4)
    return assembled(lm, "previous-token", [attention, mlp])


# --- an induction pair -------------------------------------------------------------------------------------------

ONE = unit(0)
WORD, BEFORE, NEXT = (lambda i, first=first: unit(first + i) for first in (1, 5, 9))


def induction() -> Model:
    """Llama, two layers of two heads over one key-value head of width 8, four words (0 is BOS); MLPs zero.

    The stream at p is ONE + WORD(t_p), so RMS norm multiplies it by sqrt(16 / 2). Only dimensions 0 and 4 of a head
    turn, by one radian a place (theta is 1e30).
    Layer 0, head 0: query and key are constants, turned so that p - 1 wins; it writes sqrt 8 BEFORE(t_{p-1}).
    Head 1 looks at all alike and writes nothing. The feature reads BEFORE(1), bias -1, and writes BEFORE(1).
    Layer 1, whose norm is sqrt(16 / (1 + 1 + 8)): head 1 looks where BEFORE is the own word, head 0 at all alike.
    Their value 0..3 is WORD, value 4 is half of BEFORE(1). Head 0 writes NEXT / 2, head 1 NEXT of the values 0..3.
    The feature reads z: value 2 of head 0 once, of head 1 twice, value 4 of head 1 three times; it writes value 2 of
    head 1, which is NEXT(2). Logit k is NEXT(k).
    """
    config: Any = LlamaConfig(
        vocab_size=4, max_position_embeddings=8, hidden_size=16, intermediate_size=4, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, rms_norm_eps=1e-12, bos_token_id=0, eos_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 1e30}, attn_implementation="eager",
    )  # fmt: skip
    lm: Any = _blank(LlamaForCausalLM(config))
    first, second = (layer.self_attn for layer in lm.model.layers)
    first.q_proj.weight.data[0] = 10 * cos(1) * ONE
    first.q_proj.weight.data[4] = -10 * sin(1) * ONE
    first.k_proj.weight.data[0] = 10 * ONE
    still = (1, 2, 3, 5)  # dimensions of a head that do not turn
    for i in range(4):
        lm.model.embed_tokens.weight.data[i] = ONE + WORD(i)
        lm.lm_head.weight.data[i] = NEXT(i)
        first.v_proj.weight.data[i] = WORD(i)
        first.o_proj.weight.data[:, i] = BEFORE(i)
        second.q_proj.weight.data[8 + still[i]] = 10 * WORD(i)
        second.k_proj.weight.data[still[i]] = 10 * BEFORE(i)
        second.v_proj.weight.data[i] = WORD(i)
        second.o_proj.weight.data[:, i] = NEXT(i) / 2
        second.o_proj.weight.data[:, 8 + i] = NEXT(i)
    second.v_proj.weight.data[4] = BEFORE(1) / 2
    before = feature("attention-sae.0", "attn_out.0", BEFORE(1), -1.0, "attn_out.0", BEFORE(1))
    reader = torch.zeros(16)
    reader[[2, 10, 12]] = torch.tensor([1.0, 2.0, 3.0])
    follows = feature("attention-sae.1", "z.1", reader, 0.0, "z.1", unit(10))
    return assembled(lm, "induction", [before, follows])


# --- a skip-trigram ----------------------------------------------------------------------------------------------

LETTER, KEEP, MIND = unit, unit(8), unit(9)
SKIP = 0.25


def skip_trigram(*, replace_attention: bool) -> Model:
    """Llama, one layer, one head of width 16, four words: "1 ... 2" is followed by 3; MLP zero.

    The stream at p is LETTER(t_p), so RMS norm multiplies it by 4. From word 2 the head gives word 1 a score of
    log 3 and all others 0; from any other word all are alike. Its value is 1 at word 1, and it writes KEEP.
    The transcoder reads KEEP + LETTER(2) from the norm, bias -1, writes MIND, and its skip connection takes KEEP to
    a quarter of MIND. Logit 3 is MIND, all others are 0. The attention feature, where there is one, reads KEEP and
    writes KEEP / 2.
    """
    config: Any = LlamaConfig(
        vocab_size=4, max_position_embeddings=8, hidden_size=16, intermediate_size=4, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-12, bos_token_id=0, eos_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 1e30}, attn_implementation="eager",
    )  # fmt: skip
    lm: Any = _blank(LlamaForCausalLM(config))
    attention = lm.model.layers[0].self_attn
    attention.q_proj.weight.data[1] = LETTER(2) / 4
    attention.k_proj.weight.data[1] = LETTER(1) * log(3)  # scores are divided by sqrt 16, and the norm multiplies by 4
    attention.v_proj.weight.data[0] = LETTER(1) / 4
    attention.o_proj.weight.data[:, 0] = KEEP
    for i in range(4):
        lm.model.embed_tokens.weight.data[i] = LETTER(i)
    lm.lm_head.weight.data[3] = MIND
    skip = SKIP * torch.outer(MIND, KEEP)
    dictionaries = [feature("transcoder.0", "resid_mid.0:full", KEEP + LETTER(2), -1.0, "mlp_out.0", MIND, skip)]
    if replace_attention:
        dictionaries.append(feature("attention-sae.0", "attn_out.0", KEEP, 0.0, "attn_out.0", KEEP / 2))
    return assembled(lm, "skip-trigram", dictionaries)


def norm(width: int, squared_length: float) -> float:
    """What RMS norm, or layer norm on a centred stream, multiplies a stream of this squared length by."""
    return sqrt(width / squared_length)
