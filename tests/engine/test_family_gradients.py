"""Every family: the edges into a logit are the gradients of transformers' own model, frozen by hooks.

The reference takes nothing from the engine but which modules are norms and MLPs. Autograd runs it in float64: a norm
whose denominator is frozen multiplies each entry (of the centred input, where it centres) by what it was multiplied
with on the prompt, attention mixes values by recorded patterns, and MLP outputs are leaves.
"""

from copy import deepcopy
from operator import attrgetter
from typing import Any, get_args

import pytest
import torch
from tiny_models import PROMPT, FamilyName, random_lm
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import circuits
from circuits.model import BaseModel

FROZEN = "frozen-by-a-test"


class Frozen:
    """A copy of a model in float64 whose forward pass is linear in `embedding` and `mlp`, its leaves."""

    def __init__(self, base: BaseModel) -> None:
        self.lm: Any = deepcopy(base.lm)
        if base.family.sinks is None:  # there the experts' product knows no float64
            self.lm.double()
        self.base, family = base, base.family
        trunk, blocks = attrgetter(family.trunk)(self.lm), attrgetter(family.blocks)(self.lm)
        with torch.no_grad():
            self.embedding = attrgetter(family.embedding)(self.lm)(torch.tensor([PROMPT]))
            seen: dict[Any, Any] = {}
            handles = []
            norms = [attrgetter(family.final_norm)(self.lm)]
            for block in blocks:
                paths = (family.attention_norm, family.mlp_norm, family.attention_post_norm, family.mlp_post_norm)
                norms += [attrgetter(path)(block) for path in paths if path]
            mlps = [attrgetter(family.mlp_out)(block) for block in blocks]
            for module in [*norms, *mlps]:
                handles.append(module.register_forward_hook(lambda m, x, y: seen.__setitem__(m, (x[0], y))))
            output = trunk(inputs_embeds=self.embedding, use_cache=False, output_attentions=True)
            for handle in handles:
                handle.remove()
        self.patterns = [pattern.detach() for pattern in output.attentions]
        self.mlp = []
        for module in norms:
            if module not in mlps:
                module.register_forward_hook(_frozen_norm(*seen[module], centred=family.norm == "layer"))
        for module in mlps:
            value = seen[module][1]
            self.mlp.append((value[0] if isinstance(value, tuple) else value).detach().clone().requires_grad_())
            module.register_forward_hook(_leaf(self.mlp[-1], isinstance(value, tuple)))
        self.embedding.requires_grad_()

    def hidden(self) -> Tensor:
        """(S, D) behind the final norm."""

        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
            value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
            return (self.patterns[module.layer_idx] @ value).transpose(1, 2).contiguous(), None

        AttentionInterface.register(FROZEN, attend)
        AttentionMaskInterface.register(FROZEN, eager_mask)
        self.lm.config._attn_implementation = FROZEN
        output = attrgetter(self.base.family.trunk)(self.lm)(inputs_embeds=self.embedding, use_cache=False)
        found: Tensor = output.last_hidden_state[0]
        return found


def _frozen_norm(x: Tensor, y: Tensor, *, centred: bool) -> Any:
    def hook(module: nn.Module, inputs: Any, _: Tensor) -> Tensor:
        def middle(z: Tensor) -> Tensor:
            return z - z.mean(-1, keepdim=True) if centred else z

        bias: Any = getattr(module, "bias", None)
        shift = 0.0 if bias is None else bias
        return middle(inputs[0]) * ((y - shift) / middle(x)).detach() + shift

    return hook


def _leaf(value: Tensor, is_tuple: bool) -> Any:
    return lambda _, __, output: (value, *output[1:]) if is_tuple else value


@pytest.mark.parametrize("name", get_args(FamilyName))
def test_edges_are_the_gradients_of_transformers(name: FamilyName) -> None:
    """Edges from tokens and MLP outputs into every logit, and the ledger, against a float64 model of transformers."""
    base = BaseModel(random_lm(name, torch.Generator().manual_seed(21)), None, f"tiny-{name}")
    graph = circuits.trace(circuits.Model(base, ()), PROMPT, settings=circuits.TraceSettings(unpruned=True))
    assert graph.metadata["ledger"]["max_relative_gap"] < 1e-5
    frozen = Frozen(base)
    last = frozen.hidden()[-1]
    weight = attrgetter(base.family.unembedding)(frozen.lm).weight
    targets = [i for i, kind in enumerate(graph.nodes.kind) if kind == "logit"]
    assert len(targets) > 1
    for target in targets:
        token = int(graph.nodes.feature[target])
        value = (weight[token] - weight.mean(0)) @ last
        leaves = [frozen.embedding, *frozen.mlp]
        gradients = torch.autograd.grad(value, leaves, retain_graph=True)
        expected = [(g * leaf).sum(-1)[0].detach() for g, leaf in zip(gradients, leaves, strict=True)]
        found = [torch.zeros(len(PROMPT), dtype=last.dtype) for _ in leaves]
        for edge in (graph.edges.target == target).nonzero()[0]:
            source = graph.edges.source[edge]
            layer = 0 if graph.nodes.kind[source] == "embedding" else int(graph.nodes.layer[source]) + 1
            found[layer][int(graph.nodes.position[source])] = float(graph.edges.weight[edge])
        for layer, (mine, reference) in enumerate(zip(found, expected, strict=True)):
            first = 1 if layer else 0  # what a special first position's MLPs write is no node
            largest = max(float(part.abs().max()) for part in expected)
            assert (mine[first:] - reference[first:]).abs().max() < 1e-5 * largest, (name, layer)
