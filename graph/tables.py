"""The columns of a graph: nodes, edges and head loadings, each a set of equally long arrays.

A graph of a million edges is then a handful of arrays, quick to filter and to save.
Shapes: `n` nodes, `m` edges, `k` head loadings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from circuits.graph.errors import GraphError

# In the order in which they stand within a layer, from below.
KINDS = (
    "embedding",
    "value_feature",
    "value_error",
    "mtc_key",
    "attention_feature",
    "mtc_query",
    "attention_error",
    "mlp_feature",
    "mlp_error",
    "block_error",
    "logit",
)
FEATURE_KINDS = ("value_feature", "mtc_key", "attention_feature", "mtc_query", "mlp_feature")
ERROR_KINDS = ("value_error", "attention_error", "mlp_error", "block_error")
# What the id of a node of each kind begins with; logits begin with their layer, as MLP features do.
ID_PREFIXES = {
    "embedding": "E",
    "value_feature": "v",
    "value_error": "v",
    "mtc_key": "k",
    "attention_feature": "a",
    "mtc_query": "q",
    "attention_error": "a",
    "mlp_feature": "",
    "mlp_error": "",
    "block_error": "r",
    "logit": "",
}
# Heads that the base layer does not have: the identity of a multitoken transcoder, and a feature's own pattern.
IDENTITY_HEAD = -1
OWN_HEAD = -2
# In hop splits alone: the part of an edge that never leaves its position, and the sum of hops too small to be listed.
STAYS = -3
REST = -4
SPECIAL_HEADS = {IDENTITY_HEAD: "id", OWN_HEAD: "own", STAYS: "stays", REST: "rest"}

Strings: TypeAlias = npt.NDArray[np.str_]
Booleans: TypeAlias = npt.NDArray[np.bool_]
Int32: TypeAlias = npt.NDArray[np.int32]
Int64: TypeAlias = npt.NDArray[np.int64]
Float32: TypeAlias = npt.NDArray[np.float32]
Float64: TypeAlias = npt.NDArray[np.float64]

NODE_COLUMNS: dict[str, type[np.generic]] = {
    "kind": np.str_,
    "dictionary": np.str_,
    "layer": np.int32,
    "position": np.int32,
    "feature": np.int64,
    "activation": np.float32,
    "pre_activation": np.float32,
    "bias": np.float32,
    "influence": np.float64,
    "cumulative_influence": np.float64,
    "target_weight": np.float64,
    "probability": np.float32,
    "predicted": np.float32,
    "measured": np.float32,
    "label": np.str_,
}
EDGE_COLUMNS: dict[str, type[np.generic]] = {"source": np.int32, "target": np.int32, "weight": np.float32}
HEAD_COLUMNS: dict[str, type[np.generic]] = {
    "edge": np.int32,
    "layer": np.int32,
    "head": np.int32,
    "key": np.int32,
    "query": np.int32,
    "weight": np.float32,
}


def head_name(head: int, *, layer: int | None = None) -> str:
    """A head as it is shown everywhere.

    Example:
        >>> head_name(5), head_name(5, layer=2), head_name(IDENTITY_HEAD), head_name(OWN_HEAD, layer=2)
        ('H5', 'L2H5', 'id', 'L2 own')

    Args:
        head: Index of the head in its layer, or one of `SPECIAL_HEADS`.
        layer: Its layer, to be named too; what is no head of any layer (`STAYS`, `REST`) is named without.
    """
    name = SPECIAL_HEADS.get(head)
    if name is None:
        return f"H{head}" if layer is None else f"L{layer}H{head}"
    return name if layer is None or head <= STAYS else f"L{layer} {name}"


def column(owner: str, name: str, values: object, dtype: type[np.generic]) -> npt.NDArray[Any]:
    """Bring one column to its type: a one-dimensional, read-only array.

    Numbers change width where needed, but text never becomes a number and a float never an integer.

    Args:
        owner: What the column belongs to, for the message.
        name: The column's name, for the message.
        values: Anything that numpy makes an array of.
        dtype: The type that the column has in this module's tables.

    Raises:
        GraphError: The values are no flat list of that type.
    """
    given = np.asarray(values)
    if given.ndim != 1:
        raise GraphError(f"{owner}.{name} has shape {given.shape}; expected one dimension: one value for each row.")
    if not given.size:
        given = np.zeros(0, dtype=dtype)
    if (given.dtype.kind == "U") != (dtype is np.str_) or not np.can_cast(given.dtype, dtype, "same_kind"):
        raise GraphError(f"{owner}.{name} has type {given.dtype}; expected {np.dtype(dtype).name}. Convert it first.")
    array = (given if dtype is np.str_ else given.astype(dtype, copy=False)).view()
    array.flags.writeable = False
    return array


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of equal length; the fields of a subclass are its columns."""

    def _freeze(self, columns: dict[str, type[np.generic]]) -> None:
        owner = type(self).__name__
        for name, dtype in columns.items():
            object.__setattr__(self, name, column(owner, name, getattr(self, name), dtype))
        lengths = {name: len(getattr(self, name)) for name in columns}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise GraphError(f"{owner} has columns of different lengths ({listed}); expected one value for each row.")

    def __len__(self) -> int:
        """The number of rows."""
        return len(getattr(self, dataclasses.fields(self)[0].name))

    def take(self, rows: Booleans | Int64) -> Self:
        """The given rows only, by mask or by index, in the order given."""
        names = [field.name for field in dataclasses.fields(self)]
        return type(self)(**{name: getattr(self, name)[rows] for name in names})

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """All columns by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclass(frozen=True, eq=False)
class Nodes(Table):
    """The nodes of a graph; every column has shape (n,).

    Attributes:
        kind: One of `KINDS`. A feature of a multitoken transcoder stands twice under the same dictionary and feature:
            `mtc_key` where it is read, `mtc_query` where it writes.
        dictionary: Name of the replacement dictionary, such as "clt.3"; "" where there is none.
        layer: Layer of the model; -1 for embeddings, the number of layers for logits.
        position: Position in the prompt.
        feature: Index of the feature; token id of embeddings and logits (-1 for a direction); -1 for errors.
        activation: Activation of a feature, nan where there is none.
        pre_activation: What a target's incoming edges and bias add up to, nan where there is none.
        bias: The target's bias in the ledger, nan where there is none.
        influence: Influence on the targets, over all paths of the full graph.
        cumulative_influence: Share of the summed influence that this node and all stronger ones hold, in the
            full graph: near 0 for the strongest, 1 for the weakest.
        target_weight: The influence that a target starts with (a logit's probability), 0 for other nodes.
        probability: Probability of a logit's token, nan elsewhere.
        predicted: Change of the target when this node is ablated, as the graph predicts it; nan where not tested.
        measured: The same change as it was measured in the base model; nan where not tested.
        label: Text of a token; what is known about a feature, mostly ""; "" for errors.

    Raises:
        GraphError: A column is misshapen or of the wrong type, or a kind is unknown.
    """

    kind: Strings
    dictionary: Strings
    layer: Int32
    position: Int32
    feature: Int64
    activation: Float32
    pre_activation: Float32
    bias: Float32
    influence: Float64
    cumulative_influence: Float64
    target_weight: Float64
    probability: Float32
    predicted: Float32
    measured: Float32
    label: Strings

    def __post_init__(self) -> None:
        """Bring every column to its type and check what is in it."""
        self._freeze(NODE_COLUMNS)
        if unknown := set(np.unique(self.kind).tolist()) - set(KINDS):
            raise GraphError(f"Nodes.kind has {sorted(unknown)}; expected only {', '.join(KINDS)}.")

    @property
    def is_feature(self) -> Booleans:
        """(n,) true for features of replacements."""
        return np.isin(self.kind, FEATURE_KINDS)

    @property
    def is_error(self) -> Booleans:
        """(n,) true for error nodes."""
        return np.isin(self.kind, ERROR_KINDS)

    @property
    def is_target(self) -> Booleans:
        """(n,) true for logits and for every other node that the trace started from."""
        is_logit: Booleans = self.kind == "logit"
        return is_logit | (self.target_weight > 0)


@dataclass(frozen=True, eq=False)
class Edges(Table):
    """The edges of a graph; every column has shape (m,).

    Attributes:
        source: Index of the node that writes.
        target: Index of the node that reads.
        weight: Direct effect of the source on the target's pre-activation, in the target's own units.

    Raises:
        GraphError: A column is misshapen or of the wrong type, or a weight is not finite.
    """

    source: Int32
    target: Int32
    weight: Float32

    def __post_init__(self) -> None:
        """Bring every column to its type and check that all weights are finite."""
        self._freeze(EDGE_COLUMNS)
        if bad := int(np.count_nonzero(~np.isfinite(self.weight))):
            raise GraphError(f"Edges.weight has {bad} values that are not finite; the model or a replacement has NaNs.")

    @classmethod
    def empty(cls) -> Edges:
        """No edges."""
        return cls(source=np.zeros(0, np.int32), target=np.zeros(0, np.int32), weight=np.zeros(0, np.float32))


@dataclass(frozen=True, eq=False)
class Heads(Table):
    """The head loadings of edges that run through attention; every column has shape (k,).

    The loadings of one edge add up to its weight; each of them may be negative.

    Attributes:
        edge: Index of the edge.
        layer: Layer of the head.
        head: Index of the head in its layer; `IDENTITY_HEAD` for the identity of a multitoken transcoder, `OWN_HEAD`
            for the own pattern of an attention replacement layer's feature; in hop splits alone `STAYS` and `REST`.
        key: Position that the head reads from.
        query: Position that the head writes to.
        weight: The share of the edge's weight that this head carries from key to query.

    Raises:
        GraphError: A column is misshapen or of the wrong type, a loading is not finite, or a head is unknown.
    """

    edge: Int32
    layer: Int32
    head: Int32
    key: Int32
    query: Int32
    weight: Float32

    def __post_init__(self) -> None:
        """Bring every column to its type and check heads and loadings."""
        self._freeze(HEAD_COLUMNS)
        if bad := int(np.count_nonzero(~np.isfinite(self.weight))):
            raise GraphError(f"Heads.weight has {bad} values that are not finite; the model or a replacement has NaNs.")
        if (unknown := self.head[self.head < REST]).size:
            known = ", ".join(f"{head} ({name})" for head, name in SPECIAL_HEADS.items())
            raise GraphError(f"Heads.head has {unknown[0]}; expected a head's index, or {known}.")

    @classmethod
    def empty(cls) -> Heads:
        """No head loadings."""
        return cls.from_rows([])

    @classmethod
    def from_rows(cls, rows: Sequence[tuple[Any, ...]]) -> Heads:
        """Loadings from rows of (edge, layer, head, key, query, weight).

        Raises:
            ValueError: The rows do not have six values each.
            TypeError: A value is no number.
        """
        columns = list(zip(*rows, strict=True)) if rows else [()] * len(HEAD_COLUMNS)
        named = zip(HEAD_COLUMNS.items(), columns, strict=True)
        return cls(**{name: np.array(values, dtype=dtype) for (name, dtype), values in named})
