"""`circuits train KIND`: a replacement from text."""

import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from circuits.cli.train_options import COMMON, KINDS

if TYPE_CHECKING:
    from circuits.kinds import Settings
    from circuits.model import BaseModel
    from circuits.training import TrainingPlan


@click.group("train", short_help="Train a replacement on text.")
def command() -> None:
    """Train a replacement of KIND; run the same command again to go on after a stop.

    \b
    circuits train mtc --model gpt2 --text corpus.txt -o build
    torchrun --nproc-per-node 8 -m circuits train clt --model gpt2 --text corpus.txt -o build --device cuda
    """


def _subcommand(kind: str) -> click.Command:
    summary, own = KINDS[kind]

    def run(**options: Any) -> None:
        _train(kind, options)

    run.__doc__ = summary
    for decorate in reversed([*COMMON, *own]):
        run = decorate(run)
    return click.command(kind, short_help=summary)(run)


for _kind in KINDS:
    command.add_command(_subcommand(_kind))


def _train(kind: str, options: dict[str, Any]) -> None:
    from circuits.base_models import load_base_model
    from circuits.cli.console import console, progress_bar
    from circuits.cli.trace import quiet_libraries
    from circuits.replacements.parallel import started
    from circuits.replacements.training import Reports
    from circuits.training import Watch, set_threads, train_replacement

    quiet_libraries()
    set_threads(options["threads"])
    with started(options["device"]) as (processes, device):
        model = load_base_model(options["model"], device=device, dtype=options["model_dtype"])
        plan = _plan(kind, model, options)
        with progress_bar("caching") as caching, progress_bar(f"training {kind}") as progress:

            def report(step: int, figures: dict[str, float]) -> None:
                console.print(f"step {step}  {_line(figures)}")

            trained = train_replacement(model, plan, Watch(Reports(report, progress), caching), processes)
        if trained is not None:
            console.print_json(json.dumps(trained.training))
            console.print(f"wrote {plan.output / kind}")


def _plan(kind: str, model: "BaseModel", options: dict[str, Any]) -> "TrainingPlan":
    from circuits.kinds import Places
    from circuits.replacements.training import TrainingSettings
    from circuits.streams import StreamSettings
    from circuits.training import TextSettings, TrainingPlan

    places = {field.name: options[field.name] for field in fields(Places) if field.name in options}
    return TrainingPlan(
        kind=kind,
        text=TextSettings(
            options["text"], options["held_out"], options["field"], options["window"], options["shuffle"]
        ),
        output=options["output"],
        settings=_settings(kind, model, options),
        loop=TrainingSettings(
            steps=options["steps"],
            lr=options["lr"],
            figures_every=options["log_every"],
            checkpoint_every=options["checkpoint_every"],
            precision=options["precision"],
        ),
        places=Places(**places),
        stream=StreamSettings(
            options["batch_tokens"],
            options["seed"],
            options["cache"],
            options["cache_tokens"],
            options["cache_dtype"],
        ),
        dtype=options["dtype"],
    )


def _settings(kind: str, model: "BaseModel", options: dict[str, Any]) -> "Settings":
    """The kind's settings, from the options that bear their fields' names."""
    from circuits.kinds import KINDS as BUILT
    from circuits.replacements.coder import CoderSettings, JumpSettings
    from circuits.replacements.multitoken_settings import MultiTokenSettings

    wanted = BUILT[kind].settings
    given = {field.name: options[field.name] for field in fields(wanted) if field.name in options}
    if wanted is CoderSettings and options["sparsity"] is not None:
        given["jump"] = JumpSettings(sparsity=options["sparsity"])
    if wanted is MultiTokenSettings:
        given["ranks"] = _ranks(options["ranks"])
        given["heads"] = "one" if kind in ("single-head-mtc", "joint-mtc") else "all"
        given["joint"] = kind == "joint-mtc"
    if kind == "lorsa":
        given["ov_rank"] = 1
    if kind in ("attention-layer", "lorsa"):
        given["rotary_theta"] = model.rotary_theta
    settings: Settings = wanted(**given)
    return settings


def _ranks(text: str) -> tuple[tuple[int, float], ...]:
    try:
        blocks = [part.split(":") for part in text.split(",")]
        return tuple((int(rank), float(share)) for rank, share in blocks)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not RANK:SHARE,RANK:SHARE, such as 1:0.5,4:0.5") from None


def _line(figures: dict[str, float]) -> str:
    """Figures of one step, averaged over the dictionaries."""
    parts = [f"loss {figures['loss']:.4f}"]
    for prefix in ("nmse", "l0", "dead"):
        values = [value for name, value in figures.items() if name.startswith(prefix + "/")]
        if values:
            parts.append(f"{prefix} {sum(values) / len(values):.4f}")
    return "  ".join(parts)
