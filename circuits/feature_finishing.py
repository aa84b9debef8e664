"""The end of a build: everything that is known about each feature, put together and written as its record."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from circuits.coactivation import Sampled, correlated
from circuits.endpoints import Ends
from circuits.feature_gathering import Gathered
from circuits.feature_records import Record, rounded, shortened
from circuits.feature_weights import ends_of, head_loading, near_by_decoder, outputs
from circuits.feature_work import Work
from circuits.prompt import token_texts
from circuits.store_file import packed
from circuits.store_rows import add_texts, forget_unused, next_document, write_dictionary, write_records
from circuits.strongest import Ints

COMPARED = 1 << 16  # features of a build that are compared with those of every dictionary, not of their own alone
Near = dict[int, list[list[Any]]]


@torch.no_grad()
def finish(work: Work, gathered: Sequence[Gathered]) -> None:
    """Write the records of all features, the documents that their examples are from, and drop the work's tables."""
    first, plan = work.kept("first"), work.kept("plan")
    together, decoders = _together(work), _by_decoder(work)
    work.report(0.8, 0.9, 1.0)
    ends = Ends(work.model)
    places = ends_of(ends, work.dictionaries)
    effects = [_effects(outputs(ends, end, work.settings.outputs)) if end else {} for end in places]
    used = {token for one in effects for sides in one.values() for side in sides for token, _ in side}
    numbers = _write_documents(work, used)
    for index, one in enumerate(gathered):
        name = one.dictionary.name
        replacement = next(r for r in work.model.replacements if one.dictionary in r.dictionaries)
        build = {"text": plan["text"], "settings": plan["settings"], "seed": plan["seed"]}
        write_dictionary(work.db, one.dictionary, replacement, first["counted"], build)
        written = _examples(work, name)
        records = {}
        for feature in range(one.dictionary.n_features):
            record = _counted(one, feature, first["counted"], written.get(feature, []))
            for side, found in zip(("outputs", "bottom"), effects[index].get(feature, ([], [])), strict=True):
                record[side] = [[numbers[token], weight] for token, weight in found]
            record["decoder"] = decoders[index].get(feature, [])
            record["together"] = together[index].get(feature, [])
            records[name, feature] = record
        write_records(work.db, work.path, records)
        work.report(0.9, 1.0, (index + 1) / len(gathered))
    forget_unused(work.db, work.path)
    for table in ("progress", "state", "documents", "sample", "examples"):
        work.db.execute(f"DROP TABLE work_{table}")


def _counted(one: Gathered, feature: int, tokens: int, shown: list[Any]) -> Record:
    """What the passes over the text found."""
    edge, width, counts = one.histograms.of(feature)
    heads = head_loading(one.dictionary, feature, one.heads[feature])
    largest = float(one.top.values[feature, 0])
    return {
        "density": shortened(int(one.active[feature]) / tokens),
        "largest": shortened(largest),
        "histogram": [edge, width, counts],
        "heads": [[head, shortened(float(weight), 3)] for head, weight in heads],
        "examples": shown,
    }


def _examples(work: Work, name: str) -> dict[int, list[Any]]:
    """Every feature's examples, in order; their documents by their numbers in the store."""
    found: dict[int, list[Any]] = {}
    query = "SELECT feature, example FROM work_examples WHERE dictionary = ? ORDER BY feature, number"
    shift = int(work.kept("shift"))
    for feature, text in work.db.execute(query, (name,)):
        example = json.loads(text)
        example[1] += shift
        found.setdefault(feature, []).append(example)
    return found


def _write_documents(work: Work, tokens: set[int]) -> dict[int, int]:
    """Put documents behind those that the store has; returns the number of the text of each token id."""
    shift = next_document(work.db)
    work.keep("shift", shift)
    used = [number for (number,) in work.db.execute("SELECT number FROM work_documents ORDER BY number")]
    read = "SELECT tokens FROM work_documents WHERE number = ?"
    documents = {number: np.frombuffer(work.db.execute(read, (number,)).fetchone()[0], np.uint32) for number in used}
    ids = sorted(tokens.union(*(set(ids.tolist()) for ids in documents.values())))
    texts = dict(zip(ids, token_texts(work.model.base, ids), strict=True))
    numbers = add_texts(work.db, texts)
    by_id = {token: numbers[text] for token, text in texts.items()}
    rows = [(shift + number, packed([by_id[token] for token in ids.tolist()])) for number, ids in documents.items()]
    work.db.executemany("INSERT INTO documents VALUES (?, ?)", rows)
    return by_id


def _effects(found: Iterable[Any]) -> dict[int, tuple[list[Any], list[Any]]]:
    """Top and bottom tokens of every feature, (token, weight); a feature of rank > 1 has no bottom ones."""
    effects = {}
    for features, *sides in found:
        for row, feature in enumerate(features.tolist()):
            pairs = []
            for side, (tokens, weights) in enumerate(sides):
                wanted = weights[row] > 0 if side == 0 else weights[row] < 0
                scale = float(np.abs(weights[row]).max(initial=0.0))
                kept = rounded(weights[row][wanted].tolist(), scale)
                pairs.append(list(zip(tokens[row][wanted].tolist(), kept, strict=True)))
            effects[feature] = (pairs[0], pairs[1])
    return effects


def _partners(work: Work, present: Sequence[bool]) -> list[list[int]]:
    """For each dictionary those that its features are compared with: all if there are not too many features."""
    there = [number for number, is_there in enumerate(present) if is_there]
    few = sum(work.dictionaries[number].n_features for number in there) <= COMPARED
    return [(there if few else [number]) if present[number] else [] for number in range(len(present))]


def _by_decoder(work: Work) -> list[Near]:
    ends = Ends(work.model)
    found = ends_of(ends, work.dictionaries)
    partners = _partners(work, [end is not None for end in found])
    return _named(work, partners, near_by_decoder(ends, found, work.settings.near, partners))


def _together(work: Work) -> list[Near]:
    """Neighbours by co-activation, from the sample of the first pass."""
    columns = {dictionary.name: _sample(work, dictionary.name) for dictionary in work.dictionaries}
    tokens = np.unique(np.concatenate([tokens for tokens, _, _ in columns.values()]))
    sampled = []
    for dictionary in work.dictionaries:
        at, features, values = columns[dictionary.name]
        order = np.lexsort((features, at))
        place = np.searchsorted(tokens, at[order])
        sampled.append(Sampled(dictionary.n_features, place, features[order], values[order]))
    partners = _partners(work, [True] * len(sampled))
    count = int(work.kept("first")["sampled"])
    return _named(work, partners, correlated(sampled, count, work.settings.near, partners))


def _sample(work: Work, name: str) -> tuple[Ints, Ints, Any]:
    """Token, feature and activation of every entry of the sample."""
    pieces: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    query = "SELECT entries FROM work_sample WHERE dictionary = ? ORDER BY batch"
    for (blob,) in work.db.execute(query, (name,)):
        n = len(blob) // 16
        for piece, dtype, start in zip(pieces, ("<i8", "<i4", "<f4"), (0, 8 * n, 12 * n), strict=True):
            piece.append(np.frombuffer(blob, dtype, n, start))
    tokens, features, values = (np.concatenate(piece) for piece in pieces)
    return tokens, features.astype(np.int64), values.astype(np.float64)


def _named(work: Work, partners: Sequence[Sequence[int]], found: Iterator[Any]) -> list[Near]:
    """Neighbours by name, positive ones alone, for each dictionary and feature."""
    near: list[Near] = [{} for _ in work.dictionaries]
    for number, features, best, values in found:
        widths = [work.dictionaries[other].n_features for other in partners[number]]
        ends = np.cumsum(widths)
        which = np.searchsorted(ends, best, side="right")
        own = best - (ends - widths)[which]
        for row, feature in enumerate(features.tolist()):
            near[number][feature] = [
                [work.dictionaries[partners[number][w]].name, f, round(value, 3)]
                for w, f, value in zip(which[row].tolist(), own[row].tolist(), values[row].tolist(), strict=True)
                if value >= 0.0005
            ]
    return near
