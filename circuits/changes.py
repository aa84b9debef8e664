"""What interventions ask for, and what that means in one prompt: dictionaries, features, positions and vectors.

Every change of a feature is affine in its current activation a, which is a vector (r,) for a feature of rank r:

    new = keep * a + gain * u        u: the feature's direction; 1 for rank one

so several changes of one feature make one `keep` and one `gain` for each position, whatever their order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from circuits.addresses import GRAMMAR, Address, parse_address
from circuits.errors import CircuitsError
from circuits.linearize import LinearizedModel
from circuits.nodes import NodeTable
from circuits.replacements.dictionary import Dictionary
from circuits.replacements.movement import HeadLoading

How = Literal["ablate", "set", "scale", "add"]
HOWS = ("ablate", "set", "scale", "add")
PATTERN_HOWS = ("set", "scale", "row")
Side = Literal["key", "query", "own"]


@dataclass(frozen=True)
class Change:
    """One change of a node's activation.

    node
        Its address: a node id, whose position may be a range, such as `a2_153_7`, `2_17_3:8`, `k1_5_4`, `q1_5_9`,
        `v0_3_2`, `2_17_5:` (open: generated tokens too), `2_17_:` (all), errors `a2_error_7`, `r1_error_3`, tokens
        `E_17_3`. Where two dictionaries have such a node, `@NAME` behind it says which: `k1_5_4@mtc.1`. A range leaves
        a special first position out, which has no feature and error nodes.
    how
        `ablate` makes the activation zero, `set` makes it `value`, `scale` multiplies it by `value`, `add` adds
        `value`. The activation of an error or a token counts as one: its recorded vector is what is scaled. A feature
        of rank above one has a vector: `set` and `add` go along its recorded direction, or where it was not active
        along the one that its pre-activation has now; where nothing arrives there is none, and nothing is set.
    """

    node: str
    how: How
    value: float = 0.0

    def __post_init__(self) -> None:
        if self.how not in HOWS:
            raise CircuitsError(f"{self.node}: unknown change {self.how!r}; expected one of {', '.join(HOWS)}")


@dataclass(frozen=True)
class PatternChange:
    """A change of one head's attention pattern at `query` and `key`; None for all of them.

    how
        `set` makes entries `value`, `scale` multiplies them by it, `row` puts `value` on the key and nothing on the
        others.
    renormalize
        Scale the other entries of a changed row, so that the row adds up to one again.
    """

    layer: int
    head: int
    query: int | None
    key: int | None
    how: Literal["set", "scale", "row"]
    value: float = 0.0
    renormalize: bool = False

    def __post_init__(self) -> None:
        if self.how not in PATTERN_HOWS:
            raise CircuitsError(
                f"L{self.layer}H{self.head}: unknown change of a pattern {self.how!r}; expected one of "
                f"{', '.join(PATTERN_HOWS)}"
            )
        if self.how == "row" and self.key is None:
            raise CircuitsError(f"L{self.layer}H{self.head}: a row needs the key that the head is to look at")
        if self.query is not None and self.key is not None and self.key > self.query:
            raise CircuitsError(
                f"L{self.layer}H{self.head}: position {self.query} cannot look at {self.key}, which comes after it"
            )


@dataclass(frozen=True)
class FeatureChange:
    """A change with its place: `column` of the plan's features of the dictionary; `stop` None: open."""

    row: int
    side: Side
    column: int
    start: int
    stop: int | None
    how: How
    value: float


@dataclass(frozen=True)
class Watched:
    """A feature node whose values are wanted."""

    number: int
    side: Side
    column: int
    position: int


@dataclass(frozen=True)
class Vector:
    """What an error or a token adds at one position: at a depth of the stream, or to the values of `layer`."""

    row: int
    depth: int
    layer: int
    in_values: bool
    position: int
    vector: Tensor


@dataclass
class Plan:
    """All changes of `n_rows` interventions. `features` (n,) of each dictionary are those changed or watched."""

    n_rows: int
    features: dict[int, Tensor] = field(default_factory=dict)
    changes: dict[int, list[FeatureChange]] = field(default_factory=dict)
    watched: dict[int, list[Watched]] = field(default_factory=dict)
    vectors: list[Vector] = field(default_factory=list)
    patterns: dict[int, list[tuple[int, PatternChange]]] = field(default_factory=dict)

    def factors(self, index: int, side: Side, first: int, length: int) -> tuple[Tensor, Tensor]:
        """`keep` and `gain` (rows, length, n) of positions from `first` on, on one side of dictionary `index`."""
        device = self.features[index].device
        keep = torch.ones(self.n_rows, length, len(self.features[index]), device=device)
        gain = torch.zeros_like(keep)
        for change in self.changes.get(index, ()):
            low = max(change.start - first, 0)
            high = length if change.stop is None else min(change.stop - first, length)
            if change.side != side or low >= high:
                continue
            at = (change.row, slice(low, high), change.column)
            if change.how == "add":
                gain[at] += change.value
                continue
            factor = change.value if change.how == "scale" else 0.0
            keep[at] *= factor
            gain[at] = change.value if change.how == "set" else gain[at] * factor
        return keep, gain


class Planner:
    """Finds addresses in one recorded prompt."""

    def __init__(self, linear: LinearizedModel, table: NodeTable, *, first_is_special: bool) -> None:
        self.linear, self.table, self.first_is_special = linear, table, first_is_special
        self.length = linear.recording.n_positions

    def plan(
        self, batch: Sequence[Sequence[Change | PatternChange]], watched: Sequence[str] = (), *, longest: int = 0
    ) -> Plan:
        """What some interventions change; `longest` is the length that generation may reach, 0 without it."""
        plan = Plan(len(batch))
        last = max(longest, self.length)
        features: dict[int, dict[int, int]] = {}
        for row, changes in enumerate(batch):
            for change in changes:
                if isinstance(change, PatternChange):
                    self._check_pattern(change, last)
                    plan.patterns.setdefault(change.layer, []).append((row, change))
                    continue
                address = parse_address(change.node)
                start, stop = self._range(address, last)
                if not address.is_feature:
                    plan.vectors += self._vectors(row, change, address, start, stop)
                    continue
                index, side = self.find(address)
                columns = features.setdefault(index, {})
                column = columns.setdefault(address.feature, len(columns))
                placed = FeatureChange(row, side, column, start, stop, change.how, change.value)
                plan.changes.setdefault(index, []).append(placed)
        for number, text in enumerate(watched):
            address = parse_address(text)
            if not address.is_feature or address.is_range:
                raise CircuitsError(f"{text!r} cannot be watched: expected a feature node with one position")
            start, _ = self._range(address, self.length)
            index, side = self.find(address)
            columns = features.setdefault(index, {})
            column = columns.setdefault(address.feature, len(columns))
            plan.watched.setdefault(index, []).append(Watched(number, side, column, start))
        device = self.linear.recording.token_ids.device
        plan.features = {index: torch.tensor(list(columns), device=device) for index, columns in features.items()}
        return plan

    def find(self, address: Address) -> tuple[int, Side]:
        """The dictionary whose feature an address names, and the side."""
        if address.layer >= self.linear.model.shape.n_layers:
            raise CircuitsError(
                f"{address.text!r}: there is no layer {address.layer}; the model has layers 0 to "
                f"{self.linear.model.shape.n_layers - 1}, and its outputs cannot be changed"
            )
        found = [
            index
            for index, dictionary in enumerate(self.linear.dictionaries)
            if dictionary.layer == address.layer
            and _has_kind(dictionary, address.kind)
            and address.dictionary in (None, dictionary.name)
        ]
        if not found:
            there = sorted({d.name for d in self.linear.dictionaries if d.layer == address.layer})
            named = "" if address.dictionary is None else f" named {address.dictionary!r}"
            raise CircuitsError(
                f"{address.text!r}: no dictionary{named} of layer {address.layer} has nodes of kind {address.kind}; "
                f"there are {', '.join(there) or 'none'} in this layer; {GRAMMAR}"
            )
        index = self._which(address, found)
        n_features = self.linear.dictionaries[index].n_features
        if address.feature >= n_features:
            raise CircuitsError(
                f"{address.text!r}: {self.linear.dictionaries[index].name} has features 0 to {n_features - 1}, "
                f"not {address.feature}"
            )
        return index, {"mtc_key": "key", "mtc_query": "query"}.get(address.kind, "own")  # type: ignore[return-value]

    def _which(self, address: Address, found: list[int]) -> int:
        """Of several dictionaries at one site the one whose node has this id: ids count the active ones only."""
        if len(found) == 1:
            return found[0]
        table = self.table
        hit = (table.kind == address.kind) & (table.layer == address.layer) & (table.feature == address.feature)
        hit &= (table.position >= address.start) & (table.position < (address.stop or self.length))
        active: list[int] = [index for index in dict.fromkeys(table.dictionary[hit].tolist()) if index in found]
        big = [index for index in found if address.feature < self.linear.dictionaries[index].n_features]
        order = [*active, *(index for index in big or found if index not in active)]
        if address.nth > len(order):
            raise CircuitsError(f"{address.text!r}: there are only {len(order)} dictionaries with such a node")
        return order[address.nth - 1]

    def _range(self, address: Address, last: int) -> tuple[int, int | None]:
        """First position and the one behind the last; a special first position has tokens only."""
        if address.start >= last or (address.stop or 0) > last:
            raise CircuitsError(
                f"{address.text!r}: there is no position {max(address.start, (address.stop or 0) - 1)}; "
                f"the prompt has positions 0 to {self.length - 1}"
            )
        if self.first_is_special and address.start == 0 and address.kind != "embedding":
            if not address.is_range:
                raise CircuitsError(f"{address.text!r}: the special first token has no feature and error nodes")
            return 1, address.stop
        return address.start, address.stop

    def _vectors(self, row: int, change: Change, address: Address, start: int, stop: int | None) -> list[Vector]:
        """What errors or tokens in a range add: their vectors times the change of an activation of one."""
        table = self.table
        new = {"ablate": 0.0, "set": change.value, "scale": change.value, "add": 1.0 + change.value}[change.how]
        hit = (table.kind == address.kind) & (table.layer == address.layer) & (table.feature == address.feature)
        hit &= (table.position >= start) & (table.position < (self.length if stop is None else stop))
        nodes = hit.nonzero()[0].tolist()
        if not nodes:
            what = f"token {address.feature}" if address.kind == "embedding" else "error of this kind"
            raise CircuitsError(f"{address.text!r}: there is no {what} at these positions of the prompt")
        found = []
        places = [(False, depth, -1, write) for depth, write in table.writes.items()]
        places += [(True, 2 * layer + 1, layer, write) for layer, write in table.value_writes.items()]
        for in_values, depth, layer, write in places:
            numbers = write.nodes.tolist()
            where = {node: at for at, node in enumerate(numbers)} if set(nodes) & set(numbers) else {}
            for node in nodes:
                if node in where:
                    vector = (new - 1.0) * write.vectors[where[node]]
                    found.append(Vector(row, depth, layer, in_values, int(table.position[node]), vector))
        return found

    def _check_pattern(self, change: PatternChange, last: int) -> None:
        shape = self.linear.model.shape
        name = f"L{change.layer}H{change.head}"
        if not 0 <= change.layer < shape.n_layers or not 0 <= change.head < shape.n_heads:
            raise CircuitsError(
                f"{name}: there is no such head; the model has layers 0 to {shape.n_layers - 1} with heads 0 to "
                f"{shape.n_heads - 1}"
            )
        for what, position in (("query", change.query), ("key", change.key)):
            if position is not None and not 0 <= position < last:
                raise CircuitsError(f"{name}: {what} {position} is outside the prompt of {self.length} tokens")


def changed_pattern(pattern: Tensor, changes: Sequence[tuple[int, PatternChange]], first: int = 0) -> Tensor:
    """Patterns (B, H, T, S) of queries from position `first` on, with the changes of each row made."""
    pattern = pattern.clone()
    length, n_keys = pattern.shape[-2:]
    for row, change in changes:
        if change.query is not None and not first <= change.query < first + length:
            continue
        queries = range(length) if change.query is None else [change.query - first]
        for at in queries:
            seen = min(first + at + 1, n_keys)  # a head looks at no later position
            if change.key is not None and change.key >= seen:
                continue
            entries = pattern[row, change.head, at]
            chosen = slice(0, seen) if change.key is None else slice(change.key, change.key + 1)
            if change.how == "row":
                entries.zero_()
            entries[chosen] = entries[chosen] * change.value if change.how == "scale" else change.value
            if change.renormalize:
                _renormalize(entries, change.key, seen)
    return pattern


def _renormalize(entries: Tensor, key: int | None, seen: int) -> None:
    """Scale the entries (S,) of the keys other than `key`, or all for None, so that the row adds up to one."""
    others = torch.zeros_like(entries, dtype=torch.bool)
    others[:seen] = True
    if key is not None:
        others[key] = False
    rest = float(entries[others].sum())
    if rest != 0.0:
        entries[others] *= (1.0 - float(entries[~others].sum())) / rest


def _has_kind(dictionary: Dictionary, kind: str) -> bool:
    site = dictionary.read.site.name
    if isinstance(dictionary.moved_by, HeadLoading):
        return kind in ("mtc_key", "mtc_query")
    return kind == {"resid_mid": "mlp_feature", "v": "value_feature"}.get(site, "attention_feature")
