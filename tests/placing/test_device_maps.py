"""Device maps as a user gives them: what they place, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from two_devices import HOME, OTHER, devices

import circuits
from circuits import placing
from circuits.cli.main import group
from circuits.errors import CircuitsError
from circuits.loading import load
from circuits.placing import checked_map, device_of, run_where_it_lies

PROMPT = [1, 5, 9, 3]


@pytest.mark.parametrize("device_map", ["auto", "sequential", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}], ids=str)
def test_a_map_of_the_cpu_alone_changes_nothing(device_map: Any) -> None:
    """Without a GPU every word of transformers, and a map, puts all on the CPU: the graph is the same."""
    expected = circuits.trace(load(), PROMPT)
    found = circuits.trace(load(device_map=device_map), PROMPT)
    assert found.edges.weight.tolist() == expected.edges.weight.tolist()


@pytest.mark.parametrize(
    ("device_map", "device", "message"),
    [
        ("cuda:1", "cpu", "none of auto, balanced, balanced_low_0, sequential"),
        ("auto", "cuda", "both given"),
        ({"model": "disk"}, "cpu", "'model' is on disk, where its weights cannot be read"),
        ({"model": "gpu"}, "cpu", "'gpu', which is no device"),
        ({"model": 0, "lm_head": 99}, "cpu", r"torch sees \d+ CUDA devices"),
        ({"": "cpu", "transformer.h.0": "cpu"}, "cpu", "no part named 'transformer.h.0'; it has model"),
    ],
    ids=str,
)
def test_what_cannot_be_placed_is_refused(device_map: Any, device: str, message: str) -> None:
    """Wrong words, devices that are not there, the disk, parts that the model does not have."""
    with pytest.raises(CircuitsError, match=message):
        load(device_map=device_map, device=device)


def test_without_accelerate_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is needed only for a map."""
    monkeypatch.setattr(placing, "find_spec", lambda name: None)
    with pytest.raises(CircuitsError, match=r"accelerate: pip install 'attention-circuits\[gpu\]'"):
        checked_map("auto", "cpu")


def test_what_did_not_fit_is_named() -> None:
    """Parts that an automatic map has left on disk."""
    lm = nn.Module()
    lm.hf_device_map = {"model": 0, "lm_head": "disk"}  # type: ignore[assignment]
    with pytest.raises(CircuitsError, match="lm_head would stay on disk"):
        run_where_it_lies(lm, "auto")


def test_a_layer_on_two_devices_is_refused() -> None:
    """Its attention and its MLP apart: no one device is that of the layer."""
    block = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    with devices():
        block[0].to(HOME)
        block[1].to(OTHER)
        with pytest.raises(CircuitsError, match="layer 7 lies on distant:0, distant:1"):
            device_of(block, 7)


def test_the_double_refuses_what_a_gpu_refuses() -> None:
    """Tensors of two devices do not meet; an index and a number of the CPU may, and copies cross."""
    with devices():
        near, far = torch.ones(2, 3, device=HOME), torch.ones(2, 3, device=OTHER)
        for other in (far, torch.ones(2, 3)):
            with pytest.raises(RuntimeError, match="same device"):
                near + other
        with pytest.raises(RuntimeError, match="same device"):
            near[torch.tensor([0]).to(OTHER)]
        with pytest.raises(RuntimeError, match="numpy"):
            near.numpy()
        near[0] = far[1] * torch.tensor(2.0)
        assert near.device == HOME
        assert near[torch.tensor([0])].cpu().tolist() == [[2.0, 2.0, 2.0]]


@pytest.mark.parametrize(("text", "message"), [("[1]", "holds no object"), ("{", "is not JSON")])
def test_a_file_that_holds_no_map(text: str, message: str, tmp_path: Path) -> None:
    """The command line says so before anything is loaded."""
    path = tmp_path / "map.json"
    path.write_text(text)
    result = CliRunner().invoke(group, ["trace", "When", "--device-map", str(path)])
    assert result.exit_code == 2
    assert message in result.output


def test_a_map_in_a_file(tmp_path: Path) -> None:
    """It is read and used."""
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"": "cpu"}))
    arguments = ["trace", "--token-ids", "1 5 9 3", "-o", str(tmp_path / "out"), "--device-map", str(path)]
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "graph.json").is_file()
