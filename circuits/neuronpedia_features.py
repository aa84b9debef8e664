"""Feature pages as Neuronpedia's features, and back.

The fields are those of its database (github.com/hijohnnylin/neuronpedia, apps/webapp/prisma/schema.prisma, `Neuron` and
`Activation`), as its API hands them out, one JSON object a feature, with the activations and explanations inside:

    modelId, layer, index                            layer is the source, such as "6-res-jb"
    activations                                      tokens, values, maxValue, maxValueTokenIndex, minValue, binMin,
                                                     binMax, binContains, and dfaValues, dfaTargetIndex, dfaMaxValue
    pos_str, pos_values, neg_str, neg_values         output tokens
    frac_nonzero, maxActApprox                       density and largest activation
    freq_hist_data_bar_heights, ..._bar_values       the histogram: counts and middles of bins
    correlated_features_indices, ..._pearson         near by co-activation, in the same source
    topkCosSimIndices, topkCosSimValues              near by decoder, in the same source
    decoder_weights_dist                             head loading
    explanations                                     description, typeName, explanationModelName

Of a feature that moves, `dfaValues` are the moves to the query with the largest activation, `dfaTargetIndex`. What has
no place there (groups of examples, query side, all moves, neighbours in other dictionaries) stands under `circuits`,
which Neuronpedia passes over, so that our own files come back whole. There is no histogram of logits.
"""

import gzip
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any

from circuits.errors import CircuitsError
from circuits.feature_gathering import QUANTILES
from circuits.feature_records import AUTOMATIC, PERSON, Page, Record, Words, sparse
from circuits.feature_store import FeatureStore
from circuits.graph.formats.whole_file import write_whole
from circuits.labels import Progress

LARGEST = 1 << 30  # bytes of a file
OWN = "circuits"
AT_ONCE = 256  # features that are held at a time


def export_features(
    store: FeatureStore,
    dictionary: str,
    path: Path,
    features: Sequence[int] | None = None,
    model: str | None = None,
    source: str | None = None,
    progress: Progress | None = None,
) -> int:
    """Write pages as JSON lines; returns how many. By default those of all features of the dictionary.

    model, source
        Neuronpedia's names of the model and the dictionary; by default the model's and the dictionary's own.

    Raises
    ------
    CircuitsError, GraphError
        The store has no such dictionary or feature, or the file cannot be written.
    """
    known = store.dictionaries()
    if dictionary not in known:
        raise CircuitsError(f"{store.path}: no pages of {dictionary!r}; there are {', '.join(sorted(known))}")
    wanted = range(known[dictionary].features) if features is None else features
    names = model or str(store.model().get("name", "")), source or dictionary
    lines = []
    for begin in range(0, len(wanted), AT_ONCE):
        some = wanted[begin : begin + AT_ONCE]
        pages = store.pages([(dictionary, feature) for feature in some])
        if features is not None:
            for feature in some:
                store.page(dictionary, feature)  # refuses one that has none
        lines += [json.dumps(to_neuronpedia(page, *names), ensure_ascii=True) + "\n" for page in pages.values()]
        if progress is not None:
            progress(min(begin + AT_ONCE, len(wanted)), len(wanted))
    text = "".join(lines).encode()
    write_whole(path, gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
    return len(lines)


def import_features(store: FeatureStore, dictionary: str, path: Path) -> int:
    """Read features, as pages of a dictionary that the store has; returns how many.

    Explanations become labels of those who wrote them; a label of a person that is there already stays.

    Raises
    ------
    CircuitsError
        The file cannot be read, is of another format, or has features that the dictionary does not have.
    """
    known = store.dictionaries()
    if dictionary not in known:
        raise CircuitsError(
            f"{store.path}: has no dictionary {dictionary!r} whose pages these could be; there are "
            f"{', '.join(sorted(known))}"
        )
    words, records = _Words(), {}
    labels: dict[str, list[tuple[str, int, str]]] = {}
    for number, given in enumerate(_read(path), 1):
        try:
            feature, record = from_neuronpedia(given, words)
            written = list(_explanations(given))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise CircuitsError(f"{path}: entry {number} is no feature of Neuronpedia: {_reason(error)}") from error
        if not 0 <= feature < known[dictionary].features:
            raise CircuitsError(
                f"{path}: entry {number} is feature {feature}; {dictionary} has {known[dictionary].features}"
            )
        records[feature] = record
        for author, text in written:
            labels.setdefault(author, []).append((dictionary, feature, text))
    if not records:
        raise CircuitsError(f"{path}: no features of Neuronpedia in there")
    store.write_pages(dictionary, records, Words(dict(enumerate(words.texts)), words.documents))
    pages = store.pages([(dictionary, feature) for feature in records]) if PERSON in labels else {}
    for author, rows in labels.items():
        kept = [row for row in rows if author != PERSON or pages[row[0], row[1]]["label_by"] != PERSON]
        store.set_labels(kept, author)
    return len(records)


def to_neuronpedia(page: Page, model: str, source: str) -> dict[str, Any]:
    """One page as Neuronpedia's feature."""
    edges, counts = page["histogram"]["edges"], page["histogram"]["counts"]
    name = page["dictionary"]
    own = {key: page[key] for key in ("kind", "tokens_seen", "near_by_decoder", "near_by_coactivation")}
    own |= {"head_loading": page["head_loading"]} if "head_loading" in page else {}
    ranges: dict[str, list[float]] = {}
    for example in page["examples"]:
        ranges.setdefault(example["group"], []).append(max(example["activations"], default=0.0))
    own["histogram"] = [edges[0], edges[1] - edges[0]] if counts else [0.0, 1.0]
    near, together = (
        [(feature, value) for of, feature, value in page[key] if of == name]
        for key in ("near_by_decoder", "near_by_coactivation")
    )
    written = page["label"] if page["label_by"] != AUTOMATIC else ""
    explanation = {"description": written, "typeName": OWN, "explanationModelName": page["label_by"]}
    return {
        "modelId": model,
        "layer": source,
        "index": str(page["feature"]),
        "activations": [_activation(example, ranges[example["group"]]) for example in page["examples"]],
        "pos_str": [token for token, _ in page["top_outputs"]],
        "pos_values": [weight for _, weight in page["top_outputs"]],
        "neg_str": [token for token, _ in page["bottom_outputs"]],
        "neg_values": [weight for _, weight in page["bottom_outputs"]],
        "frac_nonzero": page["density"],
        "maxActApprox": page["largest"],
        "freq_hist_data_bar_heights": counts,
        "freq_hist_data_bar_values": [(low + high) / 2 for low, high in pairwise(edges)],
        "logits_hist_data_bar_heights": [],
        "logits_hist_data_bar_values": [],
        "correlated_features_indices": [feature for feature, _ in together],
        "correlated_features_pearson": [value for _, value in together],
        "topkCosSimIndices": [feature for feature, _ in near],
        "topkCosSimValues": [value for _, value in near],
        "decoder_weights_dist": [weight for head, weight in page.get("head_loading", ()) if isinstance(head, int)],
        "explanations": [explanation] if written else [],
        OWN: own,
    }


def _activation(example: dict[str, Any], peaks: list[float]) -> dict[str, Any]:
    """An example; its bin goes from the weakest to the strongest of its group's `peaks`."""
    values = example["activations"]
    largest = max(values, default=0.0)
    quantile = example["group"] != "top"
    shown = {
        "tokens": example["tokens"],
        "values": values,
        "maxValue": largest,
        "maxValueTokenIndex": values.index(largest) if values else 0,
        "minValue": min(values, default=0.0),
        "binMin": min(peaks) if quantile else -1,
        "binMax": max(peaks) if quantile else -1,
        "binContains": 1 / QUANTILES if quantile else -1,
        "dfaValues": [],
        "dfaTargetIndex": None,
        "dfaMaxValue": None,
        OWN: {"group": example["group"]},
    }
    if "moves" in example:
        queries = example["query_activations"]
        target = max(range(len(queries)), key=lambda i: abs(queries[i]), default=0)
        moved = [0.0] * len(values)
        for key, query, weight in example["moves"]:
            if query == target and key >= 0:
                moved[key] = weight
        shown |= {"dfaValues": moved, "dfaTargetIndex": target, "dfaMaxValue": max(moved, default=0.0)}
        shown[OWN] |= {"query_activations": queries, "moves": example["moves"]}
    return shown


class _Words:
    """Gathers the texts and the documents of what is read."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.documents: dict[int, list[int]] = {}
        self._numbers: dict[str, int] = {}

    def number(self, text: Any) -> int:
        if not isinstance(text, str):
            raise TypeError(f"a token is {text!r}, expected text")
        if text not in self._numbers:
            self._numbers[text] = len(self.texts)
            self.texts.append(text)
        return self._numbers[text]


def from_neuronpedia(given: Any, words: _Words) -> tuple[int, Record]:
    """The number and the record of one of Neuronpedia's features."""
    own = given.get(OWN) or {}
    heights, middles = list(map(int, _list(given, "freq_hist_data_bar_heights"))), _numbers(
        given, "freq_hist_data_bar_values"
    )
    width = (middles[-1] - middles[0]) / (len(middles) - 1) if len(middles) > 1 else 1.0
    edge = middles[0] - width / 2 if middles else 0.0
    if "histogram" in own:
        edge, width = map(_number, own["histogram"])
    record: Record = {
        "density": _number(given.get("frac_nonzero") or 0.0),
        "largest": _number(given.get("maxActApprox") or 0.0),
        "histogram": [edge, width, heights[: len(middles)]],
        "outputs": _pairs(given, "pos_str", "pos_values", words),
        "bottom": _pairs(given, "neg_str", "neg_values", words),
        "examples": [_record_example(one, words) for one in _list(given, "activations")],
        "tokens_seen": int(own.get("tokens_seen") or 0),
        "decoder": _near(given, own, "near_by_decoder", "topkCosSimIndices", "topkCosSimValues"),
        "together": _near(
            given, own, "near_by_coactivation", "correlated_features_indices", "correlated_features_pearson"
        ),
        "heads": [[head, weight] for head, weight in enumerate(_numbers(given, "decoder_weights_dist"))],
    }
    if "head_loading" in own:
        record["heads"] = [[str(h) if isinstance(h, str) else int(h), _number(w)] for h, w in own["head_loading"]]
    return int(given["index"]), record


def _record_example(one: Any, words: _Words) -> list[Any]:
    """An activation as an example, its tokens as a document of its own."""
    values, own = _numbers(one, "values"), one.get(OWN) or {}
    tokens = [words.number(text) for text in one["tokens"]]
    if len(tokens) != len(values):
        raise ValueError(f"an activation has {len(tokens)} tokens and {len(values)} values")
    group = str(own.get("group") or _group(one))
    document = len(words.documents)
    words.documents[document] = tokens
    example = [group, document, 0, len(tokens), sparse(values)]
    queries, moves = own.get("query_activations"), own.get("moves")
    if queries is not None and moves is not None:
        flat = [part for key, query, weight in moves for part in (int(key), int(query), _number(weight))]
        example += [sparse([_number(value) for value in queries][: len(tokens)]), flat]
    return example


def _group(one: Any) -> str:
    share = one.get("binContains")
    if not isinstance(share, int | float) or share < 0:
        return "top"
    return f"{_number(one.get('binMin') or 0):.3g} to {_number(one.get('binMax') or 0):.3g}"


def _pairs(given: Any, texts: str, values: str, words: _Words) -> list[list[Any]]:
    pairs = zip(_list(given, texts), _numbers(given, values), strict=True)
    return [[words.number(text), value] for text, value in pairs]


def _near(given: Any, own: Any, key: str, indices: str, values: str) -> list[list[Any]]:
    if key in own:
        return [[str(name), int(feature), _number(value)] for name, feature, value in own[key]]
    source = str(given.get("layer", ""))
    return [[source, int(feature), value] for feature, value in zip(_list(given, indices), _numbers(given, values))]


def _list(given: Any, key: str) -> list[Any]:
    found = given.get(key) or []
    if not isinstance(found, list):
        raise TypeError(f"{key} is {type(found).__name__}, expected a list")
    return found


def _numbers(given: Any, key: str) -> list[float]:
    return [_number(value) for value in _list(given, key)]


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return float(value)


def _explanations(given: Any) -> Iterator[tuple[str, str]]:
    """Author and text of each explanation."""
    for one in _list(given, "explanations"):
        author = str(one.get("explanationModelName") or one.get("typeName") or "neuronpedia")
        yield ("neuronpedia" if author == AUTOMATIC else author), str(one.get("description") or "")


def _read(path: Path) -> Iterator[Any]:
    """The features of a file: one object, a list, an object with `features`, or one object a line."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise CircuitsError(f"{path}: is larger than {LARGEST >> 20} MB; split it")
        words = text.decode("utf-8")
        try:
            whole = json.loads(words)
        except ValueError:
            whole = [json.loads(line) for line in words.splitlines() if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        if isinstance(error, CircuitsError):
            raise
        raise CircuitsError(f"{path}: could not be read as JSON or JSON lines: {error}") from error
    if isinstance(whole, dict) and isinstance(whole.get("features"), list):
        whole = whole["features"]
    for one in whole if isinstance(whole, list) else [whole]:
        yield one if isinstance(one, dict) else {}


def _reason(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)
