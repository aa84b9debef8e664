"""Models and replacements on the Hugging Face hub: from an id to a folder on this machine.

    owner/repo                      hf://owner/repo
    owner/repo@revision             hf://owner/repo@revision
    owner/repo:sub/folder           hf://owner/repo/sub/folder
    owner/repo@revision:sub/folder  hf://owner/repo@revision/sub/folder

A revision is a branch, a tag or a commit. circuit-tracer's `hf://owner/repo/sub/folder?revision=...` is read too, and
so are its names "gemma" and "llama" (circuit_tracer/utils/hf_utils.py of version 0.5.0). A directory that is there
always goes before an id. huggingface_hub downloads, and keeps what it has in its cache; with HF_HUB_OFFLINE=1, or
without a network, only the cache is looked at.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from circuits.errors import CircuitsError

# circuit-tracer's own names, as it resolves them.
SHORT_NAMES = {"gemma": "mwhanna/gemma-scope-transcoders", "llama": "mntss/transcoder-Llama-3.2-1B"}
# What the formats of replacements consist of; some repositories hold gigabytes of pictures of features beside it.
REPLACEMENT_FILES = ("*.safetensors", "*.npz", "*.pt", "*.pth", "*.bin", "*.json", "*.yaml", "*.yml")
NOT_REPLACEMENTS = ("features/*", "*/features/*")
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
# A whole repository of many dictionaries is downloaded up to this size; beyond it a folder must be named.
LARGEST = 200 * 10**9

_REPO = r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
_PLAIN = re.compile(_REPO + r"(?:@(?P<revision>[\w.][\w./-]*))?(?::(?P<folder>[^:]+))?")
_URI = re.compile(_REPO + r"(?:@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[\w.][\w.-]*))?(?:/(?P<folder>.*))?")


@dataclass(frozen=True)
class HubId:
    """A repository on the hub, with a revision and a folder in it where they are named."""

    repo: str
    revision: str | None = None
    folder: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}" + (f":{self.folder}" if self.folder else "")


def parse(text: str) -> HubId | None:
    """The hub id that a text is, or None if it is none.

    Raises
    ------
    CircuitsError
        The text begins with `hf://`, but is no id; or its folder leads out of the repository.
    """
    text = SHORT_NAMES.get(text, text)
    if text.startswith("hf://"):
        parts = urlsplit(text)
        found = _URI.fullmatch((parts.netloc + parts.path).rstrip("/"))
        asked = parse_qs(parts.query).get("revision", [None])[0]
        if found is None:
            raise CircuitsError(f"{text}: is no hub id; expected hf://owner/repo, hf://owner/repo@revision/sub/folder")
    else:
        found, asked = _PLAIN.fullmatch(text), None
        if found is None:
            return None
    folder = (found["folder"] or "").strip("/")
    if any(part in ("", ".", "..") for part in folder.split("/")) and folder:
        raise CircuitsError(f"{text}: the folder {folder!r} is none of a repository; write it without . and ..")
    return HubId(found["repo"], found["revision"] or asked, folder)


def replacement_folder(given: str | Path) -> Path:
    """The directory of a replacement: the one given if it is there, else that of the hub id.

    What is neither a directory nor an id is given back as it is, for the reader of replacements to refuse.

    Raises
    ------
    CircuitsError
        The hub has no such repository, revision or folder, or it cannot be reached and the cache does not have it.
    """
    if isinstance(given, Path) or Path(given).exists():
        return Path(given)
    asked = parse(given)
    if asked is None:
        return Path(given)
    inside = f"{asked.folder}/" if asked.folder else ""
    patterns = [inside + pattern for pattern in REPLACEMENT_FILES]
    if not asked.folder:
        _check_size(asked, patterns)
    folder = Path(_download(asked, patterns)) / asked.folder
    if not folder.is_dir():
        raise CircuitsError(
            f"{given}: {asked.repo} has no folder {asked.folder!r}, or the cache {_cache()} does not have it; look at "
            f"https://huggingface.co/{asked.repo}/tree/{asked.revision or 'main'}"
        )
    return folder


def name_of(folder: Path) -> str | None:
    """What a folder of the hub's cache is: `owner/repo` or `owner/repo:sub/folder`; None if it is no such folder."""
    parts = folder.parts
    at = next((i for i in range(len(parts) - 2, 0, -1) if parts[i] == "snapshots"), 0)
    if not at or not parts[at - 1].startswith("models--"):
        return None
    return str(HubId("/".join(parts[at - 1].split("--")[1:]), None, "/".join(parts[at + 2 :])))


def model_folder(given: str | Path) -> str | Path:
    """The folder of a model whose hub id names a revision, `owner/repo@revision`; anything else as it is given.

    Only safetensors weights are downloaded.
    """
    if isinstance(given, Path) or Path(given).exists() or given in SHORT_NAMES:
        return given
    asked = parse(given)
    if asked is None or (asked.revision is None and not asked.folder):
        return given if asked is None else asked.repo
    inside = f"{asked.folder}/" if asked.folder else ""
    return Path(_download(asked, [inside + pattern for pattern in MODEL_FILES])) / asked.folder


def has_model(given: str) -> bool:
    """Whether what is no directory names a model of transformers; of a repository, its config.json tells."""
    asked = parse(given)
    if asked is None:
        return True
    if asked.folder or given in SHORT_NAMES:
        return False
    try:
        config = json.loads((Path(_download(asked, ["config.json"])) / "config.json").read_text(encoding="utf-8"))
    except (CircuitsError, OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def _download(asked: HubId, patterns: list[str]) -> str:
    """The snapshot's folder, with the files of these patterns in it."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            asked.repo, revision=asked.revision, allow_patterns=patterns, ignore_patterns=list(NOT_REPLACEMENTS)
        )
    except Exception as error:  # the hub's client and the network library under it have many of their own
        raise CircuitsError(_refusal(asked, error)) from error
    return str(folder)


def _check_size(asked: HubId, patterns: list[str]) -> None:
    """Refuse to download a whole library of dictionaries for want of a folder's name."""
    from huggingface_hub import snapshot_download

    try:
        files = snapshot_download(
            asked.repo,
            revision=asked.revision,
            allow_patterns=patterns,
            ignore_patterns=list(NOT_REPLACEMENTS),
            dry_run=True,
        )
    except Exception:  # offline, or refused: the download itself says why
        return
    size = sum(file.file_size or 0 for file in files if file.will_download)
    if size > LARGEST:
        folders = sorted({file.filename.rpartition("/")[0] for file in files} - {""})
        raise CircuitsError(
            f"{asked}: {len(files)} files of {size / 1e9:.0f} GB; name a folder of it, such as "
            f"{asked}:{folders[0] if folders else 'sub/folder'}"
        )


def _refusal(asked: HubId, error: Exception) -> str:
    """What was asked for, why it could not be had, and what to do about it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    named = f"{asked}: there is no such directory, and on the hub"
    revision = f" --revision {asked.revision}" if asked.revision else ""
    folder = f" --include '{asked.folder}/*'" if asked.folder else ""
    command = f"`hf download {asked.repo}{revision}{folder}`"
    if isinstance(error, GatedRepoError):
        return f"{named} {asked.repo} asks for consent; give it on its page there, then `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"{named} {asked.repo} has no revision {asked.revision!r}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{named} there is no {asked.repo}, or it is private; check the name, or `hf auth login`"
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"it could not be reached: {_first_line(error)}"
    return (
        f"{named} {why}; the cache {_cache()} does not have it: run {command} where there is a network, or set HF_HOME "
        "to a folder whose cache has it"
    )


def _cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
