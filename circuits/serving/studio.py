"""What is done with the model, the shelf and the feature pages: traces, interventions, viewers and labels."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from circuits.changes import Change
from circuits.errors import CircuitsError
from circuits.feature_store import FeatureStore, default_store, writable
from circuits.graph import Graph
from circuits.graph.formats import html_file
from circuits.graph.tables import ID_PREFIXES
from circuits.interventions import Bench
from circuits.labels import label
from circuits.loading import Model, check_fits
from circuits.prompt import Prompt, prepare
from circuits.serving.asked import Bad, ChangeAsked, TraceAsked, trace_asked
from circuits.serving.shelf import Shelf
from circuits.serving.work import Job
from circuits.settings import TraceSettings
from circuits.targets import Target, TokenDifference, parse_target, token_id
from circuits.tracing import trace

TOKENS = 8  # rows of the table of an intervention


@dataclass(frozen=True)
class Studio:
    """One model for all requests, which take turns (`work.Worker`), the shelf, and feature pages.

    features
        The store that was named; None: that of the embedded model, the user's own before the one that came with it.
    """

    model: Model
    shelf: Shelf
    max_tokens: int
    features: Path | None = None

    # --- with the model, one at a time ------------------------------------------------------------------------------

    def trace(self, asked: TraceAsked, job: Job) -> dict[str, Any]:
        """Trace a prompt and save the graph."""
        prompt = self._short(prepare(self.model.base, asked.prompt))
        graph = self._traced(prompt, asked, [], job)
        return {"graph": self.shelf.keep(graph, asked.prompt)}

    def intervene(self, name: str, asked: Sequence[ChangeAsked], job: Job) -> dict[str, Any]:
        """Run a saved graph's prompt with nodes changed, trace it so, and save what comes out with the logits."""
        graph = self.shelf.open(name)
        check_fits(graph, self.model)
        given = graph.metadata.get("asked")
        request = trace_asked(given, self.max_tokens) if given else TraceAsked(graph.prompt)
        prompt = self._short(replace(prepare(self.model.base, graph.token_ids), text=graph.prompt))
        changes = changes_of(graph, asked)
        job.begin("running the changed model")
        outcome = Bench(self.model, prompt).run([changes], batch_size=1)
        changed = self._traced(prompt, request, changes, job)
        made = {
            "of": name,
            "asked": [asdict(change) for change in asked],
            "position": outcome.positions[0],
            "tokens": [row.__dict__ for row in outcome.top_tokens(count=TOKENS)],
        }
        changed = replace(changed, metadata={**changed.metadata, "intervention": made})
        words = " ".join(f"{change.how} {' '.join(change.nodes[:2])}" for change in asked[:2])
        return {"graph": self.shelf.keep(changed, f"{name[:40]} {words}")}

    def _traced(self, prompt: Prompt, asked: TraceAsked, changes: Sequence[Change], job: Job) -> Graph:
        settings = TraceSettings(
            node_threshold=asked.node_threshold,
            edge_threshold=asked.edge_threshold,
            max_feature_nodes=asked.max_feature_nodes,
            explain=asked.explain,
        )
        targets = self._targets(asked)
        graph = trace(self.model, prompt, targets, settings, job.begin("tracing"), changes)
        job.begin("saving")
        return replace(graph, metadata={**graph.metadata, "asked": asked.as_json()})

    def _targets(self, asked: TraceAsked) -> list[Target] | None:
        base = self.model.base
        if not asked.targets:
            return None
        if asked.minus is not None:
            return [TokenDifference(token_id(base, asked.targets[0]), token_id(base, asked.minus))]
        return [parse_target(base, target) for target in asked.targets]

    def _short(self, prompt: Prompt) -> Prompt:
        if len(prompt.token_ids) > self.max_tokens:
            raise Bad(
                f"the prompt has {len(prompt.token_ids)} tokens; this server takes {self.max_tokens} (--max-tokens)"
            )
        return prompt

    # --- without ----------------------------------------------------------------------------------------------------

    def viewer(self, name: str) -> str:
        """The page of a graph: its viewer, with labels and feature pages where there are any."""
        graph = self.shelf.open(name)
        store = self.store()
        if store is None:
            return html_file.to_html(graph)
        try:
            return html_file.to_html(label(graph, store).graph, store.pages(graph))
        except CircuitsError:  # a store of another model
            return html_file.to_html(graph)

    def store(self) -> FeatureStore | None:
        """The feature pages, None if there are none."""
        return default_store() if self.features is None else FeatureStore(self.features)

    def page(self, dictionary: str, feature: int) -> dict[str, Any]:
        """A feature's page.

        Raises
        ------
        CircuitsError
            There is none.
        """
        store = self.store()
        if store is None:
            raise CircuitsError("there are no feature pages; build them with `circuits features build`")
        return dict(store.page(dictionary, feature))

    def set_label(self, dictionary: str, feature: int, text: str) -> dict[str, Any]:
        """Write down a person's label, into the user's own copy of the store that came with the package."""
        if self.store() is None:
            raise CircuitsError("there are no feature pages; build them with `circuits features build`")
        FeatureStore(writable(self.features)).set_label(dictionary, feature, text)
        return self.page(dictionary, feature)


def changes_of(graph: Graph, asked: Sequence[ChangeAsked]) -> list[Change]:
    """Changes of a graph's nodes, each addressed with its dictionary: a name that comes twice is then told apart.

    Raises
    ------
    Bad
        A node is not in the graph, is an output, or comes twice.
    """
    places = {name: number for number, name in enumerate(graph.node_ids())}
    found, seen = [], set()
    for change in asked:
        for name in change.nodes:
            node = places.get(name)
            if node is None:
                raise Bad(f"{name!r} is no node of this graph")
            if graph.nodes.kind[node] == "logit":
                raise Bad(f"{name!r} is an output; change what feeds it")
            if name in seen:
                raise Bad(f"{name!r} is to be changed twice")
            seen.add(name)
            found.append(Change(_address(graph, node), "ablate" if change.how == "ablate" else "scale", change.value))
    return found


def _address(graph: Graph, node: int) -> str:
    nodes = graph.nodes
    kind, layer, feature = str(nodes.kind[node]), int(nodes.layer[node]), int(nodes.feature[node])
    place = ID_PREFIXES[kind] + ("" if kind == "embedding" else str(layer))
    at = f"{place}_{'error' if feature < 0 else feature}_{int(nodes.position[node])}"
    return f"{at}@{nodes.dictionary[node]}" if nodes.is_feature[node] else at
