"""Documents run through a base model for their features: what dictionaries read, and which features are active where.

Letters of shapes: C documents of a batch, S positions, H heads, E head width, D model width, n active entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from circuits.capturing import capturing
from circuits.families import part
from circuits.model import BaseModel
from circuits.prompt import special_ids
from circuits.recording import cast_up
from circuits.replaced import captured, join_actives
from circuits.replacements.dictionary import Active, Dictionary
from circuits.replacements.movement import HeadLoading
from circuits.replacements.sites import ReadSite, Site
from circuits.text import Document, pad


@dataclass(frozen=True)
class Documents:
    """Documents and what the base model had on them, in float32.

    Attributes
    ----------
    documents, mask
        The documents, and (C, S), true at their tokens.
    counted
        (C, S), true where a feature counts: not at a special first token, which carries no feature nodes.
    kept
        Values by site, (C, S, D), and "pattern.l", (C, H, S, S).
    """

    model: BaseModel
    documents: tuple[Document, ...]
    mask: Tensor
    counted: Tensor
    kept: dict[str, Tensor]

    def inputs(self, dictionary: Dictionary) -> Tensor:
        """What a dictionary reads, (C, S, d_read)."""
        read = dictionary.read
        if read.norm != "scale":
            return self.kept[str(captured(dictionary, read))]
        value, family = self.kept[str(read.site)], self.model.family
        path = family.attention_norm if read.site.name == "resid_pre" else family.mlp_norm
        scale = self.model.norm_scale(part(self.model.blocks[read.site.layer], path), value)
        if family.norm == "layer":
            value = value - value.mean(-1, keepdim=True)
        return value * scale.unsqueeze(-1)

    def encode(self, dictionary: Dictionary) -> Active:
        """Active features on the side that has the gate; position c S + s stands for position s of document c."""
        x = self.inputs(dictionary)
        moved, (n_documents, width, _) = dictionary.moved_by, x.shape
        if moved is None or (isinstance(moved, HeadLoading) and moved.context_k is None):
            active = dictionary.encode(x.flatten(0, 1))
            return active.take(self.mask.flatten()[active.positions])
        found = []
        for c in range(n_documents):
            active = dictionary.encode(x[c, : len(self.documents[c])])
            found.append(replace(active, positions=active.positions + c * width))
        return join_actives(found)

    def head_parts(self, dictionary: Dictionary, entries: Active) -> Tensor:
        """What each head of its layer gives to entries of a dictionary that reads an attention output, (n, H).

        Up to the positive denominator of a post-norm, where there is one.
        """
        z = self.kept[f"z.{dictionary.layer}"].flatten(0, 1)[entries.positions]
        readers = dictionary.encoder_rows(entries.features, entries.directions).to(z)
        w_o = self.model.attention_weights(dictionary.layer).w_o
        z = z.view(len(z), len(w_o), -1)
        if dictionary.read.site.name == "z":
            return (readers.view_as(z) * z).sum(-1)
        path = self.model.family.attention_post_norm
        if path is not None and not dictionary.before_post_norm:
            readers = readers * self.model.norm_parameters(part(self.model.blocks[dictionary.layer], path))[0]
        return torch.stack([((readers @ w_o[h].T) * z[:, h]).sum(-1) for h in range(len(w_o))], dim=1)


@torch.no_grad()
def run_documents(model: BaseModel, documents: Sequence[Document], dictionaries: Sequence[Dictionary]) -> Documents:
    """Run the base model on documents and keep what the dictionaries need."""
    ids, mask = pad(documents, model.device)
    kept: dict[str, Tensor] = {}
    with cast_up(model), capturing(model, _wanted(dictionaries), kept):
        embedding = part(model.lm, model.family.embedding)(ids).float()
        part(model.lm, model.family.trunk)(inputs_embeds=embedding, use_cache=False)
    special, counted = special_ids(model), mask.clone()
    counted[:, 0] &= torch.tensor([document[0] not in special for document in documents], device=mask.device)
    return Documents(model, tuple(documents), mask, counted, kept)


def reads_heads(dictionary: Dictionary) -> bool:
    """Whether a dictionary reads the outputs of its own layer's heads, so that each head has a share in it."""
    return dictionary.read.site.name in ("attn_out", "z")


def _wanted(dictionaries: Sequence[Dictionary]) -> list[ReadSite | Site | str]:
    wanted: list[ReadSite | Site | str] = []
    for dictionary in dictionaries:
        scaled = dictionary.read.norm == "scale"
        wanted.append(dictionary.read.site if scaled else captured(dictionary, dictionary.read))
        if reads_heads(dictionary):
            wanted.append(Site("z", dictionary.layer))
        if isinstance(dictionary.moved_by, HeadLoading):
            wanted.append(f"pattern.{dictionary.layer}")
    return list(dict.fromkeys(wanted))
