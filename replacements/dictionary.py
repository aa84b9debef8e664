"""What every replacement looks like to the engine: dictionaries with a read site and write sites.

A dictionary reads one site of the stream at one position, has sparse features there, and writes a vector for each
active feature to one or several sites (DESIGN.md, section 3):

    pre_f = E_f . x + b_f             x: what the read site holds, (D,)
    a_f   = pre_f if active else 0
    y_s   = sum_f a_f W_dec_f,s + bias_s (+ skip . x at the first write site)

CLT, transcoder and attention output SAE are this with different sites. A replacement is all the dictionaries that
stand in one directory.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from circuits.kernels.encode import Activation, encode
from circuits.replacements.errors import ReplacementError
from circuits.replacements.weights import Rows

Norm = Literal["full", "scale", "none"]
SITE_NAMES = ("resid_pre", "attn_out", "z", "resid_mid", "mlp_out", "resid_post")


@dataclass(frozen=True, order=True)
class Site:
    """A place in the stream: `Site("mlp_out", 3)`, written "mlp_out.3".

    `z` is the concatenated head outputs before W_O, width heads x head width; all others have the model's width.
    """

    name: str
    layer: int

    def __post_init__(self) -> None:
        if self.name not in SITE_NAMES or self.layer < 0:
            raise ReplacementError(
                f"unknown site {self.name}.{self.layer}; expected NAME.LAYER with NAME one of {', '.join(SITE_NAMES)}"
            )

    def __str__(self) -> str:
        return f"{self.name}.{self.layer}"

    @staticmethod
    def parse(text: str) -> "Site":
        """The inverse of `str`: `Site.parse("mlp_out.3") == Site("mlp_out", 3)`."""
        found = re.fullmatch(r"(\w+)\.(\d+)", text)
        if not found:
            raise ReplacementError(f"unknown site {text!r}; expected NAME.LAYER, such as mlp_out.3")
        return Site(found[1], int(found[2]))


@dataclass(frozen=True, order=True)
class ReadSite:
    """A site and what is done to it before a dictionary reads it; written "resid_mid.3:full".

    norm
        `full`: the block's norm with gain and bias. `scale`: normalised, without gain and bias. `none`: the raw site.
    """

    site: Site
    norm: Norm

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ReplacementError(f"unknown norm {self.norm!r}; expected one of {', '.join(get_args(Norm))}")

    def __str__(self) -> str:
        return f"{self.site}:{self.norm}"

    @staticmethod
    def parse(text: str) -> "ReadSite":
        """The inverse of `str`. Without a colon the norm is `none`."""
        site, _, norm = text.partition(":")
        return ReadSite(Site.parse(site), norm or "none")  # type: ignore[arg-type]


@dataclass(frozen=True)
class Active:
    """The active entries of one dictionary on one prompt, (n,) each, sorted by position, then feature."""

    positions: Tensor
    features: Tensor
    activations: Tensor
    pre_activations: Tensor

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True)
class Decoder:
    """Where a dictionary's decoder rows for one write site lie: `rows` (F, D), or column `column` of (F, W, D)."""

    rows: Rows
    column: int | None = None

    @property
    def width(self) -> int:
        return self.rows.shape[-1]


@dataclass(eq=False)
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
        (F, D) and (F,), float32. If the dictionary subtracts its output bias from its input (as an SAE may),
        `b_enc` has `- W_enc @ b_dec` folded in already, so that `pre = W_enc @ x + b_enc` always.
    decoders
        Write site -> its rows, read lazily.
    output_biases
        Write site -> (D,). A CLT's bias of output layer l belongs to the dictionary of layer l.
    skip
        (D_out, D): the output at `writes[0]` gets `skip @ x`.
    before_post_norm
        The writes are the sublayer's own output, before a post-norm that the model may have (Gemma 2).
    source
        The file or directory that it came from, for messages.
    """

    name: str
    kind: str
    read: ReadSite
    writes: tuple[Site, ...]
    activation: Activation
    W_enc: Tensor
    b_enc: Tensor
    decoders: Mapping[Site, Decoder]
    output_biases: Mapping[Site, Tensor] = field(default_factory=dict)
    threshold: Tensor | None = None
    skip: Tensor | None = None
    before_post_norm: bool = False
    source: str = "memory"

    @property
    def layer(self) -> int:
        return self.read.site.layer

    @property
    def n_features(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_read(self) -> int:
        return self.W_enc.shape[1]

    def encode(self, x: Tensor) -> Active:
        """Active features for `x` (T, d_read); computed in float32 where the encoder is, returned where x is."""
        if x.ndim != 2 or x.shape[1] != self.d_read:
            raise ReplacementError(
                f"{self.source}: dictionary {self.name} reads {self.read} of width {self.d_read}, "
                f"but was given a tensor of shape {tuple(x.shape)}; it was trained for another model"
            )
        entries = encode(x.to(self.W_enc), self.W_enc, self.b_enc, self.activation, self.threshold)
        return Active(*(entry.to(x.device) for entry in entries))

    def encoder_rows(self, features: Tensor) -> Tensor:
        """(n, d_read): `encoder_rows @ x + encoder_bias` is the pre-activation."""
        return self.W_enc[features.to(self.W_enc.device)]

    def encoder_bias(self, features: Tensor) -> Tensor:
        """(n,)."""
        return self.b_enc[features.to(self.b_enc.device)]

    def decoder_rows(self, features: Tensor, site: Site) -> Tensor:
        """(n, d_write) float32: what one unit of each feature writes to `site`. Only these rows are read."""
        if site not in self.decoders:
            raise ReplacementError(
                f"{self.source}: dictionary {self.name} does not write to {site}, only to "
                f"{', '.join(str(write) for write in self.writes)}"
            )
        decoder = self.decoders[site]
        unique, inverse = torch.unique(features.cpu(), return_inverse=True)
        rows = decoder.rows.rows(unique, column=decoder.column)
        return rows.to(self.W_enc.device)[inverse.to(self.W_enc.device)]

    def output_bias(self, site: Site) -> Tensor | None:
        """(d_write,), or None where the dictionary has none."""
        return self.output_biases.get(site)


@dataclass(eq=False)
class Replacement:
    """The dictionaries of one directory.

    model
        What the replacement says about the model it was trained on ("name", "hash"); may be empty.
    training
        Figures of its training; may be empty.
    files
        What `identity` is taken over.
    """

    name: str
    path: Path
    format: str
    dictionaries: tuple[Dictionary, ...]
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

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

    def check(self, n_layers: int, d_model: int, d_z: int) -> None:
        """Raise `ReplacementError` unless every dictionary fits a model of this shape.

        d_z
            Width of the concatenated head outputs, heads x head width.
        """
        for dictionary in self.dictionaries:
            widths = [(f"reads {dictionary.read}", dictionary.read.site, dictionary.d_read)]
            widths += [(f"writes {site}", site, dictionary.decoders[site].width) for site in dictionary.writes]
            for what, site, width in widths:
                expected = d_z if site.name == "z" else d_model
                if site.layer >= n_layers or width != expected:
                    raise ReplacementError(
                        f"{dictionary.source}: replacement for another model: dictionary {dictionary.name} {what} with "
                        f"width {width}; the model has layers 0 to {n_layers - 1} and width {expected} at {site.name}; "
                        "give the model that the replacement was trained on"
                    )


def load_replacement(path: str | Path, device: str | torch.device = "cpu") -> Replacement:
    """Read the replacement in the directory `path`; its format is told by its content.

    Encoders and biases are loaded whole as float32 to `device`, decoders stay in their files.

    Raises
    ------
    ReplacementError
        No format is recognised, or a file does not hold what it should.
    """
    # Here and not at the top: the formats build the classes of this file.
    from circuits.replacements.formats import circuit_tracer, native

    path = Path(path)
    if not path.is_dir():
        raise ReplacementError(f"{path}: no such directory; a replacement is a directory on this machine")
    if (path / native.MANIFEST).is_file():
        return native.load(path, str(device))
    if (path / circuit_tracer.CONFIG).is_file():
        return circuit_tracer.load(path, str(device))
    raise ReplacementError(
        f"{path}: no replacement of a known format here; looked for {native.MANIFEST} (circuits) and "
        f"{circuit_tracer.CONFIG} (circuit-tracer)"
    )
