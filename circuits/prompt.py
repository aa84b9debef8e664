"""From a prompt, given as text, chat or token ids, to the token ids that the model is run on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuits.errors import CircuitsError
from circuits.model import BaseModel


@dataclass(frozen=True)
class Prompt:
    """Token ids, their texts, and whether the first one is special (it then carries no feature and error nodes)."""

    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    first_is_special: bool


def prepare(model: BaseModel, prompt: str | Sequence[int], *, chat: bool = False) -> Prompt:
    """Tokenize a prompt; text gets the tokenizer's BOS (else EOS, else padding token) in front, token ids do not.

    Raises
    ------
    CircuitsError
        When the prompt is empty, too long, has ids outside the vocabulary, or there is no tokenizer for text.
    """
    tokenizer = model.tokenizer
    if isinstance(prompt, str):
        ids = _encode(model, prompt, chat)
        text = prompt
    else:
        ids = [int(i) for i in prompt]
        text = "" if tokenizer is None else str(tokenizer.decode(ids))
    if not ids:
        raise CircuitsError("the prompt is empty; give at least one token")
    outside = [i for i in ids if not 0 <= i < model.shape.vocabulary]
    if outside:
        raise CircuitsError(f"token id {outside[0]} is not in the vocabulary of {model.shape.vocabulary} tokens")
    if len(ids) > model.shape.context:
        raise CircuitsError(
            f"the prompt has {len(ids)} tokens, but {model.name} has a context of {model.shape.context}; shorten it"
        )
    return Prompt(text, tuple(ids), tuple(token_texts(model, ids)), ids[0] in special_ids(model))


def read_prompt_file(path: Path) -> str:
    """The prompt in a UTF-8 text file, one trailing newline removed."""
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CircuitsError(f"{path}: the prompt could not be read: {error}") from error


def token_texts(model: BaseModel, ids: Sequence[int]) -> list[str]:
    """The text of each token by itself; `<12>` for a model without tokenizer."""
    if model.tokenizer is None:
        return [f"<{i}>" for i in ids]
    return [str(model.tokenizer.decode([i])) for i in ids]


def special_ids(model: BaseModel) -> set[int]:
    """The token ids that are special: as a first token they carry no feature and error nodes."""
    if model.tokenizer is not None:
        return {int(i) for i in model.tokenizer.all_special_ids}
    config: Any = model.lm.config
    found = (getattr(config, "bos_token_id", None), getattr(config, "eos_token_id", None))
    return {i for i in found if isinstance(i, int)}


def single_token(model: BaseModel, text: str) -> int:
    """The id of a text that is exactly one token, with a leading space if only that form is one."""
    if model.tokenizer is None:
        raise CircuitsError(f"{model.name} has no tokenizer: give the target {text!r} as a token id")
    for form in (text, " " + text):
        ids = model.tokenizer(form, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            return int(ids[0])
    pieces = " | ".join(token_texts(model, model.tokenizer(text, add_special_tokens=False)["input_ids"]))
    raise CircuitsError(f"target {text!r} is not one token of the vocabulary; it splits into {pieces}")


def _encode(model: BaseModel, text: str, chat: bool) -> list[int]:
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise CircuitsError(f"{model.name} has no tokenizer: give token ids instead of text")
    if not text:
        raise CircuitsError("the prompt is empty; give at least one token")
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise CircuitsError(f"the tokenizer of {model.name} has no chat template; leave --chat out")
        messages = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    ids = [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    front = _front_id(tokenizer)
    if front is not None and not (ids and ids[0] in special_ids(model)):
        ids.insert(0, front)
    return ids


def _front_id(tokenizer: Any) -> int | None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if (found := getattr(tokenizer, name, None)) is not None:
            return int(found)
    return None
