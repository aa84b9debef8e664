"""Files of the Hugging Face hub that a configuration names: circuit-tracer's `hf://owner/repo/path/of/file?revision=...`.

Source: circuit_tracer/utils/hf_utils.py, `parse_hf_uri` and `download_hf_uri`, of version 0.5.0. Ids of whole
replacements are read by `circuits.hub`.
"""

import re
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from circuits.replacements.errors import ReplacementError

_FILE = re.compile(r"/?(?P<repo>[\w.-]+)/(?P<file>[^/].*)")


def hub_file(uri: str) -> Path:
    """The file on this machine: from huggingface_hub's cache, or downloaded into it.

    Raises
    ------
    ReplacementError
        It is no such address, or the file is neither in the cache nor to be had.
    """
    parts = urlsplit(uri)
    found = _FILE.fullmatch(parts.path)
    if parts.scheme != "hf" or not parts.netloc or found is None or ".." in found["file"].split("/"):
        raise ReplacementError(f"{uri}: is no file of the hub; expected hf://owner/repo/path/of/file")
    from huggingface_hub import constants, hf_hub_download

    repo, revision = f"{parts.netloc}/{found['repo']}", parse_qs(parts.query).get("revision", [None])[0]
    try:
        return Path(hf_hub_download(repo, found["file"], revision=revision))
    except Exception as error:  # the hub's client and the network library under it have many of their own
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        asked = f"{repo} {found['file']}" + (f" --revision {revision}" if revision else "")
        raise ReplacementError(
            f"{uri}: is not in the cache {constants.HF_HUB_CACHE}, and the hub does not give it ({why}); run "
            f"`hf download {asked}` where there is a network, or set HF_HOME to a folder whose cache has it"
        ) from error
