"""Why heads looked where they did: explained attention scores and what they are made of, as columns of a graph.

Shapes: `c` scores, `p` pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from circuits.graph.errors import GraphError
from circuits.graph.tables import Float32, Int32, Int64, Strings, Table

# What stands in a pair of a QK attribution where there is no node: biases, position embeddings, and what the features
# and errors of a special first position write.
NAMED_CONSTANTS = ("bias", "position", "first")
# What a row of `Pairs` tells: a part of the score, of its lead over the other keys, one side's sum over the other
# side, or a trained QK feature's part of its score.
PAIR_FORMS = ("score", "lead", "query", "key", "qk_feature")

SCORE_COLUMNS: dict[str, type[np.generic]] = {
    "layer": np.int32,
    "head": np.int32,
    "query": np.int32,
    "key": np.int32,
    "owner": np.str_,
    "score": np.float32,
    "attention": np.float32,
    "relative": np.float32,
    "lead": np.float32,
    "gap": np.float32,
}
PAIR_COLUMNS: dict[str, type[np.generic]] = {
    "score": np.int32,
    "form": np.str_,
    "query_node": np.str_,
    "key_node": np.str_,
    "key": np.int32,
    "weight": np.float32,
}


@dataclass(frozen=True, eq=False)
class Scores(Table):
    """Attention scores that are explained; every column has shape (c,).

    Attributes:
        layer: Layer of the head.
        head: Index of the head in its layer, or `OWN_HEAD`.
        query: Position that looks.
        key: Position that is looked at.
        owner: For `OWN_HEAD` the id of the feature whose pattern it is, "" for the base model's heads.
        score: The recorded score, its scale and a soft cap's secant included.
        attention: The attention `A[query, key]` that the softmax makes of it.
        relative: `log A[query, key] - sum_k A[query, k] log A[query, k]`: how far this key beats the others.
        lead: The same over `1 - A[query, key]`: the score less the mean of the other keys' scores, weighted with their
            attention. Where the head looks hardly anywhere else `relative` vanishes, and this does not.
        gap: The ledger's relative gap, the worse of the two forms.

    Raises:
        GraphError: A column is misshapen or of the wrong type.
    """

    layer: Int32
    head: Int32
    query: Int32
    key: Int32
    owner: Strings
    score: Float32
    attention: Float32
    relative: Float32
    lead: Float32
    gap: Float32

    def __post_init__(self) -> None:
        """Bring every column to its type."""
        self._freeze(SCORE_COLUMNS)

    @classmethod
    def empty(cls) -> Scores:
        """No scores."""
        return cls(**{name: np.zeros(0, dtype=dtype) for name, dtype in SCORE_COLUMNS.items()})


@dataclass(frozen=True, eq=False)
class Pairs(Table):
    """The strongest parts of explained scores; every column has shape (p,).

    Nodes are named as `Graph.node_ids` names them, those that pruning left out too, or by `NAMED_CONSTANTS`.

    Attributes:
        score: Index of the score in `Scores`.
        form: One of `PAIR_FORMS`: "score" for a part of the score, "lead" for a part of `Scores.lead`; "query"
            and "key" for a node's sum over all partners of the other side, which is then ""; "qk_feature" for a
            feature of a trained QK diagonalization, named on both sides, such as "qk.1/37".
        query_node: What is on the query side.
        key_node: What is on the key side.
        key: Position of the key side: the score's own, but in the form "lead" also that of another key.
        weight: What the pair adds.

    Raises:
        GraphError: A column is misshapen or of the wrong type, a form is unknown, or a weight is not finite.
    """

    score: Int32
    form: Strings
    query_node: Strings
    key_node: Strings
    key: Int32
    weight: Float32

    def __post_init__(self) -> None:
        """Bring every column to its type and check forms and weights."""
        self._freeze(PAIR_COLUMNS)
        if unknown := set(np.unique(self.form).tolist()) - set(PAIR_FORMS):
            raise GraphError(f"Pairs.form has {sorted(unknown)}; expected only {', '.join(PAIR_FORMS)}.")
        if bad := int(np.count_nonzero(~np.isfinite(self.weight))):
            raise GraphError(f"Pairs.weight has {bad} values that are not finite; the model or a replacement has NaNs.")

    @classmethod
    def empty(cls) -> Pairs:
        """No pairs."""
        return cls(**{name: np.zeros(0, dtype=dtype) for name, dtype in PAIR_COLUMNS.items()})

    def check(self, scores: Scores) -> None:
        """Refuse pairs that do not fit their scores.

        Raises:
            GraphError: A pair is of no score, has a key that its form does not allow, or names what it should not.
        """
        if ((self.score < 0) | (self.score >= len(scores))).any():
            raise GraphError(f"Pairs.score goes beyond the scores; expected 0 to {len(scores) - 1}.")
        away = (self.form != "lead") & (self.key != scores.key[self.score])
        if away.any():
            first = int(np.flatnonzero(away)[0])
            raise GraphError(
                f"Pairs.key has {self.key[first]} in the form {str(self.form[first])!r} for a score at key "
                f"{scores.key[self.score[first]]}; only the form 'lead' has other keys."
            )
        sides = {"query": self.key_node != "", "key": self.query_node != ""}
        sides["qk_feature"] = self.query_node != self.key_node
        for form, wrong in sides.items():
            if (wrong & (self.form == form)).any():
                expected = "the same name on both sides" if form == "qk_feature" else 'nothing ("") on the other side'
                raise GraphError(f"Pairs of the form {form!r} name something else; expected {expected}.")

    def in_order(self) -> Pairs:
        """The same pairs by score and form, otherwise in the order given."""
        form = np.select([self.form == name for name in PAIR_FORMS], np.arange(len(PAIR_FORMS)))
        order: Int64 = np.lexsort((form, self.score))
        return self if np.array_equal(order, np.arange(len(self))) else self.take(order)
