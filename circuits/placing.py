"""Models that span several devices: what lies where, and how tensors get there and back.

*Home* is the device of the token embedding. The recording, the nodes, what they write and what targets read are there.
On the device of its layer is what is too large to be in one place: the base model's weights, the patterns once more
beside them when attention is frozen, and encoder, thresholds and skip connection of the dictionaries that read there.
Covectors and streams go there for one product, and what comes out goes home. On one device nothing is ever moved.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from importlib.util import find_spec
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from circuits.errors import CircuitsError

DeviceMap = str | Mapping[str, str | int]
AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")

P = ParamSpec("P")
R = TypeVar("R")


class Placed(Protocol):
    """A sublayer as it is seen from home; `there` is the same with all its tensors on the device of its layer, None
    where that is home."""

    @property
    def home(self) -> torch.device: ...

    @property
    def there(self) -> Any: ...


S = TypeVar("S", bound=Placed)


def at_layer(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method of a sublayer that takes tensors from home, runs where the layer is, and returns tensors to home."""

    @wraps(method)
    def placed(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        there = self.there
        if there is None:
            return method(self, *args, **kwargs)
        moved = {name: _to(value, there.home) for name, value in kwargs.items()}
        return cast(R, _to(method(there, *_to(args, there.home), **moved), self.home))

    return placed


def _to(value: Any, device: torch.device) -> Any:
    """Tensors, and tuples of them, on a device; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_to(one, device) for one in value)
    return value.to(device) if isinstance(value, Tensor) else value


def checked_map(device_map: DeviceMap, device: str) -> str | dict[str, str | int]:
    """A device map in the terms of transformers, if a model can be traced that lies so.

    Raises
    ------
    CircuitsError
        accelerate is missing, there is no such device, or a part is to stay on disk, where its weights cannot be read.
    """
    if device != "cpu":
        raise CircuitsError(f"device {device!r} and a device map were both given; the map says where everything lies")
    if find_spec("accelerate") is None:
        raise CircuitsError("a device map needs the package accelerate: pip install 'attention-circuits[gpu]'")
    if isinstance(device_map, str):
        if device_map not in AUTOMATIC:
            raise CircuitsError(
                f"device map {device_map!r} is none of {', '.join(AUTOMATIC)}; else give a JSON file with an object "
                "that has a device for each module"
            )
        return device_map
    for module, place in device_map.items():
        _check_device(module, place)
    return dict(device_map)


def _check_device(module: str, place: str | int) -> None:
    if place == "disk":
        raise CircuitsError(f"device map: {module!r} is on disk, where its weights cannot be read; put it on the cpu")
    try:
        found = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    except (RuntimeError, TypeError) as error:
        raise CircuitsError(
            f"device map: {module!r} is on {place!r}, which is no device; expected 0, cuda:1 or cpu"
        ) from error
    there = torch.cuda.device_count()
    if found.type != "cpu" and (found.type != "cuda" or (found.index or 0) >= there):
        raise CircuitsError(f"device map: {module!r} is on {place!r}, but torch sees {there} CUDA devices here")


def run_where_it_lies(lm: nn.Module, device_map: str | dict[str, Any]) -> None:
    """Let the parts of a dispatched model that its map has on the CPU run there too.

    By itself accelerate keeps their weights in a dictionary and copies them to a GPU for each pass; the modules are
    empty in between, so that nothing could be read from them.

    Raises
    ------
    CircuitsError
        A part was left on disk, because it does not fit on the devices that there are, or the map names a part that the
        model does not have.
    """
    modules = dict(lm.named_modules())
    if not isinstance(device_map, str) and (unknown := [name for name in device_map if name not in modules]):
        raise CircuitsError(
            f"device map: the model has no part named {unknown[0]!r}; it has {', '.join(list(modules)[1:6])} and so on"
        )
    places: dict[str, Any] = getattr(lm, "hf_device_map", {})
    if "disk" in places.values():
        left = ", ".join(name for name, place in places.items() if place == "disk")
        raise CircuitsError(
            f"the model does not fit on the devices here: {left} would stay on disk, where weights cannot be read; use "
            "more devices, or --dtype bfloat16"
        )
    if len(set(places.values())) > 1 and "cpu" in places.values():
        from accelerate import dispatch_model
        from accelerate.hooks import remove_hook_from_submodules

        remove_hook_from_submodules(lm)
        dispatch_model(lm, places, main_device="cpu", skip_keys=getattr(lm, "_skip_keys_device_placement", None))


def device_of(block: nn.Module, layer: int) -> torch.device:
    """The one device that a block lies on."""
    found = {parameter.device for parameter in block.parameters()}
    if len(found) > 1:
        raise CircuitsError(
            f"device map: layer {layer} lies on {', '.join(sorted(map(str, found)))}; a layer must be on one device"
        )
    return found.pop()
