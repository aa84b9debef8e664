"""Options that several commands have alike."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def _device_map(context: click.Context, parameter: click.Parameter, given: str | None) -> Any:
    """A word of transformers as it is, else what the JSON file says."""
    if given is None or not Path(given).is_file():
        return given
    try:
        found = json.loads(Path(given).read_text(encoding="utf-8"))
    except ValueError as error:
        raise click.BadParameter(f"{given} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise click.BadParameter(f"{given} holds no object of modules and devices, such as {{\"model.layers.0\": 1}}")
    return found


device_options = (
    click.option("--device", default="cpu", show_default=True, help="cpu or cuda."),
    click.option(
        "--device-map",
        callback=_device_map,
        help="Spread the model over several GPUs: auto, balanced, or a JSON file with a device for each module.",
    ),
)


def model_options(command: Command) -> Command:
    """`--model`, `--replacement` (as `replacements`), `--device`, `--device-map`, `--dtype`: a model, what stands for
    its parts, and where."""
    for option in reversed(
        (
            click.option("--model", help="Folder or hub id of a causal LM. Default: the embedded model."),
            click.option(
                "--replacement",
                "replacements",
                multiple=True,
                help="Directory or hub id; with the embedded model attention-sae, mtc, weakly-causal, clt. Repeatable.",
            ),
            *device_options,
            click.option("--dtype", help="float32, bfloat16 or float16 for the weights. Default: as stored."),
        )
    ):
        command = option(command)
    return command


def graph_model_options(command: Command) -> Command:
    """The same for the model that a saved graph was traced with."""
    for option in reversed(
        (
            click.option("--model", help="Folder or hub id of the graph's model. Default: the embedded model."),
            click.option("--replacement", "replacements", multiple=True, help="The graph's replacements, each once."),
            *device_options,
        )
    ):
        command = option(command)
    return command
