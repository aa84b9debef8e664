"""Places in the stream where dictionaries read and write, and their names in files."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from circuits.replacements.errors import ReplacementError

Norm = Literal["full", "scale", "none"]
SITE_NAMES = ("resid_pre", "q", "k", "v", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")


@dataclass(frozen=True, order=True)
class Site:
    """A place in the stream: `Site("mlp_out", 3)`, written "mlp_out.3".

    `z` is the concatenated head outputs before W_O, width heads x head width; `q`, `k` and `v` are the queries (after
    rotary position, times the score scale), keys and values of all heads; all others have the model's width.
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
    also
        Further layers of the same site that are read side by side with it; written "v.4+10:none".
    """

    site: Site
    norm: Norm
    also: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ReplacementError(f"unknown norm {self.norm!r}; expected one of {', '.join(get_args(Norm))}")

    def __str__(self) -> str:
        return "+".join([str(self.site), *map(str, self.also)]) + f":{self.norm}"

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every single site that is read."""
        return (self.site, *(Site(self.site.name, layer) for layer in self.also))

    @staticmethod
    def parse(text: str) -> "ReadSite":
        """The inverse of `str`. Without a colon the norm is `none`."""
        sites, _, norm = text.partition(":")
        site, *also = sites.split("+")
        if not all(layer.isdigit() for layer in also):
            raise ReplacementError(f"unknown read site {text!r}; expected NAME.LAYER:NORM or NAME.LAYER+LAYER:NORM")
        return ReadSite(Site.parse(site), norm or "none", tuple(map(int, also)))  # type: ignore[arg-type]
