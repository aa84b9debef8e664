"""Virtual weights against their definition in float64, a pair that was planted, and induction in the default's weights.

`Plain` writes the paths of `circuits.paths` a second time as products of whole matrices, from the Hugging Face module.
"""

import json
import sys
from dataclasses import replace
from functools import cache
from math import sqrt
from typing import Any

import hand_built
import pytest
import torch
from tiny_models import CASES, build, in_memory
from tiny_replacements import Maker, Sizes
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, GPTNeoXConfig, Qwen3Config

import circuits
from circuits.cli import main
from circuits.errors import CircuitsError
from circuits.graph import IDENTITY_HEAD, OWN_HEAD
from circuits.loading import Model
from circuits.model import BaseModel
from circuits.replacements import Dictionary
from circuits.virtual_weights import partners, sides_of, virtual_weights

Paths = dict[tuple[int | None, int | None], Tensor]
DEPTHS = {"resid_pre": 1, "attn_out": 1, "z": 1, "v": 1, "resid_mid": 2}


class Plain:
    """A tiny model's matrices in float64, norms with denominators one."""

    def __init__(self, model: Model) -> None:
        self.model, self.lm, self.family = model, model.base.lm, model.base.lm.config.model_type
        self.trunk = getattr(self.lm, {"gpt2": "transformer", "gpt_neox": "gpt_neox"}.get(self.family, "model"))
        self.h, self.k = model.base.shape.n_heads, model.base.shape.n_kv_heads
        self.layers = range(model.base.shape.n_layers)
        offered = [d for r in model.replacements for d in r.dictionaries]
        self.cut = {site.layer for d in offered for site in d.writes if site.name == "resid_post"}
        inside = ("attn_out", "z", "v", "resid_mid")
        self.dictionaries = [d for d in offered if not (d.layer in self.cut and d.read.site.name in inside)]

    def block(self, layer: int) -> Any:
        return self.trunk.h[layer] if self.family == "gpt2" else self.trunk.layers[layer]

    def norm(self, layer: int, *, mlp: bool = False, gain: bool = True) -> Tensor:
        """N as a matrix (D, D)."""
        names = {"gpt2": ("ln_1", "ln_2"), "gemma2": ("input_layernorm", "pre_feedforward_layernorm")}
        name = names.get(self.family, ("input_layernorm", "post_attention_layernorm"))[mlp]
        return self.open(getattr(self.block(layer), name), gain=gain)

    def post_norm(self, layer: int, *, mlp: bool = False) -> Tensor:
        """What stands between a sublayer and the stream, (D, D)."""
        if self.family != "gemma2":
            return torch.eye(self.model.base.shape.d_model, dtype=torch.float64)
        block = self.block(layer)
        return self.open(block.post_feedforward_layernorm if mlp else block.post_attention_layernorm)

    def open(self, module: Any, *, gain: bool = True) -> Tensor:
        weight = module.weight.double() + (self.family == "gemma2")
        identity = torch.eye(len(weight), dtype=torch.float64)
        centred = identity - 1 / len(weight) if self.family in ("gpt2", "gpt_neox") else identity
        return weight.diag() @ centred if gain else centred

    def projections(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W_Q (H, E, D), W_K and W_V of every query head, W_O (H, D, E)."""
        block = self.block(layer)
        if self.family == "gpt2":
            q, k, v = block.attn.c_attn.weight.double().T.chunk(3)
            o = block.attn.c_proj.weight.double().T
        elif self.family == "gpt_neox":
            fused = block.attention.query_key_value.weight.double().unflatten(0, (self.h, 3, -1))
            q, k, v = (fused[:, part].flatten(0, 1) for part in range(3))
            o = block.attention.dense.weight.double()
        else:
            a = block.self_attn
            q, k, v, o = (m.weight.double() for m in (a.q_proj, a.k_proj, a.v_proj, a.o_proj))
        q, k, v = q.unflatten(0, (self.h, -1)), k.unflatten(0, (self.k, -1)), v.unflatten(0, (self.k, -1))
        if self.family == "qwen3":
            q = block.self_attn.q_norm.weight.double().unsqueeze(1) * q
            k = block.self_attn.k_norm.weight.double().unsqueeze(1) * k
        of = [head // (self.h // self.k) for head in range(self.h)]
        return q, k[of], v[of], o.unflatten(1, (self.h, -1)).transpose(0, 1)

    def ov(self, layer: int, head: int) -> Tensor:
        """O_h V_h N, (D, D), before the post-norm."""
        _, _, v, o = self.projections(layer)
        return o[head] @ v[head] @ self.norm(layer)

    def qk(self, layer: int, head: int, offset: int) -> Tensor:
        """(D, D): query stream vector times this times key stream vector is the score."""
        q, k, _, _ = self.projections(layer)
        width = q.shape[1]
        turn = torch.eye(width, dtype=torch.float64)
        turning = {"gpt2": 0, "gpt_neox": width // 2}.get(self.family, width)
        for i in range(turning // 2):
            angle = torch.tensor(offset * 10_000 ** (-2 * i / turning), dtype=torch.float64)
            j = i + turning // 2
            turn[i, i] = turn[j, j] = angle.cos()
            turn[i, j], turn[j, i] = -angle.sin(), angle.sin()
        n, per = self.norm(layer), 9 if self.family == "gemma2" else width
        return (turn @ q[head] @ n).T @ (k[head] @ n) / sqrt(per)

    def floor(self, depth: int) -> int:
        return max([2 * layer + 2 for layer in self.cut if 2 * layer + 2 < depth], default=0)

    def writes(self, d: Dictionary | None, depth: int) -> Tensor | None:
        """(F r, D) below a depth; None without a site there. No dictionary: the tokens."""
        if d is None:
            scale = 4 if self.family == "gemma2" else 1  # sqrt 16
            return scale * self.lm.get_input_embeddings().weight.double() if self.floor(depth) == 0 else None
        total = None
        for site in d.writes:
            if site.name == "v" or (site.name != "resid_post" and site.layer in self.cut):
                continue
            at = 2 * site.layer + (1 if site.name in ("attn_out", "z") else 2)
            if self.floor(depth) <= at < depth:
                rows = d.decoders[site].all().double()
                if site.name == "z":
                    rows = rows @ torch.cat(list(self.projections(site.layer)[3]), 1).T
                if site.name == "z" or d.before_post_norm:
                    rows = rows @ self.post_norm(site.layer, mlp=site.name == "mlp_out").T
                total = rows if total is None else total + rows
        return total

    def reads(self, d: Dictionary | None) -> tuple[int, Paths]:
        """Depth, and covectors (F r, D) of the stream below it by head."""
        if d is None:
            w_u = self.lm.get_output_embeddings().weight.double()
            norm = getattr(self.trunk, {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}.get(self.family, "norm"))
            return 2 * len(self.layers) + 1, {(None, None): (w_u - w_u.mean(0)) @ self.open(norm)}
        e, layer, site = d.W_enc.double(), d.layer, d.read.site.name
        depth = 2 * layer + (1 if self.family == "gpt_neox" else DEPTHS[site])
        if site == "attn_out":
            e = e if d.before_post_norm else e @ self.post_norm(layer)
            return depth, {(layer, h): e @ self.ov(layer, h) for h in range(self.h)}
        if site == "z":
            _, _, v, _ = self.projections(layer)
            parts = e.unflatten(1, (self.h, -1))
            return depth, {(layer, h): parts[:, h] @ v[h] @ self.norm(layer) for h in range(self.h)}
        if site == "v":
            _, _, v, _ = self.projections(layer)
            values = torch.cat(list(v[:: self.h // self.k]))
            return depth, {(None, None): e @ values @ self.norm(layer)}
        if d.read.norm != "none":
            e = e @ self.norm(layer, mlp=site == "resid_mid", gain=d.read.norm == "full")
        return depth, {((layer, OWN_HEAD) if d.kind in ("lorsa", "attention-layer") else (None, None)): e}

    def weights(self, source: Dictionary | None, target: Dictionary | None, *, ov: bool) -> Paths:
        """Weights (F r, F' r') by head."""
        depth, readers = self.reads(target)
        found: Paths = {}
        for label, c in readers.items():
            if source is not None and source.read.site.name == "v":
                at = 2 * source.layer + 1
                if label == (None, None) and self.floor(depth) <= at < depth:
                    values = source.decoders[source.writes[0]].all().double().unflatten(1, (self.k, -1))
                    for h in range(self.h):
                        o = self.projections(source.layer)[3][h]
                        out = self.post_norm(source.layer) @ o
                        found[source.layer, h] = values[:, h // (self.h // self.k)] @ out.T @ c.T
            elif label != (None, None) or not ov:
                if (x := self.writes(source, depth)) is not None:
                    found[label] = x @ c.T
            else:
                for layer in self.layers:
                    if layer in self.cut or not self.floor(depth) <= 2 * layer + 1 < depth:
                        continue
                    if (x := self.writes(source, 2 * layer + 1)) is not None:
                        c_out = c @ self.post_norm(layer)
                        found |= {(layer, h): x @ self.ov(layer, h).T @ c_out.T for h in range(self.h)}
        return found

    def scores(self, query: Dictionary | None, key: Dictionary | None, offset: int) -> Paths:
        found: Paths = {}
        for layer in self.layers:
            q, k = self.writes(query, 2 * layer + 1), self.writes(key, 2 * layer + 1)
            window = 3 if self.family == "gemma2" and layer % 2 == 0 else 99
            if layer not in self.cut and q is not None and k is not None and offset < window:
                found |= {(layer, h): q @ self.qk(layer, h, offset) @ k.T for h in range(self.h)}
        return found


def rank_of(d: Dictionary | None) -> int:
    return 1 if d is None else d.rank


def folded(paths: Paths, source: Dictionary | None, target: Dictionary | None) -> Paths:
    """Weights of features: the norm over the rows of those that have several."""
    a, b = rank_of(source), rank_of(target)
    if a == b == 1:
        return paths
    return {
        label: w.unflatten(0, (-1, a)).unflatten(2, (-1, b)).permute(0, 2, 1, 3).flatten(2).norm(dim=2)
        for label, w in paths.items()
    }


def strongest(paths: Paths, like: tuple[int, int]) -> Tensor:
    """Of each pair the weight through its strongest head."""
    if not paths:
        return torch.zeros(like, dtype=torch.float64)
    stacked = torch.stack(list(paths.values()))
    return stacked.gather(0, stacked.abs().argmax(0, keepdim=True))[0]


@cache
def plain(name: str) -> Plain:
    return Plain(build(CASES[name]) if name in CASES else of_family(name))


def of_family(name: str) -> Model:
    """A random model of another family with a CLT, attention output SAEs before the post-norm, and values."""
    sizes: dict[str, Any] = {
        "vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 16, "attn_implementation": "eager",
    }  # fmt: skip
    grouped = {"num_key_value_heads": 2, "head_dim": 6}
    config: Any = {
        "qwen3": lambda: Qwen3Config(**sizes, **grouped),
        "gemma2": lambda: Gemma2Config(**sizes, **grouped, query_pre_attn_scalar=9, sliding_window=3),
        "gpt_neox": lambda: GPTNeoXConfig(**sizes, rotary_pct=0.5, use_parallel_residual=True),
    }[name]()
    generator = torch.Generator().manual_seed(60)
    lm: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    kv, width = (4, 4) if name == "gpt_neox" else (2, 6)
    maker = Maker(Sizes(3, 16, 4, kv, width), generator, "relu")
    made = [maker.mlp(layer, "clt") for layer in range(3)] + [maker.value(0)]
    made += [replace(maker.attention(1, "attn_out"), before_post_norm=True), maker.attention(2, "z")]
    made[1] = replace(made[1], before_post_norm=True)
    return Model(BaseModel(lm, None, name), (in_memory("all", made),))


NAMES = ("gpt2_clt_attn_out", "gpt2_mixed", "gpt2_mctc", "gpt2_residual_mctc", "llama_clt_z", "llama_mixed",
         "llama_lorsa", "llama_value", "llama_skip_scale_z", "llama_weakly_causal_mlp", "llama_mtc_ranks",
         "qwen3", "gemma2", "gpt_neox")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_matrices_are_the_products_of_the_definition(name: str) -> None:
    """Every pair of dictionaries, through the residual stream, all OV circuits, one, and QK circuits at two offsets."""
    made = plain(name)
    compared = 0
    for a in made.dictionaries:
        for b in made.dictionaries:
            like = a.n_features, b.n_features
            for through in ("residual", "ov", "L1H2"):
                paths = folded(made.weights(a, b, ov=through != "residual"), a, b)
                if through == "L1H2":
                    paths = {label: w for label, w in paths.items() if label == (1, 2)}
                if through == "L1H2" and 1 in made.cut:
                    continue
                found = virtual_weights(made.model, a, b, through).double()
                torch.testing.assert_close(found, strongest(paths, like), rtol=1e-4, atol=1e-5)
                compared += bool(paths)
            for offset in (0, 3):
                paths = folded(made.scores(a, b, offset), a, b)
                found = virtual_weights(made.model, a, b, "qk", offset=offset).double()
                torch.testing.assert_close(found, strongest(paths, like), rtol=1e-4, atol=1e-5)
                compared += bool(paths)
    assert compared >= 10


def prefix(d: Dictionary, *, writes: bool) -> str:
    """What the addresses of a dictionary's features begin with."""
    site = d.read.site.name
    letter = {"resid_mid": "", "v": "v"}.get(site, "a")
    if d.kind == "mtc":
        letter = "q" if writes else "k"
    return f"{letter}{d.layer}_"


SIDES = [
    ("reads", "residual"),
    ("reads", "ov"),
    ("writes", "residual"),
    ("writes", "ov"),
    ("queries", "qk"),
    ("keys", "qk"),
]


@pytest.mark.parametrize("name", sorted({*NAMES} - {"gpt2_mctc", "llama_clt_z", "llama_skip_scale_z", "llama_mixed"}))
def test_lists_hold_every_candidate(name: str) -> None:
    """Both ends of every kind of path: address, weight, head, share and z of all partners of one feature."""
    made = plain(name)
    for d in made.dictionaries:
        for side, through in SIDES:
            if d.read.site.name == "v" and through == "qk":
                continue
            address, offset = prefix(d, writes=side != "reads") + "5", 2 if through == "qk" else 0
            for of in ("features", "tokens"):
                expected: dict[str, Paths] = {}
                for other in made.dictionaries if of == "features" else (None,):
                    paths = expected_paths(made, d, other, side, ov=through == "ov")
                    stem = f"{len(made.layers)}_" if side == "writes" else "E_"
                    stem = stem if other is None else prefix(other, writes=side != "writes")
                    for i in range(max(map(len, paths.values()), default=0)):
                        expected[f"{stem}{i}"] = {label: w[i] for label, w in paths.items()}
                options: Any = {"through": through, "side": side, "of": of, "offset": offset}
                same_list(partners(made.model, address, **options, top=9999), expected)


def expected_paths(made: Plain, d: Dictionary, other: Dictionary | None, side: str, *, ov: bool) -> Paths:
    """Weights (F',) of feature 5 of d with all of another, by head."""
    first = side in ("writes", "queries")
    pair = (d, other) if first else (other, d)
    paths = made.scores(*pair, 2) if side in ("queries", "keys") else made.weights(*pair, ov=ov)
    return {label: w[5] if first else w[:, 5] for label, w in folded(paths, *pair).items()}


def same_list(found: Any, expected: dict[str, Paths]) -> None:
    """A list of partners is what weights by address and head make it."""
    assert {row.address for row in found.rows} == set(expected)
    every = torch.tensor([float(w) for paths in expected.values() for w in paths.values()], dtype=torch.float64)
    assert found.weights == len(every)
    if not len(every):
        return
    mean, deviation = every.mean(), every.std(unbiased=False)
    assert [found.mean, found.deviation] == pytest.approx([float(mean), float(deviation)], rel=1e-4, abs=1e-5)
    sizes = [abs(row.weight) for row in found.rows]
    assert sizes == sorted(sizes, reverse=True)
    for row in found.rows:
        paths = expected[row.address]
        total = sum(abs(float(w)) for w in paths.values())
        best = max(abs(float(w)) for w in paths.values())
        weight = float(paths[row.layer, row.head])
        assert row.weight == pytest.approx(weight, rel=1e-4, abs=1e-5)
        assert abs(weight) == pytest.approx(best, rel=1e-4, abs=1e-5)
        assert row.share == pytest.approx(abs(weight) / total, rel=1e-3, abs=1e-4)
        assert row.z == pytest.approx((weight - float(mean)) / float(deviation), rel=1e-3, abs=1e-3)


def test_head_loadings_stand_between_the_sides_of_a_feature() -> None:
    """From key side to query side and back the weights are the loading vector; other lists name it at each partner."""
    made = plain("gpt2_mctc")
    (d,) = [d for d in made.dictionaries if d.layer == 1]
    assert d.moved_by is not None
    alpha = d.moved_by.weights[5].tolist()  # type: ignore[union-attr]
    for address, side, other in (("k1_5", "writes", "q1_5"), ("q1_5", "reads", "k1_5")):
        found = partners(made.model, address, side=side)  # type: ignore[arg-type]
        assert {row.address for row in found.rows} == {other}
        by_head = {row.head: row.weight for row in found.rows}
        assert by_head == pytest.approx({**dict(enumerate(alpha[:-1])), IDENTITY_HEAD: alpha[-1]})
        assert sum(row.share for row in found.rows) == pytest.approx(1.0)
    (row, *_) = partners(made.model, "q0_3", side="writes").rows
    assert row.address.startswith("k")
    assert len(row.loadings) == len(alpha)


def test_the_planted_pair_comes_first() -> None:
    """In the hand-built induction model: who looks for whom through which head, and what is then said."""
    model = hand_built.induction()
    first = partners(model, "E_1", through="qk").rows[0]
    assert (first.address, first.head_name) == ("a0_0", "L1H1")
    assert first.weight == pytest.approx(100 / sqrt(8))
    (first, second, *_) = partners(model, "a0_0", through="qk:L1H1", side="keys", of="tokens").rows
    assert (first.address, first.head_name, abs(second.weight)) == ("E_1", "L1H1", 0.0)
    first = partners(model, "a1_0", side="reads").rows[0]
    assert (first.address, first.head_name, first.weight, first.share) == ("a0_0", "L1H1", 1.5, 1.0)
    first = partners(model, "a1_0", side="reads", through="ov", of="tokens").rows[0]
    assert (first.address, first.head_name, first.weight) == ("E_2", "L1H1", 2.0)
    assert first.share == pytest.approx(2 / 3)
    assert not partners(model, "a1_0", side="reads", through="L0H0").rows
    (first, second, *_) = partners(model, "a1_0", of="tokens").rows
    assert (first.address, first.weight, second.weight) == ("2_2", 0.75, -0.25)


def test_the_default_has_induction_in_its_weights() -> None:
    """What a first-layer attention feature reads most is what looks for it, through the heads seeded for induction.

    Of the 24 features that are most selective for one token through a previous-token head, most are looked for
    in later layers by that very token (of 4,096), through one of the heads 0 to 3 of layers 1 and 2.
    """
    model = circuits.load()
    chosen = []
    for feature in range(0, 1536, 8):
        (best,) = partners(model, f"a0_{feature}", side="reads", of="tokens", top=1).rows
        if best.head is not None and best.head < 4 and best.weight > 0:
            chosen.append((best.z, feature, best.address))
    chosen = sorted(chosen, reverse=True)[:24]
    hits = 0
    for _, feature, token in chosen:
        found = partners(model, f"a0_{feature}", through="qk", side="keys", of="tokens", top=10, offset=5)
        same = [row for row in found.rows if row.address == token and row.weight > 0]
        hits += any(row.layer in (1, 2) and row.head in range(4) for row in same)
    assert hits >= 18, hits


@pytest.mark.parametrize(
    ("feature", "options", "words"),
    [
        ("b2_153", {}, "no address of a feature"),
        ("a7_1", {}, "no features a7"),
        ("a1_12", {}, "numbered from 0 to 11"),
        ("a1_5_2", {}, "no position; say a1_5"),
        ("a1_5", {"through": "L9H0"}, "no such head"),
        ("a1_5", {"through": "head"}, "no way between features"),
        ("a1_5", {"through": "qk", "side": "reads"}, "sides queries and keys"),
        ("E_3", {"side": "reads"}, "reads nothing"),
        ("3_3", {"side": "writes"}, "writes nothing"),
        ("a1_5", {"offset": 99}, "expected 0 to 15"),
    ],
)
def test_errors_teach(feature: str, options: dict[str, Any], words: str) -> None:
    """What does not exist is refused with what does."""
    with pytest.raises(CircuitsError, match=words):
        partners(plain("gpt2_clt_attn_out").model, feature, **options)


def test_a_second_dictionary_of_a_place_is_named() -> None:
    """Two multitoken transcoders of one layer: features of the second carry its name, in lists and in questions."""
    made = plain("gpt2_mtc_ranks")
    named = "k2_15@mtc-second.2"
    found = partners(made.model, "q1_3", side="writes", top=99)
    weights = {row.address: row.weight for row in found.rows}
    assert {"k2_5", named} <= set(weights)
    back = {row.address: row.weight for row in partners(made.model, named, side="reads", top=99).rows}
    assert back["q1_3"] == pytest.approx(weights[named], rel=1e-5)


def test_sides() -> None:
    """Which sides a feature has depends on its kind and on the way."""
    model = plain("gpt2_mixed").model
    assert sides_of(model, "v0_1") == ("reads", "writes")
    assert sides_of(model, "v0_1", "qk") == ()
    assert sides_of(model, "q1_1", "qk:L2H0") == ("queries", "keys")
    assert sides_of(model, "E_1") == ("writes",)


@pytest.mark.parametrize(
    "options", [[], ["--through", "qk", "--offset", "1"], ["--replacement", "mtc", "--side", "reads"]]
)
def test_command(options: list[str], monkeypatch: Any, capsys: Any, tmp_path: Any) -> None:
    """Tables of 80 columns, and a JSON file with the same lists."""
    file = tmp_path / "partners.json"
    feature = "k1_7" if "mtc" in options else "a1_7"
    monkeypatch.setattr(sys, "argv", ["circuits", "partners", feature, "--top", "3", "-o", str(file), *options])
    main()
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    data = json.loads(file.read_text())
    assert data["feature"] == feature
    assert len(data["lists"]) == (2 if "reads" in options else 4)
    for found in data["lists"]:
        assert len(found["rows"]) == 3
        for row in found["rows"]:
            assert row["address"] in printed


def test_command_refuses(monkeypatch: Any, capsys: Any) -> None:
    """An unknown address ends with code 2 and shows the grammar and what the model has."""
    monkeypatch.setattr(sys, "argv", ["circuits", "partners", "x1_2"])
    with pytest.raises(SystemExit) as stop:
        main()
    message = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 2
    assert "LAYER_FEATURE" in message
    assert "a2_0 to a2_1535" in message
