"""The options of `circuits train KIND`, by kind. No module here is heavy: `--help` is quick."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Decorator = Callable[[Any], Any]
option = click.option

COMMON: list[Decorator] = [
    option("--model", required=True, help="Folder or hub id of the causal LM."),
    option("--text", type=click.Path(path_type=Path), multiple=True, required=True,
           help="Text with <|endoftext|> between documents, .jsonl, .parquet, or hf:NAME:SPLIT; may be repeated."),
    option("--field", default="text", show_default=True, help="Field of .jsonl and .parquet that has the text."),
    option("--held-out", type=click.Path(path_type=Path), multiple=True,
           help="Text for the figures. Default: every fiftieth document."),
    option("--window", default=256, show_default=True, help="Longest piece of text, in tokens."),
    option("--shuffle", default=20_000, show_default=True, help="Documents shuffled among one another."),
    option("--cache", type=click.Path(path_type=Path), help="Folder: compute activations once, keep and reuse them."),
    option("--cache-tokens", default=1_000_000, show_default=True, help="Tokens to cache at most."),
    option("--cache-dtype", default="float16", show_default=True, help="What cached activations are stored as."),
    option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder; holds checkpoints too."),
    option("--steps", default=2000, show_default=True),
    option("--batch-tokens", default=4096, show_default=True, help="Tokens of a batch, of each process."),
    option("--lr", default=1e-3, show_default=True),
    option("--seed", default=0, show_default=True),
    option("--dtype", default="float16", show_default=True, help="Of the saved matrices."),
    option("--device", default="cpu", show_default=True, help="cpu or cuda."),
    option("--model-dtype", default="float32", show_default=True, help="Precision that the model runs in."),
    option("--precision", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True,
           help="Of the products in the loss; master weights stay float32."),
    option("--threads", type=int, help="CPU threads."),
    option("--log-every", default=50, show_default=True, help="Steps between figures."),
    option("--checkpoint-every", default=500, show_default=True, help="Steps between checkpoints."),
]  # fmt: skip

LAYER = option("--layer", "layers", type=int, multiple=True, help="Only this layer's attention; may be repeated.")
FEATURES = option("--features", "n_features", default=2048, show_default=True, help="Features of each dictionary.")
K = option("--k", default=20, show_default=True, help="Active features a token, for topk and batch_topk.")
CODER: list[Decorator] = [
    FEATURES,
    option("--activation", type=click.Choice(["batch_topk", "topk", "jump_relu"]), default="batch_topk",
           show_default=True),
    K,
    option("--sparsity", type=float, help="Weight of the tanh penalty, for jump_relu."),
]  # fmt: skip


def multitoken(*, activation: str = "batch_topk", ranks: str = "1:1", penalties: tuple[float, float] = (0.0, 0.0),
               layers: bool = True) -> list[Decorator]:  # fmt: skip
    """The options of MTCs, with the defaults of one kind."""
    return [
        *([LAYER] if layers else []),
        FEATURES,
        option("--activation", type=click.Choice(["batch_topk", "topk", "relu", "group_soft"]), default=activation,
               show_default=True),
        K,
        option("--context-k", default=1024, show_default=True, help="Features that move in one context at most."),
        option("--no-identity", "identity", flag_value=False, default=True, help="Leave out the identity head."),
        option("--sparsity", default=penalties[0], show_default=True, help="Weight of the L1 penalty."),
        option("--negative", default=penalties[1], show_default=True, help="Weight of the pre-activation penalty."),
        option("--ranks", default=ranks, show_default=True, help="Blocks of features as RANK:SHARE,RANK:SHARE."),
    ]  # fmt: skip


def attention_layer(*, lorsa: bool) -> list[Decorator]:
    """The options of attention replacement layers, or of Lorsas."""
    activations = ["topk", "batch_topk"] if lorsa else ["identity"]
    return [
        LAYER,
        option("--heads", "n_heads", default=512 if lorsa else 64, show_default=True, help="Heads of each layer."),
        option("--qk-rank", default=32, show_default=True, help="Width of queries and keys."),
        *([] if lorsa else [option("--ov-rank", default=4, show_default=True, help="Largest rank of a head's OV.")]),
        option("--groups", type=int, default=32 if lorsa else None, show_default=True,
               help="Heads share the QK of their group. Default: each its own." if not lorsa else "Groups of one QK."),
        option("--activation", type=click.Choice(activations), default=activations[0], show_default=True),
        *([K] if lorsa else []),
        option("--penalty", default=0.0 if lorsa else 1e-4, show_default=True,
               help="Weight of [nuclear norm of QK times that of OV]^beta."),
        option("--beta", default=0.75, show_default=True),
        option("--pattern-sparsity", default=0.0, show_default=True, help="Weight of the penalty on broad patterns."),
        option("--start", type=click.Choice(["base", "random"]), default="base", show_default=True,
               help="First weights: copies of the base layer's heads, or noise."),
    ]  # fmt: skip


QK: list[Decorator] = [
    LAYER,
    option("--head", "heads", type=int, multiple=True, help="Only this head; may be repeated. Default: all, jointly."),
    FEATURES,
    option("--rank", default=1, show_default=True, help="Of every QK feature."),
    option("--prediction", type=click.Choice(["softmax", "linear"]), default="softmax", show_default=True),
    option("--activation", type=click.Choice(["batch_topk", "topk", "relu"]), default="batch_topk", show_default=True),
    option("--query-k", default=16, show_default=True, help="Active features a query."),
    option("--key-k", default=16, show_default=True, help="Active features a key."),
    option("--query-l1", default=0.0, show_default=True),
    option("--key-l1", default=0.0, show_default=True),
    option("--product-l1", default=0.0, show_default=True, help="Weight of the L1 penalty on products."),
    option("--pre-activation", default=1e-4, show_default=True, help="Weight of the penalty on negative strengths."),
    option("--score-weight", default=0.1, show_default=True, help="Weight of the scores' error at the beginning."),
    option("--positive-head-weights", is_flag=True, help="Head weights must not be negative."),
]

KINDS: dict[str, tuple[str, list[Decorator]]] = {
    "clt": ("Cross-layer transcoder: MLP outputs.", CODER),
    "attention-sae": (
        "Attention output SAEs.",
        [
            LAYER,
            *CODER,
            option("--site", type=click.Choice(["attn_out", "z"]), default="attn_out", show_default=True,
                   help="What is read and rebuilt."),
        ],
    ),
    "residual-sae": ("SAEs of the stream below layers, for comparisons.", [LAYER, *CODER]),
    "value-sae": (
        "Attention value SAEs.",
        [LAYER, *CODER, option("--together", is_flag=True, help="One dictionary on the values of all layers.")],
    ),
    "weakly-causal": (
        "Cross-layer features of type 1 and type 2: MLP and attention outputs.",
        [
            *CODER,
            option("--mlp", is_flag=True, help="Type 2 features write to MLP outputs too."),
            option("--no-later-attention", "later_attention", flag_value=False, default=True,
                   help="Type 1 features write to MLP outputs only."),
        ],
    ),
    "mtc": (
        "Multitoken transcoders.",
        [
            *multitoken(),
            option("--target", type=click.Choice(["attention", "residual"]), default="attention", show_default=True,
                   help="The attention output, or the stream after the layer."),
        ],
    ),
    "single-head-mtc": ("MTCs with one head for each feature.", multitoken()),
    "joint-mtc": ("SAE encoders with single-head MTC decoders.", multitoken()),
    "ranked-mtc": (
        "MTCs whose features have many OV dimensions.",
        multitoken(activation="group_soft", ranks="1:0.5,2:0.25,4:0.25", penalties=(2e-3, 1e-5)),
    ),
    "mctc": (
        "Multitoken cross-layer transcoders.",
        [
            *multitoken(layers=False),
            option("--no-mlp", "mlp", flag_value=False, default=True, help="Write to attention outputs only."),
        ],
    ),
    "attention-layer": ("Attention replacement layers.", attention_layer(lorsa=False)),
    "lorsa": ("Low-rank sparse attention.", attention_layer(lorsa=True)),
    "qk": ("QK diagonalization: why heads look where they do.", QK),
}  # fmt: skip
