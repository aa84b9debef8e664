"""Labels from Neuronpedia: what it knows about the features of public dictionaries, fetched once and kept on disk."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from circuits.errors import CircuitsError
from circuits.graph import Graph
from circuits.graph.formats.whole_file import write_whole
from circuits.labels import Found, Progress
from circuits.neuronpedia import Server, source_of
from circuits.web import Unreachable

BATCH = 100  # features in one question
PREFERRED = "np_max-act-logits"  # the kind of explanation that Neuronpedia's own graph viewer prefers


@dataclass(frozen=True)
class NeuronpediaLabels:
    """The explanations that Neuronpedia has of a graph's features.

    MLP features are looked up in the source set; features of attention in `neuronpedia_lorsa_source_set` of the graph's
    `feature_details`, where it has one. Labels once fetched are kept on disk, in `cache`, and not asked for again.
    """

    server: Server
    model: str | None = None
    source_set: str | None = None
    cache: Path | None = None

    def graph_labels(self, graph: Graph, progress: Progress | None = None) -> Found:
        """Labels of a graph's features.

        Raises
        ------
        CircuitsError
            Nothing says which source set the graph's features are of, or Neuronpedia refuses, or it cannot be reached
            and nothing is on disk.
        """
        scan, source_set = source_of(graph, self.model, self.source_set)
        details = graph.metadata.get("feature_details") or {}
        attention = details.get("neuronpedia_lorsa_source_set") if isinstance(details, dict) else None
        sets = {kind: source_set if kind == "mlp_feature" else attention for kind in set(graph.nodes.kind.tolist())}
        if not any(sets.values()):
            raise CircuitsError(
                "the graph does not say which dictionaries of Neuronpedia its features are of; name them with "
                f"--source-set such as gemmascope-transcoder-16k for https://www.neuronpedia.org/{scan}/"
                "gemmascope-transcoder-16k"
            )
        nodes = graph.nodes
        wanted: dict[str, list[int]] = {}
        sources: dict[int, str] = {}
        for node in np.flatnonzero(nodes.is_feature).tolist():
            if of := sets[str(nodes.kind[node])]:
                sources[node] = f"{nodes.layer[node]}-{of}"
                wanted.setdefault(sources[node], []).append(int(nodes.feature[node]))
        shelf = _Shelf(self.cache or cache_folder(), self.server, scan)
        known, unreachable = shelf.labels(wanted, progress)
        found = {node: known.get((source, int(nodes.feature[node])), "") for node, source in sources.items()}
        labels = {node: text for node, text in found.items() if text}
        if unreachable is not None and not labels:
            raise CircuitsError(unreachable)
        facts = {}
        if source_set is not None:
            facts = {"feature_details": {**details, "neuronpedia_source_set": source_set}}
        return Found(labels, len(sources), unreachable, facts)


def cache_folder() -> Path:
    """Where labels are kept: `circuits/neuronpedia` in XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "circuits" / "neuronpedia"


@dataclass(frozen=True)
class _Shelf:
    """Labels of one model's features: one JSON file for each source, and the server for what is not in it."""

    folder: Path
    server: Server
    model: str

    def labels(
        self, wanted: dict[str, list[int]], progress: Progress | None
    ) -> tuple[dict[tuple[str, int], str], str | None]:
        """Labels by (source, feature), and why the server was not reached, if it was not."""
        found: dict[tuple[str, int], str] = {}
        unreachable, done, total = None, 0, sum(len(set(features)) for features in wanted.values())
        for source, features in wanted.items():
            kept = self._read(source)
            missing = sorted({feature for feature in features if str(feature) not in kept})
            for batch in _batches(missing):
                if unreachable is None:
                    try:
                        kept |= self._fetch(source, batch)
                    except Unreachable as error:
                        unreachable = str(error)
            if missing and unreachable is None:
                self._write(source, kept)
            found |= {(source, feature): kept[str(feature)] for feature in features if kept.get(str(feature))}
            done += len(set(features))
            if progress is not None:
                progress(done, total)
        return found, unreachable

    def _fetch(self, source: str, features: list[int]) -> dict[str, str]:
        """Labels by feature; "" of those that have none."""
        question = [
            {"modelId": self.model, "layer": source, "index": feature, "maxActsToReturn": 1} for feature in features
        ]
        answer = self.server.ask("/api/features", question)
        if not isinstance(answer, list):
            raise CircuitsError("Neuronpedia's answer is no list of features; its interface has changed")
        labels = {}
        for row in answer:
            if isinstance(row, dict) and row.get("layer") == source and str(row.get("index")).isdigit():
                labels[str(int(row["index"]))] = _explanation(row.get("explanations"))
        return {feature: text for feature, text in labels.items() if text and int(feature) in set(features)}

    def _file(self, source: str) -> Path:
        return self.folder / (urlsplit(self.server.url).hostname or "local") / self.model / f"{source}.json"

    def _read(self, source: str) -> dict[str, str]:
        try:
            kept = json.loads(self._file(source).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {str(key): str(value) for key, value in kept.items()} if isinstance(kept, dict) else {}

    def _write(self, source: str, labels: dict[str, str]) -> None:
        """Keep labels; a disk that cannot take them is no reason to fail."""
        file = self._file(source)
        with suppress(OSError, ValueError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(labels, sort_keys=True).encode())


def _batches(features: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(features), BATCH):
        yield features[start : start + BATCH]


def _explanation(given: Any) -> str:
    """The text of the explanation that Neuronpedia's viewer would show, "" if there is none."""
    rows: Iterable[Any] = given if isinstance(given, list) else ()
    texts = [(row.get("typeName"), str(row.get("description") or "").strip()) for row in rows if isinstance(row, dict)]
    ranked = sorted((kind != PREFERRED, number, text) for number, (kind, text) in enumerate(texts) if text)
    return " ".join(ranked[0][2].split()) if ranked else ""
