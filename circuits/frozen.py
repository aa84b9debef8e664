"""Sublayers that stay in the linearized model: attention with its pattern frozen, and skip connections.

Shapes: B covectors, N writers, S positions, H query heads, K key-value heads, E head width, D model width. A post-norm
that a family has between a sublayer and the stream is frozen like any other norm.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from circuits.kernels.attend import pull_readers, pull_values, push_local, push_stream, push_values
from circuits.kernels.backend import Products, matmul
from circuits.model import AttentionWeights
from circuits.placing import at_layer
from circuits.recording import NormRecord
from circuits.replacements.sites import ReadSite


def whole(x: Tensor) -> slice:
    """The positions of vectors (..., S, D) that stand at every position from the first on."""
    return slice(0, x.shape[-2])


def standing(x: Tensor, positions: Tensor | slice | None) -> Tensor | slice:
    """The positions given, or every one from the first on."""
    return whole(x) if positions is None else positions


class FrozenAttention:
    """One layer's attention with its pattern and norms frozen: linear in the stream below it.

    `post` is the norm that some families have between the attention and the stream. `products` is how covectors that
    stand at every position are multiplied with weights: see `circuits.kernels.backend`. Pattern and norms are at home;
    the weights may lie elsewhere, and there is then the same once more `there`: see `circuits.placing`.
    """

    def __init__(
        self, weights: AttentionWeights, pattern: Tensor, norm: NormRecord, post: NormRecord | None = None
    ) -> None:
        self.weights, self.pattern, self.norm, self.post = weights, pattern, norm, post
        self.products: Products = "float32"
        self.n_heads = pattern.shape[0]
        self.home, at = pattern.device, weights.w_o.device
        self.there: FrozenAttention | None = None
        if at != self.home:
            self.there = FrozenAttention(weights, pattern.to(at), norm.to(at), None if post is None else post.to(at))

    def set_products(self, products: Products) -> None:
        """Multiply so from now on."""
        self.products = products
        if self.there is not None:
            self.there.set_products(products)

    def below_post(self, readers: Tensor, positions: Tensor | slice) -> Tensor:
        """Readers (..., D) of the attention output as readers of what its post-norm reads."""
        return readers if self.post is None else self.post.pull(readers, positions)

    @at_layer
    def head_readers(
        self, readers: Tensor, positions: Tensor | slice | None = None, *, below_post: bool = False
    ) -> Tensor:
        """Readers (..., D) of the attention output at `positions` as readers of the concatenated head outputs
        (..., H, E).

        positions
            One for each reader, or a slice that the last dimension but one stands for; all positions from the first on
            without it.
        below_post
            The readers are of what the post-norm reads.
        """
        if not below_post:
            readers = self.below_post(readers, standing(readers, positions))
        w_o = self.weights.w_o
        return (readers @ w_o.flatten(0, 1).T).reshape(*readers.shape[:-1], *w_o.shape[:2])

    @at_layer
    def reader_constants(self, readers: Tensor, positions: Tensor, *, below_post: bool = False) -> Tensor:
        """What readers (B, D) of the attention output make of the biases after the heads, (B,)."""
        total = readers.new_zeros(len(readers))
        if not below_post:
            if self.post is not None and self.post.bias is not None:
                total = total + readers @ self.post.bias
            readers = self.below_post(readers, positions)
        return total if self.weights.b_o is None else total + readers @ self.weights.b_o

    @at_layer
    def write(self, z: Tensor, positions: Tensor | slice, *, below_post: bool = False) -> Tensor:
        """Head outputs (..., H x E) at `positions` as what they add to the stream, (..., D), or to what the post-norm
        reads; biases left out."""
        y = z @ self.weights.w_o.flatten(0, 1)
        return y if self.post is None or below_post else self.post.apply(y, positions)

    @at_layer
    def pull_heads(self, positions: Tensor, u: Tensor, n_keys: int) -> Tensor:
        """Readers (B, H, E) of the head outputs at `positions` (B,) as covectors (B, n_keys, D) of `resid_pre`."""
        c = pull_readers(self.pattern, positions, u, self.weights.folded[1], n_keys)
        return c.mul_(self.norm.scale[:n_keys, None])

    @at_layer
    def pull_local(self, g: Tensor, positions: Tensor, n_keys: int) -> Tensor:
        """Covectors (B, D) of the attention output at `positions` (B,) as covectors (B, n_keys, D) of `resid_pre`."""
        return self.pull_heads(positions, self.head_readers(g, positions), n_keys)

    @at_layer
    def pull(self, g: Tensor) -> Tensor:
        """Covectors (B, S, D) of the attention output as covectors (B, S, D) of `resid_pre`, added to themselves.

        The norms stand in the weights, their scales in what has the width of the heads.
        """
        w_o, w_v = self.weights.folded
        scale = None if self.post is None else self.post.scale
        c = pull_values(self.pattern, g, w_o, len(w_v), scale, self.products).mul_(self.norm.scale[: g.shape[1], None])
        if self.products != "float32":
            return g + matmul(c.flatten(0, 1), w_v.flatten(0, 1), self.products, round_sum=True).view_as(g)
        return torch.addmm(g.flatten(0, 1), c.flatten(0, 1), w_v.flatten(0, 1)).view_as(g)

    @at_layer
    def pull_values(self, g: Tensor) -> Tensor:
        """Covectors (B, S, D) of the attention output as covectors (B, S, K x E) of the values."""
        scale = None if self.post is None else self.post.scale
        return pull_values(self.pattern, g, self.weights.folded[0], len(self.weights.w_v), scale, self.products)

    @at_layer
    def pull_value_readers(self, readers: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Readers (B, K x E) of the values at `positions` as covectors (B, D) of `resid_pre`, and what they make of the
        biases of the values and of the norm, (B,)."""
        constants = readers.new_zeros(len(readers))
        if self.weights.b_v is not None:
            constants = constants + readers @ self.weights.b_v.flatten()
        readers = readers @ self.weights.w_v.flatten(0, 1)
        if self.norm.bias is not None:
            constants = constants + readers @ self.norm.bias
        return self.norm.pull(readers, positions), constants

    @at_layer
    def read_values(self, x: Tensor, *, biases: bool = True) -> Tensor:
        """Values (..., S, K x E) of all key-value heads for the stream x (..., S, D) at `resid_pre`, or their linear
        part."""
        normed = self.norm.apply(x, slice(None))
        if biases and self.norm.bias is not None:
            normed = normed + self.norm.bias
        v = normed @ self.weights.w_v.flatten(0, 1).T
        return v if self.weights.b_v is None or not biases else v + self.weights.b_v.flatten()

    @at_layer
    def push(self, x: Tensor) -> Tensor:
        """Writers (N, S, D) in `resid_pre` as what they add to the stream (N, S, D)."""
        y = push_stream(self.pattern, self.norm.apply(x, whole(x)), self.weights.w_o, self.weights.w_v)
        return y if self.post is None else self.post.apply(y, whole(x))

    @at_layer
    def push_local(self, x: Tensor, positions: Tensor) -> Tensor:
        """Writers (N, D) in `resid_pre` at `positions` (N,) as what they add to the stream everywhere, (N, S, D)."""
        y = push_local(self.pattern, positions, self.values(x, positions), self.weights.w_o)
        return y if self.post is None else self.post.apply(y, whole(y))

    @at_layer
    def values(self, x: Tensor, positions: Tensor | slice) -> Tensor:
        """Values (n, H, E) of every head for stream vectors (n, D) at `positions` (n,)."""
        return push_values(self.norm.apply(x, positions), self.weights.w_v, self.n_heads)

    @cached_property
    @at_layer
    def head_bias(self) -> Tensor:
        """What norm and value biases add to the concatenated head outputs, (S, H, E)."""
        v = torch.zeros_like(self.weights.w_o[:, :, 0])
        if self.norm.bias is not None:
            v = v + push_values(self.norm.bias, self.weights.w_v, self.n_heads)
        if self.weights.b_v is not None:
            v = v + self.weights.b_v.repeat_interleave(self.n_heads // len(self.weights.b_v), dim=0)
        return self.pattern.sum(-1).T.unsqueeze(-1) * v

    @cached_property
    @at_layer
    def output_bias(self) -> Tensor:
        """What the layer's biases add to the stream, (S, D)."""
        return self.write(self.head_bias.flatten(1), slice(None)) + self.after_heads

    @property
    @at_layer
    def after_heads(self) -> Tensor:
        """What the biases behind the heads add to the stream, (S, D): of the output projection and of the post-norm."""
        total = self.norm.gain.new_zeros(self.pattern.shape[1], self.weights.w_o.shape[2])
        if self.weights.b_o is not None:
            total = total + self.weights.b_o
        if self.post is None:
            return total
        total = self.post.apply(total, slice(None))
        return total if self.post.bias is None else total + self.post.bias


@dataclass(frozen=True)
class Skip:
    """A transcoder's skip connection, `mlp_out += W_skip read(resid_mid)`, live at depth 2l + 2.

    `post` is the MLP's post-norm, for a transcoder that was trained before it. Norms are at home; the weight may lie
    elsewhere.
    """

    weight: Tensor
    read: ReadSite
    norm: NormRecord
    post: NormRecord | None = None

    @property
    def home(self) -> torch.device:
        return self.norm.scale.device

    @cached_property
    def there(self) -> "Skip | None":
        """The same where the weight lies: see `circuits.placing`."""
        at = self.weight.device
        if at == self.home:
            return None
        return replace(self, norm=self.norm.to(at), post=None if self.post is None else self.post.to(at))

    @at_layer
    def pull(self, g: Tensor, positions: Tensor | slice) -> Tensor:
        """Covectors (..., D) of the MLP output as covectors of `resid_mid` at the same positions."""
        if self.post is not None:
            g = self.post.pull(g, positions)
        g = g @ self.weight
        return g if self.read.norm == "none" else self.norm.pull(g, positions, gain=self.read.norm == "full")

    @at_layer
    def push(self, x: Tensor, positions: Tensor | slice) -> Tensor:
        """Stream vectors (..., D) at `resid_mid` as what they add to the MLP output."""
        if self.read.norm != "none":
            x = self.norm.apply(x, positions, gain=self.read.norm == "full")
        y = x @ self.weight.T
        return y if self.post is None else self.post.apply(y, positions)

    @property
    @at_layer
    def bias(self) -> Tensor | None:
        """What the norm's bias adds through the skip connection, (D,), or (S, D) through a post-norm."""
        if self.read.norm != "full" or self.norm.bias is None:
            return None
        bias = self.weight @ self.norm.bias
        return bias if self.post is None else self.post.apply(bias.expand(len(self.post.scale), -1), slice(None))
