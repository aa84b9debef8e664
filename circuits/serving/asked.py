"""What a browser may ask for, as it came and as it is checked: nothing of a request is used before that."""

import math
from dataclasses import dataclass
from typing import Any

from circuits.errors import CircuitsError

MAX_TARGETS = 16
MAX_CHANGED = 200
LETTERS = 16  # of a prompt for each token that it may have
ANNOTATIONS = {"pinnedIds", "supernodes", "clickedId", "linkType", "pruningThreshold", "edgeThreshold",
               "densityThreshold", "clerps", "clickedEdge", "sg_pos"}  # fmt: skip


class Bad(CircuitsError):
    """The request asks for what there is not, or in a form that is not the one expected."""


@dataclass(frozen=True)
class TraceAsked:
    """A prompt to be traced, and how."""

    prompt: str
    targets: tuple[str, ...] = ()
    minus: str | None = None
    node_threshold: float = 0.8
    edge_threshold: float = 0.98
    max_feature_nodes: int | None = None
    explain: bool = False

    def as_json(self) -> dict[str, Any]:
        return {**self.__dict__, "targets": list(self.targets)}


@dataclass(frozen=True)
class ChangeAsked:
    """Some nodes of a graph, all changed alike."""

    nodes: tuple[str, ...]
    how: str
    value: float


def trace_asked(content: Any, max_tokens: int) -> TraceAsked:
    """The body of a request for a trace.

    Raises
    ------
    Bad
        Which field is wrong.
    """
    given = _fields(content, set(TraceAsked.__dataclass_fields__))
    prompt = text(given, "prompt", LETTERS * max_tokens)
    if not prompt:
        raise Bad("the prompt is empty")
    targets = _texts(given, "targets", MAX_TARGETS)
    minus = text(given, "minus", 200) if given.get("minus") else None
    if minus is not None and len(targets) != 1:
        raise Bad("a difference needs exactly one target to subtract from")
    most = given.get("max_feature_nodes")
    if most is not None and (type(most) is not int or not 1 <= most <= 100_000):
        raise Bad("max_feature_nodes: expected a whole number from 1 on, or nothing")
    explain = given.get("explain", False)
    if type(explain) is not bool:
        raise Bad("explain: expected true or false")
    nodes, edges = _share(given, "node_threshold", 0.8), _share(given, "edge_threshold", 0.98)
    return TraceAsked(prompt, targets, minus, nodes, edges, most, explain)


def changes_asked(content: Any) -> list[ChangeAsked]:
    """The body of a request for an intervention: `{"changes": [{"nodes": [...], "how": ..., "value": ...}]}`.

    Raises
    ------
    Bad
        Which field is wrong.
    """
    changes = _fields(content, {"changes"}).get("changes")
    if not isinstance(changes, list) or not changes:
        raise Bad("changes: expected a list of changes")
    found = []
    for change in changes:
        given = _fields(change, {"nodes", "how", "value"})
        how = given.get("how")
        if how not in ("ablate", "scale"):
            raise Bad("how: expected ablate or scale")
        value = given.get("value", 0.0)
        if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > 1000:
            raise Bad("value: expected a number from -1000 to 1000")
        nodes = _texts(given, "nodes", MAX_CHANGED)
        if not nodes:
            raise Bad("nodes: expected at least one node id")
        found.append(ChangeAsked(nodes, how, 0.0 if how == "ablate" else float(value)))
    if sum(len(change.nodes) for change in found) > MAX_CHANGED:
        raise Bad(f"changes: more than {MAX_CHANGED} nodes at once")
    return found


def annotations_asked(content: Any) -> dict[str, Any]:
    """The body of a request that saves a viewer's state: `{"qParams": {...}}`; keys that no viewer has are left out."""
    given = _fields(content, {"qParams"}).get("qParams")
    if not isinstance(given, dict):
        raise Bad("qParams: expected an object")
    return {name: value for name, value in given.items() if name in ANNOTATIONS}


def text(content: Any, name: str, longest: int) -> str:
    """A field that is text of at most so many letters."""
    value = content.get(name) if isinstance(content, dict) else None
    if not isinstance(value, str):
        raise Bad(f"{name}: expected text")
    if len(value) > longest:
        raise Bad(f"{name}: {len(value)} letters are more than the {longest} that are allowed here")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Bad(f"{name}: has half a letter at {error.start}, which no encoding can hold") from error
    return value


def _fields(content: Any, known: set[str]) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise Bad("expected a JSON object")
    if unknown := sorted(set(content) - known):
        raise Bad(f"unknown field {unknown[0][:80]!r}; expected {', '.join(sorted(known))}")
    return content


def _texts(given: dict[str, Any], name: str, most: int) -> tuple[str, ...]:
    values = given.get(name) or []
    if not isinstance(values, list) or len(values) > most:
        raise Bad(f"{name}: expected a list of at most {most} texts")
    return tuple(text({name: value}, name, 200) for value in values)


def _share(given: dict[str, Any], name: str, usual: float) -> float:
    value = given.get(name, usual)
    if type(value) not in (int, float) or not 0.0 <= value <= 1.0:
        raise Bad(f"{name}: expected a number from 0 to 1")
    return float(value)
