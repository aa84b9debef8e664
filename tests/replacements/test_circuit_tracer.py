"""Directories read by content: circuit-tracer's against the formula of the format, ours there and back."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from circuits.kernels.decode import gather_decode
from circuits.kernels.encode import Activation
from circuits.replacements import Decoder, Dictionary, ReadSite, Replacement, Site, load_replacement
from circuits.replacements.errors import ReplacementError
from circuits.replacements.formats import native
from circuits.replacements.weights import HeldTensor, LazyTensor

F, D, L, T = 12, 5, 3, 7


def _config(folder: Path, **more: object) -> None:
    config = {
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"model_name": "tiny"} | more))


def write(folder: Path, *extra: str, **config: object) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    shapes = {"W_enc": (F, D), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
    more = {"activation_function.threshold": (F,), "W_skip": (D, D)}
    layers = [{n: torch.randn(s) for n, s in (shapes | {e: more[e] for e in extra}).items()} for _ in range(L)]
    folder.mkdir(parents=True, exist_ok=True)
    for layer, tensors in enumerate(layers):
        save_file(tensors, folder / f"layer_{layer}.safetensors")
    _config(folder, **config)
    return layers


def _clt(folder: Path, threshold: bool = True) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    torch.manual_seed(1)
    encoders, decoders = [], []
    for layer in range(L):
        tensors = {f"W_enc_{layer}": torch.randn(F, D), f"b_enc_{layer}": torch.randn(F)}
        tensors[f"b_dec_{layer}"] = torch.randn(D)
        if threshold:
            tensors[f"threshold_{layer}"] = torch.rand(F)
        decoders.append(torch.randn(F, L - layer, D))
        encoders.append(tensors)
        save_file(tensors, folder / f"W_enc_{layer}.safetensors")
        save_file({f"W_dec_{layer}": decoders[-1]}, folder / f"W_dec_{layer}.safetensors")
    _config(folder, model_kind="cross_layer_transcoder", feature_input_hook="hook_resid_mid")
    return encoders, decoders


def _run(replacement: Replacement, xs: list[Tensor]) -> dict[Site, Tensor]:
    """What the replacement writes, by the interface of `Dictionary` alone."""
    out: dict[Site, Tensor] = {}
    for dictionary, x in zip(replacement.dictionaries, xs, strict=True):
        active = dictionary.encode(x)
        for site in dictionary.writes:
            rows = dictionary.decoder_rows(active.features, site)
            y = gather_decode(active.positions, None, active.activations, rows, len(x))
            bias = dictionary.output_bias(site)
            y = y if bias is None else y + bias
            if dictionary.skip is not None and site == dictionary.writes[0]:
                y = y + x @ dictionary.skip.T
            out[site] = out[site] + y if site in out else y
    return out


@pytest.mark.parametrize("extra", [(), ("W_skip",), ("activation_function.threshold",)])
def test_transcoders(tmp_path: Path, extra: tuple[str, ...]) -> None:
    layers = write(tmp_path, *extra)
    replacement = load_replacement(tmp_path)
    replacement.check(L, D, 99, 99)
    xs = [torch.randn(T, D) for _ in range(L)]
    got = _run(replacement, xs)
    for layer, (x, w) in enumerate(zip(xs, layers, strict=True)):
        pre = x @ w["W_enc"].T + w["b_enc"]
        a = pre * (pre > w.get("activation_function.threshold", torch.zeros(F)))
        want = a @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if "W_skip" in w else 0.0)
        assert torch.allclose(got[Site("mlp_out", layer)], want, atol=1e-5)
    assert replacement.format == "circuit-tracer"
    assert replacement.model == {"name": "tiny"}
    assert [str(d.read) for d in replacement.dictionaries] == [f"resid_mid.{layer}:full" for layer in range(L)]


def test_topk_keeps_negative_values_as_circuit_tracer_does(tmp_path: Path) -> None:
    layers = write(tmp_path, activation="topk", k=10)
    x = torch.randn(T, D)
    active = load_replacement(tmp_path).dictionaries[0].encode(x)
    pre = x @ layers[0]["W_enc"].T + layers[0]["b_enc"]
    values, chosen = pre.topk(10, dim=1)
    want = torch.zeros_like(pre).scatter(1, chosen, values)
    got = torch.zeros_like(pre)
    got[active.positions, active.features] = active.activations
    assert torch.allclose(got, want, atol=1e-6)
    assert bool((want < 0).any())


@pytest.mark.parametrize("threshold", [True, False])
def test_cross_layer_transcoder(tmp_path: Path, threshold: bool) -> None:
    encoders, decoders = _clt(tmp_path, threshold)
    replacement = load_replacement(tmp_path)
    xs = [torch.randn(T, D) for _ in range(L)]
    got = _run(replacement, xs)
    want = [encoders[layer][f"b_dec_{layer}"].expand(T, D).clone() for layer in range(L)]
    for layer, x in enumerate(xs):
        w = encoders[layer]
        pre = x @ w[f"W_enc_{layer}"].T + w[f"b_enc_{layer}"]
        a = pre * (pre > w.get(f"threshold_{layer}", torch.zeros(F)))
        for later in range(layer, L):
            want[later] += a @ decoders[layer][:, later - layer]
    for layer in range(L):
        assert torch.allclose(got[Site("mlp_out", layer)], want[layer], atol=1e-5)
    first = replacement.dictionaries[0]
    assert str(first.read) == "resid_mid.0:none"
    assert first.name == "clt.0"
    assert first.layer == 0
    assert first.output_bias(Site("mlp_out", 1)) is None


@pytest.mark.parametrize(
    ("hook", "norm"), [("mlp.hook_in", "full"), ("ln2.hook_normalized", "scale"), ("hook_resid_mid", "none")]
)
def test_input_hooks_and_places(tmp_path: Path, hook: str, norm: str) -> None:
    write(tmp_path / "sub")
    _config(tmp_path, feature_input_hook=hook, feature_output_hook="mlp.hook_out", subfolder="sub")
    by_subfolder = load_replacement(tmp_path)
    assert by_subfolder.dictionaries[2].read == ReadSite(Site("resid_mid", 2), norm)  # type: ignore[arg-type]
    assert by_subfolder.dictionaries[2].before_post_norm
    _config(tmp_path, transcoders=["sub/layer_1.safetensors", "sub/layer_0.safetensors"])
    listed = load_replacement(tmp_path).dictionaries
    assert torch.equal(listed[0].W_enc, by_subfolder.dictionaries[1].W_enc)
    assert len(listed) == 2


def test_decoders_are_read_by_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, decoders = _clt(tmp_path)
    whole, rows_read = [], []
    read_all, read_rows = LazyTensor.all, LazyTensor.rows

    def count_all(self: LazyTensor) -> Tensor:
        whole.append(self.name)
        return read_all(self)

    def count_rows(self: LazyTensor, index: Tensor, *, column: int | None = None, out: Tensor | None = None) -> Tensor:
        rows_read.append((len(index), column))
        return read_rows(self, index, column=column, out=out)

    monkeypatch.setattr(LazyTensor, "all", count_all)
    monkeypatch.setattr(LazyTensor, "rows", count_rows)
    dictionary = load_replacement(tmp_path).dictionaries[0]
    rows = dictionary.decoder_rows(torch.tensor([3, 3, 1]), Site("mlp_out", 2))
    assert torch.equal(rows, decoders[0][[3, 3, 1], 2])
    assert rows_read == [(3, 2)]
    assert not any("W_dec" in name for name in whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_native_there_and_back(tmp_path: Path, dtype: str) -> None:
    write(tmp_path / "from", "W_skip", "activation_function.threshold")
    first = load_replacement(tmp_path / "from")
    first.training = {"steps": 3}
    native.save(first, tmp_path / "to", dtype)
    again = load_replacement(tmp_path / "to")
    identity = again.identity
    assert (again.format, again.model, again.training) == ("circuits", first.model, first.training)
    xs = [torch.randn(T, D) for _ in range(L)]
    for site, want in _run(first, xs).items():
        error = (_run(again, xs)[site] - want).abs().max()
        assert error == 0 if dtype == "float32" else error < 0.5
    native.save(again, tmp_path / "to", dtype)
    assert load_replacement(tmp_path / "to").identity == identity
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def _sae(width: int = D) -> Dictionary:
    torch.manual_seed(0)
    site = Site("attn_out", 0)
    return Dictionary(
        name="attention-sae.0", kind="attention-sae", read=ReadSite(site, "none"), writes=(site,),
        activation=Activation("batch_topk", 2), W_enc=torch.randn(F, width), b_enc=torch.randn(F),
        decoders={site: Decoder(HeldTensor("W_dec", torch.randn(F, width)))},
        output_biases={site: torch.randn(width)}, threshold=torch.tensor([0.3]),
    )  # fmt: skip


def test_bias_that_an_sae_subtracts_is_folded_in(tmp_path: Path) -> None:
    sae = _sae()
    native.save(Replacement("sae", tmp_path, "circuits", (sae,)), tmp_path / "sae")
    manifest = json.loads((tmp_path / "sae" / "manifest.json").read_text())
    manifest["dictionaries"][0]["subtracts_output_bias"] = True
    (tmp_path / "sae" / "manifest.json").write_text(json.dumps(manifest))
    loaded = load_replacement(tmp_path / "sae").dictionaries[0]
    x, bias = torch.randn(T, D), sae.output_bias(Site("attn_out", 0))
    assert bias is not None
    want, got = sae.encode(x - bias), loaded.encode(x)
    assert torch.equal(want.features, got.features)
    assert torch.allclose(want.activations, got.activations, atol=1e-5)
    pre = (loaded.encoder_rows(got.features) * x[got.positions]).sum(1) + loaded.encoder_bias(got.features)
    assert torch.allclose(pre, got.pre_activations, atol=1e-5)


def test_nothing_is_left_of_a_save_that_fails(tmp_path: Path) -> None:
    sae = _sae()
    sae.W_enc[0, 0] = 1e6
    with pytest.raises(ReplacementError, match=r"not finite as torch\.float16"):
        native.save(Replacement("sae", tmp_path, "circuits", (sae,)), tmp_path / "sae", "float16")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ReplacementError, match="cannot be written"):
        native.save(Replacement("sae", tmp_path, "circuits", (_sae(),)), tmp_path / "file" / "sae")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("do not touch")
    with pytest.raises(ReplacementError, match="is no replacement"):
        native.save(Replacement("sae", tmp_path, "circuits", (sae,)), tmp_path / "other")


def test_replacement_for_another_model(tmp_path: Path) -> None:
    _clt(tmp_path)
    replacement = load_replacement(tmp_path)
    with pytest.raises(ReplacementError, match=r"W_enc_0.*another model.*width 5; .* width 8"):
        replacement.check(L, 8, 8, 8)
    with pytest.raises(ReplacementError, match="layers 0 to 1"):
        replacement.check(L - 1, D, D, D)
    with pytest.raises(ReplacementError, match=r"width 5, but was given a tensor of shape \(2, 9\)"):
        replacement.dictionaries[0].encode(torch.zeros(2, 9))


@pytest.mark.parametrize(
    ("tensor", "shape", "message"),
    [
        ("W_dec", None, r"layer_1.safetensors: tensor 'W_dec' is missing, expected with shape \(12, 5\)"),
        ("W_dec", (F, D + 1), r"layer_1.*'W_dec' should have shape \(12, 5\) but has \(12, 6\)"),
        ("b_enc", (F + 1,), r"'b_enc' should have shape \(12\) but has \(13\)"),
        ("W_enc", (F,), r"'W_enc' should have shape \(features, width\)"),
    ],
)
def test_missing_or_misshapen(tmp_path: Path, tensor: str, shape: tuple[int, ...] | None, message: str) -> None:
    write(tmp_path)
    tensors = load_file(tmp_path / "layer_1.safetensors")
    del tensors[tensor]
    if shape:
        tensors[tensor] = torch.zeros(shape)
    save_file(tensors, tmp_path / "layer_1.safetensors")
    with pytest.raises(ReplacementError, match=message):
        load_replacement(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_kind": "sae"}, "model_kind is 'sae', expected one of transcoder_set"),
        ({"feature_input_hook": "hook_z"}, "feature_input_hook is 'hook_z'"),
        ({"activation": "topk"}, "needs a whole number k"),
        ({"activation": "gelu"}, "activation is 'gelu'"),
        ({"transcoders": ["s3://a/b/layer_0.safetensors"]}, "neither a local file"),
        ({"transcoders": ["layer_9.safetensors"]}, "layer_9.safetensors: no such file"),
        ({"model_kind": "cross_layer_transcoder"}, "no W_enc_0.safetensors"),
    ],
)
def test_bad_configuration(tmp_path: Path, config: dict[str, object], message: str) -> None:
    write(tmp_path, **config)
    with pytest.raises(ReplacementError, match=message):
        load_replacement(tmp_path)


def test_unknown_formats(tmp_path: Path) -> None:
    with pytest.raises(ReplacementError, match=r"looked for manifest.json .* config.yaml"):
        load_replacement(tmp_path)
    with pytest.raises(ReplacementError, match="no such directory"):
        load_replacement(tmp_path / "none")
    for text, message in [("{", "no valid JSON"), ("{}", "format"), ('{"format": "circuits-replacement"}', "version")]:
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ReplacementError, match=message):
            load_replacement(tmp_path)


def test_sites_as_text() -> None:
    assert str(ReadSite.parse("resid_mid.3:full")) == "resid_mid.3:full"
    assert str(Site.parse("z.11")) == "z.11"
    assert ReadSite.parse("z.0").norm == "none"
    for bad in ("mlp.3", "mlp_out", "mlp_out.-1"):
        with pytest.raises(ReplacementError, match="unknown site"):
            Site.parse(bad)
    with pytest.raises(ReplacementError, match="unknown norm 'half'"):
        ReadSite.parse("z.0:half")
