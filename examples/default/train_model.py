"""Train the embedded default language model: a small Llama on stories, books and tasks that need attention.

    python examples/default/train_model.py --text ../shared/data/text --out build/model

Repeated sequences are 24 % of the mix until induction appears, then 8 %. Writes a checkpoint every 200 steps and
resumes from it.
"""

import argparse
import json
import time
from pathlib import Path

import tasks
import torch
from accuracy import task_accuracy
from corpus import Corpus, Rows, train_tokenizer
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WIDTH = 256
ATTENTION_SHARE = 0.3, 0.8
EARLY = {"stories": 0.30, "books": 0.22, "repeated": 0.24, "templates": 0.24}
LATE = {"stories": 0.34, "books": 0.28, "repeated": 0.08, "templates": 0.30}


def build(vocabulary: int, layers: int) -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            attention_bias=True,
            attn_implementation="sdpa",
        )
    )
    seed_induction(model)
    return model


@torch.no_grad()
def seed_induction(model: LlamaForCausalLM, energy: float = 30.0, match: float = 2.5, copy: float = 0.12) -> None:
    """Start half of the heads near the induction circuit of Elhage et al. (2021), and train from there.

    With a few million tokens, small models that start from noise find no previous-token head, and so no induction
    (two were tried). In the spirit of mimetic initialisation (Trockman and Kolter, 2023), in layer 0 the first half of
    the heads score previous positions highest, through query and key biases that rotary positions turn into
    `sum_i energy cos(theta_i (p - s - 1))`, and move part of a token's embedding into a subspace of their own.
    In layers 1 and 2 the first half of the heads match that subspace against the same part of the current token, on the
    slow rotary frequencies, and copy what they find. All other weights start as usual; training may change everything.
    """
    config = model.config
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    half = width // 2
    theta = float(config.rope_parameters["rope_theta"]) ** (-torch.arange(half) / half)
    fast, slow = theta > 0.15, theta < 0.02
    basis = torch.linalg.qr(torch.randn(config.hidden_size, config.hidden_size)).Q
    content, moved = basis.T.reshape(2, heads // 2, width, config.hidden_size)
    model.model.embed_tokens.weight.normal_(std=0.05)
    for head in range(heads // 2):
        at = slice(head * width, (head + 1) * width)
        first = model.model.layers[0].self_attn
        angle = 2 * torch.pi * torch.rand(half)
        first.k_proj.bias[at] = torch.cat([angle.cos(), angle.sin()]) * torch.where(fast, energy**0.5, 0.0).repeat(2)
        turned = angle - theta
        first.q_proj.bias[at] = torch.cat([turned.cos(), turned.sin()]) * torch.where(fast, energy**0.5, 0.0).repeat(2)
        first.v_proj.weight[at] = content[head]
        first.o_proj.weight[:, at] = copy * moved[head].T
        for layer in (1, 2):
            later = model.model.layers[layer].self_attn
            later.q_proj.weight[at] = match * content[head] * slow.repeat(2).unsqueeze(1)
            later.k_proj.weight[at] = match * moved[head] * slow.repeat(2).unsqueeze(1)
            later.v_proj.weight[at] = content[head]
            later.o_proj.weight[:, at] = copy * content[head].T


def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor,
            weight: torch.Tensor) -> torch.Tensor:  # fmt: skip
    logits = model(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False).logits
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    weight = weight[:, :-1].flatten()
    return (losses * weight).sum() / weight.sum()


def tensors(batch: Rows) -> tuple[torch.Tensor, ...]:
    tokens, positions, document = (torch.from_numpy(x) for x in (batch.tokens, batch.positions, batch.document))
    width = tokens.shape[1]
    same = document[:, None, :, None] == document[:, None, None, :]
    mask = torch.where(same & torch.ones(width, width, dtype=torch.bool).tril(), 0.0, -1e9)
    return tokens, positions, mask, torch.from_numpy(batch.weight)


@torch.no_grad()
def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, count: int
) -> dict[str, float]:
    """Loss on held-out text and accuracy on held-out task prompts."""
    model.eval()
    figures = {}
    for shelf in ("stories", "books"):
        corpus.rng.seed(11)
        figures[f"loss {shelf}"] = float(loss_of(model, *tensors(corpus.rows(count // 5, WIDTH, {shelf: 1.0}))))
    figures |= task_accuracy(model, tokenizer, corpus, count)
    model.train()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2300)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--rate", type=float, default=1.0e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    if not (args.out / "tokenizer.json").exists():
        train_tokenizer(tasks.documents(args.text, held_out=False), args.vocabulary, args.seed).save_pretrained(
            args.out
        )
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    train = Corpus(args.text, tokenizer, held_out=False, seed=args.seed)
    test = Corpus(args.text, tokenizer, held_out=True, seed=args.seed)
    print({shelf: sum(map(len, parts)) for shelf, parts in train.shelves.items()}, "training tokens", flush=True)

    model = build(len(tokenizer), args.layers)
    # Small batches and a large rate wash the attention weights out before they find anything: they go slower at first.
    attention = [p for name, p in model.named_parameters() if "self_attn" in name]
    others = [p for name, p in model.named_parameters() if "self_attn" not in name]
    adam = torch.optim.AdamW(
        [{"params": attention}, {"params": others}],
        lr=args.rate,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=True,
    )
    state = {"step": 0, "induced": False}
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        adam.load_state_dict(saved["adam"])
        state = saved["state"]
        train.rng.seed(args.seed + 1000 + state["step"])
    compiled = torch.compile(loss_of, dynamic=False)
    started, first, running = time.time(), state["step"], 0.0
    for step in range(state["step"], args.steps):
        rate = args.rate * min(1.0, (step + 1) / 80) * min(1.0, max(0.02, (args.steps - step) / (0.5 * args.steps)))
        shares = LATE if state["induced"] else EARLY
        loss = compiled(model, *tensors(train.rows(args.rows, WIDTH, shares)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.param_groups[0]["lr"] = rate * ATTENTION_SHARE[state["induced"]]
        adam.param_groups[1]["lr"] = rate
        adam.step()
        model.zero_grad(set_to_none=True)
        running += 0.05 * (loss.item() - running) if running else loss.item()
        if (step + 1) % 20 == 0:
            speed = args.rows * WIDTH * (step + 1 - first) / (time.time() - started)
            print(f"step {step + 1} loss {running:.3f} rate {rate:.5f} {speed:.0f} tok/s", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            last = step + 1 == args.steps
            figures = measure(model, tokenizer, test, 200 if last else 50)
            state = {"step": step + 1, "induced": state["induced"] or figures["induction"] > 0.9}
            print(json.dumps({"step": step + 1, **{k: round(v, 4) for k, v in figures.items()}}), flush=True)
            torch.save(
                {"model": model.state_dict(), "adam": adam.state_dict(), "state": state},
                checkpoint,
            )
    model.to(torch.float16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
