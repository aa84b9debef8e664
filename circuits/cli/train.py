"""`circuits train KIND`: a replacement from text files."""

import json
from pathlib import Path
from typing import Any

import click

KINDS = ("clt", "attention-sae", "weakly-causal")


@click.command("train", short_help="Train a replacement on text.")
@click.argument("kind", type=click.Choice(KINDS))
@click.option("--model", required=True, help="Folder or hub id of the causal LM.")
@click.option("--text", "text", type=click.Path(path_type=Path), multiple=True, required=True,
              help="Documents separated by <|endoftext|>, or a .jsonl of token ids; may be repeated.")  # fmt: skip
@click.option("--held-out", type=click.Path(path_type=Path), multiple=True,
              help="Text for the figures. Default: every fiftieth document.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder; holds checkpoints too.")
@click.option("--features", default=2048, show_default=True, help="Features of each layer's dictionary.")
@click.option("--activation", type=click.Choice(["batch_topk", "topk", "jump_relu"]), default="batch_topk",
              show_default=True)  # fmt: skip
@click.option("--k", default=20, show_default=True, help="Active features a token, for topk and batch_topk.")
@click.option("--sparsity", type=float, help="Weight of the tanh penalty, for jump_relu.")
@click.option("--site", type=click.Choice(["attn_out", "z"]), default="attn_out", show_default=True,
              help="What an attention SAE reads and rebuilds.")  # fmt: skip
@click.option("--layer", "layers", type=int, multiple=True, help="Only this layer's attention; may be repeated.")
@click.option("--steps", default=2000, show_default=True)
@click.option("--batch-tokens", default=4096, show_default=True)
@click.option("--window", default=256, show_default=True, help="Longest piece of text, in tokens.")
@click.option("--lr", default=1e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--dtype", default="float16", show_default=True, help="Of the saved matrices.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--model-dtype", default="float32", show_default=True, help="Precision that the model runs in.")
@click.option("--threads", type=int, help="CPU threads.")
@click.option("--log-every", default=50, show_default=True, help="Steps between figures.")
@click.option("--checkpoint-every", default=500, show_default=True, help="Steps between checkpoints.")
def command(**options: Any) -> None:
    """Train a replacement of KIND; run the same command again to go on after a stop.

    \b
    circuits train clt --model gpt2 --text corpus.txt -o build/clt
    """
    from circuits.cli.console import console, progress_bar
    from circuits.cli.trace import quiet_libraries
    from circuits.model import load_base_model
    from circuits.replacements.coder import CoderSettings, JumpSettings
    from circuits.replacements.training import TrainingSettings
    from circuits.training import TrainingPlan, set_threads, train_replacement

    quiet_libraries()
    set_threads(options["threads"])
    jump = JumpSettings() if options["sparsity"] is None else JumpSettings(sparsity=options["sparsity"])
    plan = TrainingPlan(
        kind=options["kind"],
        text=options["text"],
        output=options["output"],
        coder=CoderSettings(
            options["features"], activation=options["activation"], k=options["k"], jump=jump, seed=options["seed"]
        ),
        loop=TrainingSettings(
            steps=options["steps"],
            lr=options["lr"],
            figures_every=options["log_every"],
            checkpoint_every=options["checkpoint_every"],
        ),
        held_out=options["held_out"],
        site=options["site"],
        layers=options["layers"],
        batch_tokens=options["batch_tokens"],
        window=options["window"],
        dtype=options["dtype"],
    )
    model = load_base_model(options["model"], device=options["device"], dtype=options["model_dtype"])
    with progress_bar(f"training {plan.kind}") as progress:

        def report(step: int, figures: dict[str, float]) -> None:
            progress(step, plan.loop.steps)
            console.print(f"step {step}  {_line(figures)}")

        replacement = train_replacement(model, plan, report)
    console.print_json(json.dumps(replacement.training))
    console.print(f"wrote {replacement.path}")


def _line(figures: dict[str, float]) -> str:
    """Figures of one step, averaged over the dictionaries."""
    parts = [f"loss {figures['loss']:.4f}"]
    for prefix in ("nmse", "l0", "dead"):
        values = [value for name, value in figures.items() if name.startswith(prefix + "/")]
        if values:
            parts.append(f"{prefix} {sum(values) / len(values):.4f}")
    return "  ".join(parts)
