"""What every replacement looks like to the engine: dictionaries with a read site and write sites.

A dictionary reads one site of the stream at one position, has sparse features there, and writes a vector for each
active feature to one or several sites (DESIGN.md, section 3):

    pre_f = E_f . x + b_f             x: what the read site holds, (D,)
    a_f   = pre_f if active else 0
    y_s   = sum_f a_f W_dec_f,s + bias_s (+ skip . x at the first write site)

CLT, transcoder and attention output SAE are this with different sites. Two things may be added:

- *movement* (`moved_by`): features get from the source position where they are read to destination positions.
  Through the base layer's heads (`HeadLoading`) a feature has its gate at the source, and at the destination its
  activation is what arrives, `sum_s P_f[p, s] a_f[s]`; a pattern of its own (`OwnAttention`) moves pre-activations, and
  the gate stands at the destination.
- *rank*: a feature of rank r owns r rows of the encoder and of every decoder, `pre_f = E_f x + b_f` is a vector (r,),
  and so is what it writes from. Such a feature is one node: on a prompt it is the unit vector of its recorded
  pre-activation, its *direction*, that reads and writes.

A replacement is all the dictionaries that stand in one directory.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuits.kernels.encode import Activation, encode
from circuits.kernels.move import mix, move_features
from circuits.replacements.encoding import Encoder, blocks, encode_blocks, read
from circuits.replacements.errors import ReplacementError
from circuits.replacements.movement import HeadLoading, Movement, OwnAttention
from circuits.replacements.processing import Processing
from circuits.replacements.sites import ReadSite, Site
from circuits.replacements.weights import HeldTensor, LazyTensor, Rows


@dataclass(frozen=True)
class Active:
    """The active entries of one dictionary on one prompt, (n,) each, sorted by position, then feature.

    `directions` (n, r), unit vectors, are there for features of rank r > 1; activations and pre-activations are then
    lengths along them.
    """

    positions: Tensor
    features: Tensor
    activations: Tensor
    pre_activations: Tensor
    directions: Tensor | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, index: Tensor) -> "Active":
        """Some of the entries, by mask or by index."""
        directions = None if self.directions is None else self.directions[index]
        return Active(
            self.positions[index],
            self.features[index],
            self.activations[index],
            self.pre_activations[index],
            directions,
        )


@dataclass(frozen=True)
class Decoder:
    """Where a dictionary's decoder rows for one write site lie: `rows` (F, D), or column `column` of (F, W, D)."""

    rows: Rows
    column: int | None = None

    @property
    def width(self) -> int:
        return self.rows.shape[-1]

    def all(self) -> Tensor:
        """Every row, (R, D)."""
        return self.rows.rows(torch.arange(self.rows.shape[0]), column=self.column)


@dataclass(eq=False, kw_only=True)
class Dictionary:
    """One dictionary: `encode`, and rows of its encoder and decoders.

    Parameters
    ----------
    name, kind
        "clt.3" and "clt"; "transcoder", "attention-sae".
    read, writes
        Where it reads and where it writes, in the order of its decoders.
    activation, threshold
        `threshold` is (F,) or one number, for the activations that have one.
    W_enc, b_enc
        (F, D) and (F,), float32. `W_enc` may be given as `Rows` that stay in their file: it reads as a tensor all the
        same, but encoding takes a block of features at a time, and `encoder_rows` the rows asked for. If the dictionary
        subtracts its output bias from its input (as an SAE may), `b_enc` has `- W_enc @ b_dec` folded in already, so
        that `pre = W_enc @ x + b_enc` always.
    decoders
        Write site -> its rows, read lazily.
    output_biases
        Write site -> (D,). A CLT's bias of output layer l belongs to the dictionary of layer l.
    skip
        (D_out, D): the output at `writes[0]` gets `skip @ x`.
    before_post_norm
        The writes are the sublayer's own output, before a post-norm that the model may have (Gemma 2).
    moved_by
        How features get to other positions; None: they stay.
    rank
        r of every feature. `W_enc`, `b_enc` and decoders then have F r rows, feature f those from f r on.
    source
        The file or directory that it came from, for messages.
    """

    name: str
    kind: str
    read: ReadSite
    writes: tuple[Site, ...]
    activation: Activation
    W_enc: Encoder = Encoder()  # noqa: RUF009 - a descriptor, one for all
    b_enc: Tensor
    decoders: Mapping[Site, Decoder]
    output_biases: Mapping[Site, Tensor] = field(default_factory=dict)
    threshold: Tensor | None = None
    skip: Tensor | None = None
    before_post_norm: bool = False
    moved_by: Movement | None = None
    rank: int = 1
    source: str = "memory"

    @property
    def layer(self) -> int:
        return self.read.site.layer

    @property
    def n_features(self) -> int:
        return self.encoder.shape[0] // self.rank

    @property
    def d_read(self) -> int:
        return self.encoder.shape[1]

    @property
    def encoder(self) -> Rows:
        """The encoder by rows (F r, d_read), wherever it is."""
        found: Rows = self.__dict__["_encoder"]
        return found

    def place(self, device: torch.device) -> None:
        """Move to a device what encodes, and the skip connection.

        What is small and meets tensors of the whole model stays: output biases, and how features move. Whatever a
        dictionary gives is where the tensors are that it was given.
        """
        self.b_enc = self.b_enc.to(device)
        self.threshold = None if self.threshold is None else self.threshold.to(device)
        self.skip = None if self.skip is None else self.skip.to(device)
        if self.is_held:
            self.W_enc = self.W_enc.to(device)

    @property
    def is_held(self) -> bool:
        """Whether the encoder is in memory."""
        return isinstance(self.encoder, HeldTensor)

    def encode(self, x: Tensor) -> Active:
        """Active features for `x` (T, d_read); computed in float32 where the encoder is, returned where x is.

        With movement, x is one context from its first position on, and the entries are those of the side that has the
        gate: the source for a `HeadLoading`, the destination for an `OwnAttention`.
        """
        if x.ndim != 2 or x.shape[1] != self.d_read:
            raise ReplacementError(
                f"{self.source}: dictionary {self.name} reads {self.read} of width {self.d_read}, "
                f"but was given a tensor of shape {tuple(x.shape)}; it was trained for another model"
            )
        entries = self._entries(x.to(self.b_enc))
        active = Active(*(None if entry is None else entry.to(x.device) for entry in entries))  # type: ignore[arg-type]
        if isinstance(self.moved_by, HeadLoading) and self.moved_by.context_k is not None:
            return _strongest_features(active, self.moved_by.context_k, self.n_features)
        return active

    def _entries(self, x: Tensor) -> tuple[Tensor | None, ...]:
        own = isinstance(self.moved_by, OwnAttention)
        if self.is_held and self.rank == 1 and not own:
            return encode(x, self.W_enc, self.b_enc, self.activation, self.threshold)
        if self.activation.kind == "topk" and self.rank > 1:
            parts = iter([(slice(0, self.n_features), self.W_enc)])
        else:
            parts = blocks(self.encoder, len(x), self.rank, x.device)
        return encode_blocks(self._pre_activations(x, parts), self.activation, self.threshold, self.rank)

    def _pre_activations(self, x: Tensor, parts: Iterator[tuple[slice, Tensor]]) -> Iterator[tuple[slice, Tensor]]:
        """Pre-activations (T, f, r) of blocks of features, moved where the dictionary has patterns of its own."""
        own = self.moved_by if isinstance(self.moved_by, OwnAttention) else None
        patterns = None if own is None else own.patterns(x.to(own.W_q)).to(x)
        for block, weights in parts:
            bias = self.b_enc[block.start * self.rank : block.stop * self.rank]
            pre = torch.addmm(bias, x, weights.T).view(len(x), -1, self.rank)
            if own is not None and patterns is not None:
                pre = mix(patterns, pre, own.group[block].to(x.device))
            yield block, pre

    def move(self, active: Active, pattern: Tensor) -> Active:
        """What arrives at the destinations, for features that the base layer's heads move (`HeadLoading`).

        Parameters
        ----------
        active
            Of the source side.
        pattern
            (H, T, T) the base layer's patterns on the same context, [query, key].
        """
        assert isinstance(self.moved_by, HeadLoading)
        values = active.activations if active.directions is None else active.activations[:, None] * active.directions
        loading = self.moved_by.weights.to(pattern.device)
        positions, features, arrived = move_features(active.positions, active.features, values, loading, pattern)
        if active.directions is None:
            return Active(positions, features, arrived, arrived.clone())
        size = arrived.norm(dim=1)
        return Active(positions, features, size, size.clone(), arrived / size.unsqueeze(1))

    def encoder_rows(self, features: Tensor, directions: Tensor | None = None) -> Tensor:
        """(n, d_read), where `features` are: `encoder_rows @ x + encoder_bias` is the pre-activation.

        `directions` (n, r) for rank r > 1.
        """
        index = self._rows(features)
        rows = read(self.encoder, index.flatten(), features.device)
        return _along(rows.view(*index.shape, self.d_read), directions)

    def encoder_bias(self, features: Tensor, directions: Tensor | None = None) -> Tensor:
        """(n,)."""
        bias = self.b_enc[self._rows(features).to(self.b_enc.device)].to(features.device)
        return _along(bias.unsqueeze(-1), directions).squeeze(-1)

    def decoder_rows(
        self, features: Tensor, site: Site, directions: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """(n, d_write) float32, where `features` are: what one unit of each writes to `site`. Only these rows are read.

        `out` (n, d_write) is where they may be put, where they come as they are: see what is returned.
        """
        if site not in self.decoders:
            raise ReplacementError(
                f"{self.source}: dictionary {self.name} does not write to {site}, only to "
                f"{', '.join(str(write) for write in self.writes)}"
            )
        decoder = self.decoders[site]
        place = out if self.rank == 1 and out is not None and out.device.type == "cpu" else None
        index = self._rows(features.cpu()).flatten()
        rows = decoder.rows.rows(index, column=decoder.column, out=place).to(features.device)
        return _along(rows.view(len(features), self.rank, rows.shape[-1]), directions)

    def _rows(self, features: Tensor) -> Tensor:
        """(n, r): rows of each feature."""
        return features.unsqueeze(1) * self.rank + torch.arange(self.rank, device=features.device)

    def output_bias(self, site: Site) -> Tensor | None:
        """(d_write,), or None where the dictionary has none."""
        return self.output_biases.get(site)


def _along(rows: Tensor, directions: Tensor | None) -> Tensor:
    """Rows (n, r, D) of features, taken along their directions (n, r): (n, D)."""
    if directions is None:
        return rows.squeeze(1)
    return torch.einsum("nrd,nr->nd", rows, directions.to(rows))


def _strongest_features(active: Active, k: int, n_features: int) -> Active:
    """The entries of the k features whose activations, summed over the context, are largest."""
    total = active.activations.new_zeros(n_features).index_add_(0, active.features, active.activations)
    if int((total > 0).sum()) <= k:
        return active
    moved = torch.zeros(n_features, dtype=torch.bool, device=total.device)
    moved[total.topk(k).indices] = True
    return active.take(moved[active.features])


@dataclass(eq=False)
class Replacement:
    """The dictionaries of one directory.

    model
        What the replacement says about the model it was trained on ("name", "hash"); may be empty.
    training
        Figures of its training; may be empty.
    files
        What `identity` is taken over.
    processing
        What was done to the model's weights before it was trained on, where it was not Hugging Face's own model.
    """

    name: str
    path: Path
    format: str
    dictionaries: tuple[Dictionary, ...]
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    processing: Processing | None = None

    @cached_property
    def identity(self) -> str:
        """SHA-256 over names and contents of the replacement's files: the same wherever they lie."""
        digest = hashlib.sha256()
        for file in sorted(self.files, key=lambda file: file.name):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()

    def hold_encoders(self, memory: int, *, needed: bool = False) -> int:
        """Take encoders that are still in their files into memory, one after another, as long as they fit.

        memory
            Bytes that all encoders in memory may take. Returns what is left of it.
        needed
            Leave out those that gain nothing by it: they are float32 in their file and used on the CPU, so the system
            keeps them in memory as far as it has any to spare.
        """
        for dictionary in self.dictionaries:
            size, encoder = 4 * prod(dictionary.encoder.shape), dictionary.encoder
            mapped = isinstance(encoder, LazyTensor) and encoder.reads_as_stored
            if needed and mapped and dictionary.b_enc.device.type == "cpu":
                continue
            if not dictionary.is_held and size <= memory:
                dictionary.W_enc = encoder.all().to(dictionary.b_enc.device)
            memory -= size if dictionary.is_held else 0
        return max(0, memory)

    def check(self, n_layers: int, d_model: int, d_z: int, d_v: int) -> None:
        """Raise `ReplacementError` unless every dictionary fits a model of this shape.

        d_z, d_v
            Width of the concatenated head outputs (heads x head width) and values (key-value heads x head width).
        """
        widths = {"z": d_z, "q": d_z, "k": d_v, "v": d_v}
        for dictionary in self.dictionaries:
            reads = dictionary.read.sites
            parts = [(f"reads {dictionary.read}", site, dictionary.d_read // len(reads)) for site in reads]
            parts += [(f"writes {site}", site, dictionary.decoders[site].width) for site in dictionary.writes]
            for what, site, width in parts:
                expected = widths.get(site.name, d_model)
                if site.layer >= n_layers or width != expected:
                    raise ReplacementError(
                        f"{dictionary.source}: replacement for another model: dictionary {dictionary.name} {what} with "
                        f"width {width}; the model has layers 0 to {n_layers - 1} and width {expected} at {site.name}; "
                        "give the model that the replacement was trained on"
                    )
