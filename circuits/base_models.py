"""Base models from their folders or hub ids: whole, or as far as their configurations tell."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from circuits.errors import CircuitsError
from circuits.families import TEXT_MODELS, family_of
from circuits.model import DTYPES, BaseModel
from circuits.placing import DeviceMap, checked_map, run_where_it_lies
from circuits.replacements.weights import FLOATS, open_safetensors


def load_base_model(
    name: str | Path, *, device: str = "cpu", dtype: str | None = None, device_map: DeviceMap | None = None
) -> BaseModel:
    """Load a local folder or a hub id with eager attention, in the stored dtype unless another is asked for.

    Raises
    ------
    CircuitsError
        When the folder is missing or incomplete, a weight file is damaged, the family is not known, or nothing can be
        placed by the map.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    placing = None if device_map is None else checked_map(device_map, device)
    check_device(device)
    config = _config(name, dtype)
    lm: nn.Module
    report: dict[str, Any]
    try:
        lm, report = cast(Any, AutoModelForCausalLM).from_pretrained(
            name,
            attn_implementation="eager",
            dtype=DTYPES.get(dtype or "", "auto"),
            device_map=placing,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with names and shapes
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        what = "the model's weights could not be read" + ("" if placing is None else " and placed by the device map")
        raise CircuitsError(f"{name}: {what}: {_first_line(error)}") from error
    if placing is not None:
        run_where_it_lies(lm, placing)
    if missing := sorted(map(str, report.get("missing_keys", ()))):
        raise CircuitsError(f"{name}: tensors missing from the weights: {', '.join(missing[:5])}")
    for key, actual, expected in sorted(report.get("mismatched_keys", ()))[:1]:
        raise CircuitsError(
            f"{name}: tensor {key} has shape {tuple(actual)}, but the configuration asks for {tuple(expected)}; "
            "the weights and config.json do not belong together"
        )
    for key, tensor in lm.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise CircuitsError(
                f"{name}: tensor {key} holds NaN or infinite values; the file is damaged or half-trained"
            )
    if config.model_type in TEXT_MODELS:
        lm = _text_model(lm)
    return BaseModel(lm if placing else lm.to(device), load_tokenizer(name), _shown(name), _weight_files(name))


def load_shapes(name: str | Path, *, dtype: str | None = None) -> BaseModel:
    """The same model on torch's device "meta": every parameter has its shape and type, and no content.

    Raises
    ------
    CircuitsError
        When there is no configuration, or the family is not known.
    """
    from transformers import AutoModelForCausalLM

    config, files = _config(name, dtype), _weight_files(name)
    if config.model_type in TEXT_MODELS:
        config = config.text_config
    held = DTYPES[dtype] if dtype else config.dtype or _stored_dtype(files)
    with torch.device("meta"):
        lm: nn.Module = cast(Any, AutoModelForCausalLM).from_config(config, attn_implementation="eager", dtype=held)
    return BaseModel(lm, load_tokenizer(name), _shown(name), files)


def check_device(device: str) -> None:
    """Refuse a device that torch does not have."""
    if device != "cpu" and not torch.cuda.is_available():
        raise CircuitsError(f"device {device!r} was asked for, but torch sees no CUDA device; use --device cpu")


def _config(name: str | Path, dtype: str | None) -> Any:
    """The configuration of a model of a known family that is to be held in `dtype`."""
    from transformers import AutoConfig

    if dtype is not None and dtype not in DTYPES:
        raise CircuitsError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise CircuitsError(f"{name}: no model could be read there: {_first_line(error)}") from error
    family_of(config.model_type, str(name))
    return config


def _stored_dtype(files: list[Path]) -> torch.dtype:
    """The type of the first weight in the files, as transformers takes it where the configuration names none."""
    tensors = open_safetensors(files[0]).values() if files and files[0].suffix == ".safetensors" else ()
    return next((FLOATS[tensor.dtype] for tensor in tensors if tensor.dtype in FLOATS), torch.float32)


def _shown(name: str | Path) -> str:
    return Path(name).resolve().name if Path(name).is_dir() else str(name)


def _text_model(lm: Any) -> nn.Module:
    """The text model of a Gemma 3 with vision, as transformers would have loaded it alone."""
    from transformers import Gemma3ForCausalLM

    with torch.device("meta"):
        text = Gemma3ForCausalLM(lm.config.text_config)
    text.model, text.lm_head = lm.model.language_model, lm.lm_head
    return cast(nn.Module, text)


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a folder or hub id, or None when it has none (prompts are then given as token ids)."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _weight_files(name: str | Path) -> list[Path]:
    """Those that are on this machine."""
    from transformers.utils.hub import cached_file

    folder = Path(str(cached_file(str(name), "config.json"))).parent
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
