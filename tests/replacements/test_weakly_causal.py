"""Weakly causal features and value SAEs: what layers share is one feature, where one dictionary a layer has two."""

from itertools import count
from typing import Any

import pytest
import torch
from planted import fit, nearly_orthogonal
from torch import Tensor
from torch.nn import functional

from circuits.replacements import ReadSite, Site
from circuits.replacements.attention_sae import AttentionSAE
from circuits.replacements.coder import CoderSettings
from circuits.replacements.dictionary import Decoder, Dictionary
from circuits.replacements.training import Batch
from circuits.replacements.value_sae import AttentionValueSAE, head_loadings_of_values
from circuits.replacements.weakly_causal import WeaklyCausalTranscoder
from circuits.replacements.weights import HeldTensor

D, F = 24, 12
TOKENS = 512


class Shared:
    """Two layers whose sites hold the same planted features, each with directions of its own.

    All sites but those named are noise of size 0.05: an MLP output that nothing predicts. With `own` the second site
    has as many features more, which the first does not have.
    """

    def __init__(self, sites: tuple[str, str], others: tuple[str, ...] = (), *, own: bool = False) -> None:
        self.sites, self.others, self.own = sites, others, own
        every = {site: nearly_orthogonal(2 * F, D, seed) for seed, site in enumerate(sites, 1)}
        self.directions = {site: rows[:F] for site, rows in every.items()}
        self.own_directions = every[sites[1]][F:]
        self.seeds = count(1000)

    def __iter__(self) -> "Shared":
        return self

    def __next__(self) -> Batch:
        return self.batch(next(self.seeds))[0]

    def batch(self, seed: int) -> tuple[Batch, Tensor]:
        random = torch.Generator().manual_seed(seed)
        a = torch.rand(TOKENS, F, generator=random) < 2 / F
        a = a * (0.5 + torch.rand(TOKENS, F, generator=random))
        batch = {site: a @ rows for site, rows in self.directions.items()}
        if self.own:
            more = (torch.rand(TOKENS, F, generator=random) < 2 / F) * (0.5 + torch.rand(TOKENS, F, generator=random))
            batch[self.sites[1]] = batch[self.sites[1]] + more @ self.own_directions
        batch |= {other: 0.05 * torch.randn(TOKENS, D, generator=random) for other in self.others}
        batch |= {f"{site}:none": value for site, value in batch.items() if site.startswith(("attn_out", "v."))}
        return batch, a


def matches(data: Shared, dictionary: Dictionary, sites: tuple[str, ...]) -> Tensor:
    """(F,): cosine of each planted feature with the learnt one that fits it best at all `sites` together."""
    cosines = [
        functional.normalize(data.directions[site])
        @ functional.normalize(dictionary.decoders[Site.parse(site)].all(), dim=1).T
        for site in sites
    ]
    return torch.stack(cosines).amin(0).amax(1)


def test_cross_layer_feature_is_one() -> None:
    """A feature that stands in the attention outputs of two layers: one type 2 feature writes both. Two SAEs have one
    each, and at the same k the second, which has its layer's own features to find too, leaves out the first's."""
    others = ("mlp_out.0", "mlp_out.1", "resid_mid.0:full", "resid_mid.1:full")
    data = Shared(("attn_out.0", "attn_out.1"), others, own=True)
    settings = CoderSettings(n_features=24, k=2, dead_after=20_000)
    weakly = WeaklyCausalTranscoder(2, D, settings)
    together = fit(weakly, data, 500, lr=1e-2)
    first = {d.name: d for d in weakly.to_dictionaries()}["type2.0"]
    assert float((matches(data, first, data.sites) >= 0.9).float().mean()) >= 0.9
    saes = AttentionSAE([0, 1], D, settings)
    apart = fit(saes, data, 500, lr=1e-2)
    assert together["nmse/attn_out.1"] < 0.5 * apart["nmse/attn_out.1"], (together, apart)
    wider = AttentionSAE([0, 1], D, CoderSettings(n_features=32, k=4, dead_after=20_000))
    fit(wider, data, 500, lr=1e-2)
    for dictionary, site in zip(wider.to_dictionaries(), data.sites, strict=True):
        assert dictionary.writes == (Site.parse(site),)
        assert float((matches(data, dictionary, (site,)) >= 0.9).float().mean()) >= 0.9


@pytest.mark.parametrize("later", [True, False])
@pytest.mark.parametrize("mlp", [True, False])
def test_write_sites_are_settings(later: bool, mlp: bool) -> None:
    """Type 1 never writes the attention output of its own layer, type 2 always does; the rest is asked for."""
    module = WeaklyCausalTranscoder(
        3, D, CoderSettings(n_features=8, k=2), type1_writes_attention=later, type2_writes_mlp=mlp
    )
    writes = {layout.name: [str(site) for site in layout.writes] for layout in module.layouts}
    assert writes["type1.1"] == ["mlp_out.1", "mlp_out.2", *(["attn_out.2"] if later else [])]
    assert writes["type2.1"] == ["attn_out.1", "attn_out.2", *(["mlp_out.1", "mlp_out.2"] if mlp else [])]


def test_value_that_two_layers_share() -> None:
    """One dictionary on the values of both layers finds each shared feature whole, at half the summed L0."""
    data = Shared(("v.0", "v.1"))

    def joined(batch: Batch) -> Batch:
        return batch | {"v.0+1:none": torch.cat([batch["v.0"], batch["v.1"]], dim=1)}

    settings: Any = CoderSettings(n_features=24, k=2, dead_after=20_000)
    together = AttentionValueSAE([0, 1], D, settings, together=True)
    figures = fit(together, (joined(batch) for batch in data), 400, lr=1e-2)
    (dictionary,) = together.to_dictionaries()
    assert str(dictionary.read) == "v.0+1:none"
    assert float((matches(data, dictionary, data.sites) >= 0.9).float().mean()) >= 0.9
    apart = AttentionValueSAE([0, 1], D, settings)
    two = fit(apart, data, 400, lr=1e-2)
    assert figures["l0/value-sae.0+1"] == pytest.approx((two["l0/value-sae.0"] + two["l0/value-sae.1"]) / 2, rel=0.05)
    errors = [figures[f"nmse/v.{layer}"] for layer in (0, 1)] + [two[f"nmse/v.{layer}"] for layer in (0, 1)]
    assert max(errors) < 0.1, errors


def test_head_loading_of_values() -> None:
    """The norm of the decoder on each head, layer by layer."""
    rows = {Site("v", layer): torch.randn(5, 6, generator=torch.Generator().manual_seed(layer)) for layer in (1, 3)}
    dictionary = Dictionary(
        name="value-sae.1+3",
        kind="value-sae",
        read=ReadSite(Site("v", 1), "none", (3,)),
        writes=tuple(rows),
        activation=AttentionValueSAE([1], 6, CoderSettings(4, k=1)).to_dictionaries()[0].activation,
        W_enc=torch.randn(5, 12),
        b_enc=torch.zeros(5),
        decoders={site: Decoder(HeldTensor(str(site), row)) for site, row in rows.items()},
    )
    found = head_loadings_of_values(dictionary, n_kv_heads=3)
    assert found.shape == (5, 6)
    assert found[4, 2] == pytest.approx(float(rows[Site("v", 1)][4, 4:6].norm()))
    assert found[0, 4] == pytest.approx(float(rows[Site("v", 3)][0, 2:4].norm()))
