"""`circuits`: the group of commands, and how errors reach the user."""

import sys
from importlib import import_module

import click

from circuits import __version__

_COMMANDS = {
    "trace": ("circuits.cli.trace", "Trace a prompt to a pruned attribution graph."),
    "explain": ("circuits.cli.explain", "Say what a node reads, what an edge carries, and why heads looked there."),
    "intervene": ("circuits.cli.intervene", "Change features or attention patterns and see what the model then says."),
    "verify": ("circuits.cli.verify", "Test a graph's predictions by interventions."),
    "partners": ("circuits.cli.partners", "List the features that a feature meets whatever the prompt."),
    "show": ("circuits.cli.show", "Show a saved graph as tables."),
    "render": ("circuits.cli.render", "Write a saved graph as SVG, DOT, GraphML, JSON or npz."),
    "label": ("circuits.cli.label", "Label a saved graph's features, from feature pages or from Neuronpedia."),
    "features": ("circuits.cli.features", "Build, show, label, import and export feature pages."),
    "serve": ("circuits.cli.serve", "Trace, intervene and read feature pages in a browser."),
    "upload": ("circuits.cli.upload", "Upload a saved graph to Neuronpedia."),
    "info": ("circuits.cli.info", "Describe a model or a replacement."),
    "convert": ("circuits.cli.convert", "Write a replacement in our format or circuit-tracer's."),
    "train": ("circuits.cli.train", "Train a replacement on text."),
}


class _Lazy(click.Group):
    """Imports a command's module when it is called, not when it is listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = import_module(_COMMANDS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_text) for name, (_, help_text) in _COMMANDS.items()])


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="circuits")
def group() -> None:
    """Why did the model say that, and how did the information get there?

    Attribution graphs of transformer language models in which every step between two tokens is visible.
    """


def main() -> None:
    """Run the command line; errors that a user can act on end with code 2 and without a traceback."""
    try:
        group(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        sys.exit(130)
    except ValueError as error:
        if not _is_ours(error):
            raise
        click.secho("error: ", fg="red", bold=True, nl=False, err=True)
        click.echo(str(error), err=True)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        click.secho("error: ", fg="red", bold=True, nl=False, err=True)
        click.echo("out of memory; try a shorter prompt, --dtype bfloat16, or --max-feature-nodes", err=True)
        sys.exit(2)


def _is_ours(error: ValueError) -> bool:
    from circuits.errors import CircuitsError
    from circuits.graph.errors import GraphError

    if isinstance(error, CircuitsError | GraphError):
        return True
    module = sys.modules.get("circuits.replacements.errors")
    return module is not None and isinstance(error, module.ReplacementError)


def _is_out_of_memory(error: BaseException) -> bool:
    words = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in words or "can't allocate memory" in words
