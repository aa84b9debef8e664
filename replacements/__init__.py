"""Dictionaries that stand for attention or MLP outputs: read from files, run on activations, trained."""

from circuits.replacements.dictionary import Active, Decoder, Dictionary, Replacement
from circuits.replacements.errors import ReplacementError
from circuits.replacements.loading import load_replacement
from circuits.replacements.sites import ReadSite, Site

__all__ = [
    "Active",
    "Decoder",
    "Dictionary",
    "ReadSite",
    "Replacement",
    "ReplacementError",
    "Site",
    "load_replacement",
]
