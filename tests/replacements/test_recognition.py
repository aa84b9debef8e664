"""Each adapter recognises the directories of its own format, and no other's."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import openmoss_files as of
import pytest
import test_circuit_tracer
import test_clt_forge
import test_clt_training
import test_crosslayer_coding
import test_gemma_scope
import test_gemma_scope_2
import test_saelens
import test_sparsify

from circuits.replacements import load_replacement
from circuits.replacements.formats import native
from circuits.replacements.loading import ADAPTERS


def _native(folder: Path) -> None:
    test_circuit_tracer.write(folder.with_name("source"))
    native.save(load_replacement(folder.with_name("source")), folder)


def _openmoss(folder: Path) -> None:
    values = of.common("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out", sae_type="sae")
    of.write(folder, values, of.sae(1, **values))


def _saelens(folder: Path) -> None:
    test_saelens.write(folder / "blocks.3.attn.hook_z", {"architecture": "standard", **test_saelens.FLAT})


WRITERS: dict[str, Callable[[Path], object]] = {
    "native": _native,
    "circuit_tracer": test_circuit_tracer.write,
    "openmoss": _openmoss,
    "saelens": _saelens,
    "clt_forge": test_clt_forge.write,
    "crosslayer_coding": test_crosslayer_coding.write,
    "clt_training": lambda folder: test_clt_training.write(folder, test_clt_training.HOOKPOINTS, 3),
    "sparsify": lambda folder: test_sparsify.write(folder / "h.3.mlp", transcode=True),
    "gemma_scope": lambda folder: test_gemma_scope.write(folder / "gemma-scope-2b-pt-mlp", 0, test_gemma_scope.D),
    "gemma_scope_2": lambda folder: test_gemma_scope_2.write(folder / "mlp_out_all" / "layer_0_width_16k", 0),
}
ROOTS = {"gemma_scope": "gemma-scope-2b-pt-mlp", "gemma_scope_2": "mlp_out_all"}  # below the folder that is written


def test_every_adapter_is_here() -> None:
    assert tuple(WRITERS) == ADAPTERS


@pytest.mark.parametrize("name", ADAPTERS)
def test_recognition(name: str, tmp_path: Path) -> None:
    """Only sparsify knows its fork's files too, and stands behind it; what is recognised is loaded as that format."""
    WRITERS[name](tmp_path / "folder")
    folder = tmp_path / "folder" / ROOTS.get(name, "")
    adapters = {other: import_module(f"circuits.replacements.formats.{other}") for other in ADAPTERS}
    recognised = [other for other, adapter in adapters.items() if adapter.recognises(folder)]
    assert recognised == ([name, "sparsify"] if name == "clt_training" else [name])
    assert load_replacement(folder).format == adapters[name].NAME
