"""Residual SAE features moved through the base layer's heads: with an exact SAE that is the attention output itself."""

import pytest
import torch
from tiny_models import CASES, build

from circuits.kernels.encode import Activation
from circuits.moved_sae import moved_output
from circuits.recording import record
from circuits.replacements import Decoder, Dictionary, ReadSite, Site
from circuits.replacements.weights import HeldTensor


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2", "neox"])
def test_an_exact_sae_moved_through_all_heads_is_the_attention_output(family: str) -> None:
    """Features that are each coordinate of the stream and its negative rebuild it; post-norms come after the heads."""
    case = next(case for case in CASES.values() if case.family == family)
    base = build(case).base
    recording = record(base, torch.tensor(case.token_ids))
    both = torch.cat([torch.eye(base.shape.d_model), -torch.eye(base.shape.d_model)])
    for layer in range(base.shape.n_layers):
        site = Site("resid_pre", layer)
        sae = Dictionary(
            name=f"residual-sae.{layer}", kind="residual-sae", read=ReadSite.parse(f"{site}:none"), writes=(site,),
            activation=Activation("relu"), W_enc=both, b_enc=torch.zeros(len(both)),
            decoders={site: Decoder(HeldTensor("W_dec", both))},
        )  # fmt: skip
        active = sae.encode(recording.resid_pre[layer])
        found = moved_output(base, recording, sae, active, layer, "all")
        torch.testing.assert_close(found, recording.attn_out[layer], rtol=1e-4, atol=1e-5)
        most = moved_output(base, recording, sae, active, layer, "most")
        assert not torch.allclose(most, found, atol=1e-4)
