"""An explanation in sentences, from its numbers alone. Needs no model."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from circuits.graph import ERROR_KINDS, FEATURE_KINDS, ID_PREFIXES, Graph
from circuits.graph.formats.text import visible

if TYPE_CHECKING:
    from circuits.explaining import Line, Look, Meeting, Part

KIND_NAMES = {
    "embedding": "token",
    "value_feature": "value",
    "value_error": "value error",
    "mtc_key": "MTC key",
    "attention_feature": "attention",
    "mtc_query": "MTC query",
    "attention_error": "attention error",
    "mlp_feature": "MLP",
    "mlp_error": "MLP error",
    "block_error": "block error",
    "logit": "output",
}
CONSTANT_NAMES = {
    "bias": "biases",
    "position": "position embedding",
    "first": "what the first position writes",
}
# Below this share a token is not named as what a feature carries.
MOSTLY = 0.35


def position_name(graph: Graph, position: int) -> str:
    """A position with its token: `14 " to"`."""
    return f'{position} "{visible(graph.tokens[position])}"'


def part_name(graph: Graph, name: str) -> str:
    """A node, given by its id, in words: `attention L2 #153`, `token " Mary"`; or the name of a constant."""
    if name in CONSTANT_NAMES:
        return CONSTANT_NAMES[name]
    site, feature, position = name.split("_")[:3]
    if site == "E":
        return f'token "{visible(graph.tokens[int(position)])}"'
    found = re.fullmatch(r"([a-z]?)(\d+)", site)
    assert found is not None
    if int(found[2]) == graph.n_layers:
        labels = [str(label) for label, known in zip(graph.nodes.label, graph.node_ids()) if known == name]
        return f'output "{visible(labels[0])}"' if labels else f"output {feature}"
    kinds = ERROR_KINDS if feature == "error" else FEATURE_KINDS
    kind = next(kind for kind in kinds if ID_PREFIXES[kind] == found[1])
    place = f"{KIND_NAMES[kind]} L{found[2]}"
    return place if feature == "error" else f"{place} #{feature}"


def tell_reads(graph: Graph, reads: "Sequence[Line]", name: str, source: int | None) -> list[str]:
    """What the subject reads, or what the edge carries."""
    if not reads:
        return []
    position = int(name.split("_")[2])
    subject = f"{part_name(graph, name)} at {position_name(graph, position)}"
    if source is not None:
        line = reads[0]
        return [
            f"{_placed(graph, line.part)} gives {subject} {line.weight:+.3g}, {line.share:.0%} of what it reads"
            f"{_by(line.heads)}."
        ]
    told = "; ".join(f"{_placed(graph, line.part)} ({line.share:.0%}{_by(line.heads)})" for line in reads[:3])
    return [f"{subject} reads most from {told}."]


def tell_looks(graph: Graph, looks: "Sequence[Look]") -> list[str]:
    """Why the heads looked where they did, a sentence or two each."""
    return [sentence for look in looks for sentence in _tell_look(graph, look)]


def _tell_look(graph: Graph, look: "Look") -> list[str]:
    query, key = position_name(graph, look.query), position_name(graph, look.key)
    words = [
        f"{look.head} looks from {query} at {key} with attention {look.attention:.2f}; its score there is "
        f"{look.lead:.2f} above that of the other keys."
    ]
    for_it = [pair for pair in look.pairs if pair.weight > 0 and pair.at == look.key]
    named = next((pair for pair in for_it if _is_named(pair.query) and _is_named(pair.key)), None)
    if for_it:
        words.append(f"What speaks most for that key is {_pair(graph, for_it[0], look)}.")
    if named is not None and named is not for_it[0]:
        words.append(f"Of features and tokens it is {_pair(graph, named, look)}.")
    against = [pair for pair in look.pairs if pair.weight < 0]
    if against:
        worst = against[0]
        where = "" if worst.at == look.key else f" at {position_name(graph, worst.at)}"
        words.append(
            f"Against it stands {part_name(graph, worst.query.id)} meeting {part_name(graph, worst.key.id)}{where} "
            f"({worst.weight:+.2f})."
        )
    return words


def _placed(graph: Graph, part: "Part") -> str:
    return f"{part_name(graph, part.id)} at {position_name(graph, part.position)}"


def _by(heads: Sequence[tuple[str, float]]) -> str:
    return f", by {heads[0][0]}" if heads else ""


def _is_named(part: "Part") -> bool:
    """Whether it is a feature or a token, not an error and no constant."""
    return part.id not in CONSTANT_NAMES and "_error_" not in part.id


def _pair(graph: Graph, pair: "Meeting", look: "Look") -> str:
    """A pair with its part, both sides, and what they have in common."""
    query, key = _side(graph, pair.query, look.query), _side(graph, pair.key, pair.at)
    return f"{query} on the query side meeting {key} on the key side ({pair.weight:+.2f}){_relation(graph, pair, look)}"


def _side(graph: Graph, part: "Part", position: int) -> str:
    """One side of a pair: what it is, and the token that it carries."""
    name = part_name(graph, part.id)
    if part.position != position:
        # Brought here by frozen attention.
        return f"{name} from {position_name(graph, part.position)}"
    if part.id.startswith("E_") or part.origin < 0 or part.share < MOSTLY:
        return name
    where = {0: "the token there, ", -1: "the token before, "}.get(part.origin - position, "")
    return f"{name} (which carries {where}{position_name(graph, part.origin)}, {part.share:.0%} of what it reads)"


def _relation(graph: Graph, pair: "Meeting", look: "Look") -> str:
    """What numbers say of both sides together: whether they carry the same token."""
    query, key = pair.query, pair.key
    if min(query.origin, key.origin) < 0 or min(query.share, key.share) < MOSTLY:
        return ""
    if graph.token_ids[query.origin] != graph.token_ids[key.origin]:
        return ""
    token = f'"{visible(graph.tokens[query.origin])}"'
    if query.origin == look.query and key.origin == look.key - 1:
        return f": the current token {token} is looked for, and what follows its earlier occurrence is found"
    if query.origin == look.query and key.origin == look.key:
        return f": the current token {token} looks for itself"
    return f": both sides carry {token}"
