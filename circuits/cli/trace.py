"""`circuits trace`: from a prompt to files."""

from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from circuits.cli.options import model_options
from circuits.settings import PRODUCTS, TraceSettings

if TYPE_CHECKING:
    from circuits.loading import Model
    from circuits.prompt import Prompt
    from circuits.targets import Target

FORMATS = ("json", "npz", "svg", "html", "dot", "graphml")


@dataclass(frozen=True)
class _Wanted:
    """What the options ask for: the prompt's source, the targets, and where they stand."""

    prompt: str | None
    token_ids: str | None
    prompt_file: Path | None
    chat: bool
    targets: tuple[str, ...]
    minus: str | None
    positions: tuple[int, ...]


@click.command("trace", short_help="Trace a prompt to a pruned attribution graph.")
@click.argument("prompt", required=False)
@model_options
@click.option("--token-ids", help="The prompt as token ids, such as 0,17,4; taken as given.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="Read the prompt from a text file.")
@click.option("--chat", is_flag=True, help="Put the prompt through the tokenizer's chat template.")
@click.option("--target", "targets", multiple=True,
              help="Token (text or id) or node id such as a2_153_7; may be repeated. Default: top tokens.")  # fmt: skip
@click.option("--minus", help="Explain the difference: the logit of --target less that of this token.")
@click.option("--position", "positions", type=int, multiple=True, help="Position of the targets. Default: the last.")
@click.option("--max-targets", type=click.IntRange(min=1), help="Compute the rows of so many features, best first.")
@click.option("--hops/--no-hops", default=True, help="Split edges through frozen attention by first and last hop.")
@click.option("--products", type=click.Choice(PRODUCTS), default="float32", show_default=True,
              help="Of the search; edges are float32 all the same.")  # fmt: skip
@click.option("--max-feature-nodes", type=int, help="Keep at most so many features, the strongest first.")
@click.option("--node-threshold", type=float, default=0.8, show_default=True, help="Share of influence to keep.")
@click.option("--edge-threshold", type=float, default=0.98, show_default=True, help="Share of edge scores to keep.")
@click.option("--left-out", type=float, default=1e-3, show_default=True,
              help="Influence that may stay unexpanded in all; 0 expands everything.")  # fmt: skip
@click.option("--unpruned", is_flag=True, help="Keep every node and edge.")
@click.option("--explain", is_flag=True, help="Explain why the heads that carry the edges looked where they did.")
@click.option("--verify", type=click.IntRange(min=0),
              help="Ablate so many of the strongest nodes, and compare with the prediction; 0: all.")  # fmt: skip
@click.option("--estimate", is_flag=True, help="Say what it would take, load no weights, write nothing.")
@click.option("--features", "store", type=click.Path(path_type=Path),
              help="Feature store of labels and pages. Default: the embedded model's.")  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder for the files: graph.json, graph.html, ..."
)
@click.option("--format", "formats", default="json,svg,html", show_default=True,
              help=f"Which files: {','.join(FORMATS)}.")  # fmt: skip
@click.option("--quiet", is_flag=True, help="No tables.")
def command(**options: Any) -> None:
    """Trace PROMPT to an attribution graph in which every step between two tokens is visible.

    \b
    circuits trace "When Mary and John went to the store, John gave a drink to" -o out
    """
    formats = _formats(options["formats"])
    settings = TraceSettings(
        left_out=options["left_out"],
        node_threshold=options["node_threshold"],
        edge_threshold=options["edge_threshold"],
        max_feature_nodes=options["max_feature_nodes"],
        max_targets=options["max_targets"],
        hops=options["hops"],
        unpruned=options["unpruned"],
        explain=options["explain"],
        products=options["products"],
    )
    wanted = _Wanted(**{name: options[name] for name in _Wanted.__dataclass_fields__})
    if sum(source is not None for source in (wanted.prompt, wanted.token_ids, wanted.prompt_file)) != 1:
        raise click.UsageError("give the prompt once: as PROMPT, --token-ids or --prompt-file")
    if options["estimate"]:
        _estimate(wanted, settings, options)
        return
    output: Path | None = options["output"]
    if output is not None:
        _make_folder(output)

    from circuits.cli.console import console, progress_bar, show_graph
    from circuits.cli.files import save
    from circuits.feature_store import store_of
    from circuits.labels import label
    from circuits.loading import load
    from circuits.tracing import trace

    quiet_libraries()
    with progress_bar("loading"):
        model = load(
            options["model"],
            options["replacements"] or None,
            device=options["device"],
            dtype=options["dtype"],
            device_map=options["device_map"],
        )
    prompt = _prompt(model, wanted)
    with progress_bar("sweeping") as progress:
        graph = trace(model, prompt, _targets(model, wanted), settings, progress)
    if options["verify"] is not None:
        from circuits.verification import verify

        with progress_bar("ablating") as progress:
            graph = verify(model, graph, nodes=options["verify"] or None, progress=progress)
    if (store := store_of(graph, options["store"])) is not None:
        graph = label(graph, store).graph
    if output is not None:
        for suffix in formats:
            save(graph, output / f"graph.{suffix}", store)
    if not options["quiet"]:
        show_graph(graph)
        if options["verify"] is not None:
            from circuits.cli.verify import show_verification

            show_verification(graph)
        if output is not None:
            console.print(f"wrote {', '.join(str(output / f'graph.{suffix}') for suffix in formats)}")


def _estimate(wanted: _Wanted, settings: TraceSettings, options: dict[str, Any]) -> None:
    from time import perf_counter

    from circuits.base_models import check_device
    from circuits.cli.estimate import show_estimate
    from circuits.estimating import estimate_headers
    from circuits.headers import load_headers

    quiet_libraries()
    check_device(options["device"])
    start = perf_counter()
    model = load_headers(options["model"], options["replacements"] or None, dtype=options["dtype"])
    started = perf_counter() - start
    prompt, targets = _prompt(model, wanted), _targets(model, wanted)
    found = estimate_headers(model, prompt, targets, settings, device=options["device"], started=started)
    asked = {"--explain": options["explain"], "--verify": options["verify"] is not None}
    show_estimate(found, tuple(name for name, wanted in asked.items() if wanted))


def quiet_libraries() -> None:
    """Keep the progress bars and warnings of transformers off the terminal."""
    from transformers.utils import logging

    quiet: Any = logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    getLogger("accelerate").setLevel("ERROR")


def _formats(text: str) -> list[str]:
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found or (unknown := [name for name in found if name not in FORMATS]):
        raise click.BadParameter(
            f"{unknown[0] if found else text!r} is not one of {', '.join(FORMATS)}", param_hint="--format"
        )
    return found


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.BadParameter(
            f"{path}: the folder cannot be made: {error.strerror}", param_hint="--output"
        ) from error


def _prompt(model: "Model", wanted: _Wanted) -> "Prompt":
    from circuits.prompt import prepare, read_prompt_file

    if wanted.token_ids is not None:
        try:
            ids = [int(part) for part in wanted.token_ids.replace(",", " ").split()]
        except ValueError as error:
            raise click.BadParameter(
                f"{wanted.token_ids!r} is not a list of integers", param_hint="--token-ids"
            ) from error
        return prepare(model.base, ids)
    text = read_prompt_file(wanted.prompt_file) if wanted.prompt_file is not None else wanted.prompt
    return prepare(model.base, text or "", chat=wanted.chat)


def _targets(model: "Model", wanted: _Wanted) -> "list[Target]":
    from circuits.targets import TokenDifference, TopTokens, parse_target, token_id

    positions = wanted.positions or (-1,)
    if wanted.minus is not None and len(wanted.targets) != 1:
        raise click.UsageError("--minus needs exactly one --target to subtract from")
    if not wanted.targets:
        return [TopTokens(position) for position in positions]
    if wanted.minus is not None:
        ids = token_id(model.base, wanted.targets[0]), token_id(model.base, wanted.minus)
        return [TokenDifference(*ids, position) for position in positions]
    return [parse_target(model.base, text, position) for text in wanted.targets for position in positions]
