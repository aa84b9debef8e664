"""Options that several commands have alike."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def model_options(command: Command) -> Command:
    """`--model`, `--replacement` (as `replacements`), `--device`, `--dtype`: a model and what stands for its parts."""
    for option in reversed(
        (
            click.option("--model", help="Folder or hub id of a causal LM. Default: the embedded model."),
            click.option(
                "--replacement",
                "replacements",
                multiple=True,
                help="Directory or hub id; with the embedded model attention-sae, mtc, weakly-causal, clt. Repeatable.",
            ),
            click.option("--device", default="cpu", show_default=True, help="cpu or cuda."),
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
            click.option("--device", default="cpu", show_default=True, help="cpu or cuda."),
        )
    ):
        command = option(command)
    return command
