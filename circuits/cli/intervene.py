"""`circuits intervene`: change features or attention patterns, and see what the model then says."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from circuits.cli.options import model_options

if TYPE_CHECKING:
    from rich.table import Table

    from circuits.changes import Change, PatternChange
    from circuits.generation import GeneratedText
    from circuits.interventions import Outcome
    from circuits.loading import Model
    from circuits.prompt import Prompt

NODES = """NODE is a node id as in a graph: 2_17_3 (MLP feature 17 of layer 2 at position 3), a2_153_7 (attention),
k1_5_4 and q1_5_9 (key and query side of an MTC), v0_3_2 (value), 2_error_7, a2_error_7, r1_error_3 (errors), E_17_3
(token); positions may be ranges: 2_17_3:8, 2_17_5: (generated tokens too), 2_17_: (all)."""
FC = TypeVar("FC", bound="Callable[..., Any] | click.Command")
_HEAD = re.compile(r"L(\d+)H(\d+):(\d*)->(\d*)(=|\*)(.+)")


def _many(name: str, parameter: str, metavar: str, text: str) -> Callable[[FC], FC]:
    return click.option(f"--{name}", parameter, multiple=True, metavar=metavar, help=text + " May be repeated.")


@click.command("intervene", short_help="Change features or attention patterns and see what the model then says.",
               epilog=NODES)  # fmt: skip
@click.argument("prompt", required=False)
@click.option("--token-ids", help="The prompt as token ids, such as 0,17,4; taken as given.")
@click.option("--graph", type=click.Path(path_type=Path), help="Take the prompt and the model from a saved graph.")
@model_options
@_many("ablate", "ablate", "NODE", "Take a node away.")
@_many("set", "set_", "NODE=VALUE", "Give a feature this activation.")
@_many("scale", "scale", "NODE=FACTOR", "Multiply an activation.")
@_many("add", "add", "NODE=VALUE", "Add to an activation.")
@_many(
    "attention",
    "attention",
    "HEAD:QUERY->KEY=VALUE",
    "Change a pattern: L2H5:14->3=0, or *0.5 to scale, =only to look at this key alone; no QUERY or KEY is all.",
)
@click.option("--renormalize", is_flag=True, help="Scale the other entries of changed rows so that they sum to one.")
@click.option("--mode", type=click.Choice(["real", "frozen"]), default="real", show_default=True,
              help="Recompute everything, or hold all that a graph freezes.")  # fmt: skip
@click.option("--layers", help="FROM:TO, such as 2:4: hold the outputs of these layers, but for what is changed.")
@click.option("--freeze-attention", is_flag=True, help="Hold every attention pattern as recorded.")
@_many("watch", "watch", "NODE", "Show a feature before and after.")
@click.option("--position", type=int, default=-1, show_default=True, help="Where the next token is shown.")
@click.option("--generate", "new_tokens", type=click.IntRange(min=1), help="Go on with so many tokens.")
@click.option("--choice", type=click.Choice(["anew", "held"]), default="anew", show_default=True,
              help="Of an MTC's top-k of the context, while generating.")  # fmt: skip
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the most probable token.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write what was found as JSON too.")
def command(**options: Any) -> None:
    """Run PROMPT with some nodes or attention patterns changed, all together, and without.

    \b
    circuits intervene "When Mary and John went to the store, John gave a drink to" --ablate a1_1360_14
    """
    if sum(options[name] is not None for name in ("prompt", "token_ids", "graph")) != 1:
        raise click.UsageError("give the prompt once: as PROMPT, --token-ids or --graph")
    patterns = [_pattern(text, options["renormalize"]) for text in options["attention"]]
    valued = {how: [_valued(text, how) for text in options[name]] for how, name in _VALUED.items()}
    layers = _layers(options["layers"])
    if options["new_tokens"] and (options["mode"] == "frozen" or options["freeze_attention"]):
        raise click.UsageError("--generate recomputes everything: leave out --mode frozen and --freeze-attention")

    from circuits.changes import Change, PatternChange
    from circuits.cli.console import console, progress_bar
    from circuits.cli.trace import quiet_libraries
    from circuits.generation import generate
    from circuits.interventions import Bench

    changes: list[Change | PatternChange] = [Change(node, "ablate") for node in options["ablate"]]
    changes += [Change(node, how, value) for how, given in valued.items() for node, value in given]  # type: ignore[arg-type]
    changes += [PatternChange(**pattern) for pattern in patterns]
    if not changes:
        raise click.UsageError("nothing is changed; give --ablate, --set, --scale, --add or --attention")
    quiet_libraries()
    with progress_bar("loading"):
        model, prompt = _loaded(options)
    with progress_bar("intervening"):
        outcome = Bench(model, prompt).run(
            [changes],
            mode=options["mode"],
            layers=layers,
            features=options["watch"],
            positions=[options["position"]],
            freeze_attention=options["freeze_attention"],
        )
    text = None
    if options["new_tokens"]:
        with progress_bar("generating"):
            text = generate(
                model,
                prompt,
                changes,
                max_new_tokens=options["new_tokens"],
                layers=layers,
                choice=options["choice"],
                temperature=options["temperature"],
                seed=options["seed"],
            )
    _show(prompt, outcome, text)
    if (output := options["output"]) is not None:
        _write(output, prompt, options["mode"], changes, outcome, text)
        console.print(f"wrote {output}")


_VALUED = {"set": "set_", "scale": "scale", "add": "add"}


def _valued(text: str, how: str) -> tuple[str, float]:
    """`NODE=VALUE` in its parts."""
    node, sign, value = text.rpartition("=")
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not sign or number - number != 0:
        raise click.BadParameter(f"{text!r} is not NODE=VALUE, such as 2_17_3=4.5", param_hint=f"--{how}")
    return node, number


def _pattern(text: str, renormalize: bool) -> dict[str, Any]:
    """`L2H5:14->3=0` as the fields of a `PatternChange`."""
    found = _HEAD.fullmatch(text.replace(" ", ""))
    hint = "expected HEAD:QUERY->KEY=VALUE, such as L2H5:14->3=0, or *0.5 or =only at its end; no QUERY or KEY is all"
    if found is None:
        raise click.BadParameter(f"{text!r} names no attention; {hint}", param_hint="--attention")
    layer, head, query, key, sign, value = found.groups()
    only = sign == "=" and value == "only"
    try:
        number = 1.0 if only else float(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} in {text!r} is no number; {hint}", param_hint="--attention") from None
    return {
        "layer": int(layer),
        "head": int(head),
        "query": int(query) if query else None,
        "key": int(key) if key else None,
        "how": "row" if only else "scale" if sign == "*" else "set",
        "value": number,
        "renormalize": renormalize and not only,
    }


def _layers(text: str | None) -> range | None:
    if text is None:
        return None
    if (found := re.fullmatch(r"(\d+):(\d+)", text)) is None:
        raise click.BadParameter(f"{text!r} is not FROM:TO, such as 2:4 for layers 2 and 3", param_hint="--layers")
    return range(int(found[1]), int(found[2]))


def _loaded(options: dict[str, Any]) -> "tuple[Model, Prompt]":
    """The model, and the prompt as it runs on it."""
    from circuits.graph import Graph
    from circuits.loading import load, model_of
    from circuits.prompt import prepare

    places = options["model"], options["replacements"] or None
    held = {name: options[name] for name in ("device", "dtype", "device_map")}
    if options["graph"] is not None:
        graph = Graph.load(options["graph"])
        model = model_of(graph, *places, **held)
        return model, prepare(model.base, graph.token_ids)
    model = load(*places, **held)
    if options["token_ids"] is None:
        return model, prepare(model.base, options["prompt"])
    try:
        ids = [int(part) for part in options["token_ids"].replace(",", " ").split()]
    except ValueError as error:
        raise click.BadParameter(
            f"{options['token_ids']!r} is not a list of integers", param_hint="--token-ids"
        ) from error
    return model, prepare(model.base, ids)


def _show(prompt: "Prompt", outcome: "Outcome", text: "GeneratedText | None") -> None:
    from rich.text import Text

    from circuits.cli.console import QUIET, console
    from circuits.graph.formats.text import visible

    console.print(Text(visible(prompt.text), style="italic"))
    console.print()
    console.print(_token_table(prompt, outcome))
    if outcome.nodes:
        console.print()
        console.print(_feature_table(prompt, outcome))
    for name, part in (("alone", text.baseline), ("changed", text.changed)) if text is not None else ():
        console.print()
        console.print(Text(f"{name}: ", style=QUIET) + Text(visible(part.text), style="not italic"))


def _token_table(prompt: "Prompt", outcome: "Outcome") -> "Table":
    from rich.text import Text

    from circuits.cli.console import new_table, signed
    from circuits.graph.formats.text import visible

    at = outcome.positions[0]
    title = f'Next token after {at} "{visible(prompt.tokens[at])}"'
    table = new_table(title, "token", "before>", "after>", "logit before>", "after>", "change>")
    for row in outcome.top_tokens():
        table.add_row(
            Text(f'"{visible(row.text)}"', style="bold"),
            f"{row.probability:.3f}",
            f"{row.new_probability:.3f}",
            f"{row.logit:.2f}",
            f"{row.new_logit:.2f}",
            signed(row.new_logit - row.logit),
        )
    return table


def _feature_table(prompt: "Prompt", outcome: "Outcome") -> "Table":
    from rich.text import Text

    from circuits.addresses import parse_address
    from circuits.cli.console import QUIET, new_table, signed
    from circuits.graph.formats.text import visible
    from circuits.story import KIND_NAMES

    table = new_table("Watched features", "feature", "pre-activation>", "activation>", "after>", "change>")
    for row in outcome.watched():
        address = parse_address(row.node)
        name = Text(f"{KIND_NAMES[address.kind]} L{address.layer} #{address.feature}")
        name.append(f'\n  at {address.start} "{visible(prompt.tokens[address.start])}"', style=QUIET)
        table.add_row(
            name,
            f"{row.pre_activation:.2f} to {row.new_pre_activation:.2f}",
            f"{row.activation:.2f}",
            f"{row.new_activation:.2f}",
            signed(row.new_activation - row.activation),
        )
    return table


def _write(
    path: Path,
    prompt: "Prompt",
    mode: str,
    changes: "list[Change | PatternChange]",
    outcome: "Outcome",
    text: "GeneratedText | None",
) -> None:
    from circuits.graph.formats.whole_file import write_whole

    document: dict[str, Any] = {
        "prompt": prompt.text,
        "token_ids": list(prompt.token_ids),
        "mode": mode,
        "changes": [asdict(change) for change in changes],
        "position": outcome.positions[0],
        "tokens": [asdict(row) for row in outcome.top_tokens(count=20)],
        "features": [asdict(row) for row in outcome.watched()],
    }
    if text is not None:
        document["generated"] = {"alone": asdict(text.baseline), "changed": asdict(text.changed)}
    write_whole(path, (json.dumps(document, indent=1) + "\n").encode())
