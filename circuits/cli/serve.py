"""`circuits serve`: prompts, graphs, interventions and feature pages in a browser."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from circuits.cli.options import model_options

NEEDS = ("starlette", "uvicorn")


@click.command("serve", short_help="Trace, intervene and read feature pages in a browser.")
@model_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; the default is for this "
              "machine alone.")  # fmt: skip
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--graphs", type=click.Path(path_type=Path),
              help="Folder of saved graphs. Default: circuits/graphs among the user's data.")  # fmt: skip
@click.option("--features", type=click.Path(path_type=Path),
              help="Feature store. Default: the embedded model's.")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True,
              help="Longest prompt that is traced.")  # fmt: skip
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=120.0, show_default=True,
              help="Seconds that one request may take.")  # fmt: skip
@click.option("--waiting", type=click.IntRange(min=1), default=8, show_default=True,
              help="Requests that may wait for the model.")  # fmt: skip
def command(**options: Any) -> None:
    """Open a browser's page to trace prompts, change nodes and see what the model then says.

    \b
    circuits serve --port 8000
    """
    from circuits.errors import CircuitsError

    if missing := [name for name in NEEDS if find_spec(name) is None]:
        raise CircuitsError(
            f"`circuits serve` needs {' and '.join(missing)}: pip install 'attention-circuits[serve]', "
            f"or pip install {' '.join(NEEDS)}"
        )

    from circuits.cli.console import console, errors, progress_bar
    from circuits.cli.trace import quiet_libraries
    from circuits.feature_store import FeatureStore, own_path
    from circuits.loading import load
    from circuits.serving.guard import is_loopback
    from circuits.serving.running import bound, serve
    from circuits.serving.shelf import Shelf
    from circuits.serving.studio import Studio
    from circuits.serving.work import Worker

    host = options["host"]
    if options["features"] is not None:
        FeatureStore(options["features"])
    shelf = Shelf(options["graphs"] or own_path().parent / "graphs")
    with bound(host, options["port"]) as listening:
        quiet_libraries()
        with progress_bar("loading"):
            model = load(
                options["model"], options["replacements"] or None, device=options["device"], dtype=options["dtype"]
            )
        studio = Studio(model, shelf, options["max_tokens"], options["features"])
        shown = f"[{host}]" if ":" in host else host
        if not is_loopback(host):
            errors.print("Warning:", style="bold red", end=" ")
            errors.print(
                f"listening on {shown}. Everybody who reaches this address can trace with your model, read, change "
                "and delete the graphs here, and write labels: there is no password and no encryption. Use --host "
                "127.0.0.1 and a tunnel unless you trust everybody on this network.",
                markup=False,
            )

        def started() -> None:
            console.print(f"circuits at http://{shown}:{listening.getsockname()[1]}/  (graphs in {shelf.folder}; "
                          "Ctrl-C stops)", soft_wrap=True, markup=False)  # fmt: skip

        serve(studio, listening, host, Worker(options["waiting"], options["timeout"]), started)
    console.print("stopped")
