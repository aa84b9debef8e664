"""Addresses of nodes in a prompt: node ids as a graph gives them, with a position or a range at the end."""

import re
from dataclasses import dataclass

from circuits.errors import CircuitsError
from circuits.graph.tables import ERROR_KINDS, FEATURE_KINDS, ID_PREFIXES

GRAMMAR = """expected a node id with a position or a range at its end:
  LAYER_FEATURE_POSITION    an MLP feature, such as 2_17_3; with a letter in front: a attention,
                            k and q the key and the query side of an MTC, v values
  LAYER_error_POSITION      an error, such as 2_error_7, a2_error_7, v0_error_3, r1_error_3 (of a block)
  E_TOKEN_POSITION          a token by its id, such as E_17_3
  POSITION                  3, or 3:8 (3 to 7), 5: (from 5 on, generated tokens too), : (all)
  @DICTIONARY               behind it, where several dictionaries have such a node: k1_5_4@mtc.1"""
_POSITION = re.compile(r"(\d+)(?:_(\d+))?|(\d*):(\d*)")
_FEATURES = {ID_PREFIXES[kind]: kind for kind in FEATURE_KINDS}
_ERRORS = {ID_PREFIXES[kind]: kind for kind in ERROR_KINDS}


@dataclass(frozen=True)
class Address:
    """One node, or nodes that differ in their position alone.

    kind
        As in a graph's nodes; "embedding" for a token.
    layer, feature
        -1 for a token's layer and an error's feature; `feature` is the id of a token.
    start, stop
        Positions; `stop` is None where the range is open.
    nth
        Of the nodes that would have this id, which: an id that comes again in a graph ends with `_2`, `_3`.
    dictionary
        Name of the dictionary whose node it is; None: not said.
    """

    text: str
    kind: str
    layer: int
    feature: int
    start: int
    stop: int | None
    nth: int = 1
    dictionary: str | None = None

    @property
    def is_feature(self) -> bool:
        return self.kind in FEATURE_KINDS

    @property
    def is_range(self) -> bool:
        return self.stop != self.start + 1


def parse_address(text: str) -> Address:
    """Read an address.

    Example
    -------
    >>> address = parse_address("a2_153_5:")
    >>> address.kind, address.layer, address.feature, address.start, address.stop
    ('attention_feature', 2, 153, 5, None)

    Raises
    ------
    CircuitsError
        It is none; the message says which part is wrong, and how an address looks.
    """
    node, _, dictionary = text.partition("@")
    pieces = node.split("_", 2)
    if len(pieces) < 3:
        raise _bad(text, f"it has {len(pieces)} of three parts joined by '_'")
    place, what, where = pieces
    start, stop, nth = _positions(text, where)
    named = dictionary or None
    if place == "E":
        if not what.isdigit():
            raise _bad(text, f"{what!r} is no token id")
        return Address(text, "embedding", -1, int(what), start, stop, nth, named)
    found = re.fullmatch(r"([a-zA-Z]*)(\d+)", place)
    if found is None:
        raise _bad(text, f"{place!r} is no layer")
    prefix, layer = found[1], int(found[2])
    if what == "error":
        if prefix not in _ERRORS:
            raise _bad(text, f"there is no error of {prefix!r}; errors begin with their layer, or with a, v or r")
        return Address(text, _ERRORS[prefix], layer, -1, start, stop, nth, named)
    if not what.isdigit():
        raise _bad(text, f"{what!r} is neither a feature number nor 'error'")
    if prefix not in _FEATURES:
        raise _bad(text, f"there is no feature of {prefix!r}; features begin with their layer, or with a, k, q or v")
    return Address(text, _FEATURES[prefix], layer, int(what), start, stop, nth, named)


def _positions(text: str, where: str) -> tuple[int, int | None, int]:
    """First position, the one behind the last or None, and which node of this id."""
    found = _POSITION.fullmatch(where)
    if found is None:
        raise _bad(text, f"{where!r} is no position and no range")
    if found[1] is not None:
        return int(found[1]), int(found[1]) + 1, int(found[2] or 1)
    start, stop = int(found[3] or 0), int(found[4]) if found[4] else None
    if stop is not None and stop <= start:
        raise _bad(text, f"the range {where!r} is empty")
    return start, stop, 1


def _bad(text: str, what: str) -> CircuitsError:
    return CircuitsError(f"{text!r} is no address of a node: {what}; {GRAMMAR}")
