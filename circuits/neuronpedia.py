"""Neuronpedia: its calls, its names of models and dictionaries, and uploading graphs with the user's key.

The calls are those of its web application (github.com/hijohnnylin/neuronpedia, apps/webapp/app/api), which its API
documentation (neuronpedia.org/api-doc) describes:

    POST /api/graph/signed-put   {filename, contentLength, contentType}  ->  {url, putRequestId}     with x-api-key
    PUT  url                     the graph's JSON                                                    without it
    POST /api/graph/save-to-db   {putRequestId}                          ->  {url}                   with x-api-key
    POST /api/features           [{modelId, layer: "3-SOURCE_SET", index, maxActsToReturn}, ...]
                                 ->  [{layer, index, explanations: [{description, typeName}, ...]}, ...]

A key goes to Neuronpedia's own address alone, over https, is never followed anywhere else, and stands in no message.
NEURONPEDIA_URL names another server, such as one's own.
"""

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from circuits.errors import CircuitsError
from circuits.graph import Graph
from circuits.graph.formats.json_file import dumps
from circuits.graph.formats.text import model_name, slug
from circuits.web import Refused, send

URL = "https://www.neuronpedia.org"
KEY = "NEURONPEDIA_API_KEY"
LARGEST = 100 * 2**20  # bytes of a graph, app/[modelId]/graph/utils.ts
# Public dictionaries by the name that they have on the hub: model and source set (apps/graph/.../server.py).
SOURCES = {
    "gemma": ("gemma-2-2b", "gemmascope-transcoder-16k"),
    "mwhanna/gemma-scope-transcoders": ("gemma-2-2b", "gemmascope-transcoder-16k"),
    "mntss/clt-gemma-2-2b-2.5M": ("gemma-2-2b", "clt-hp"),
    "mwhanna/qwen3-4b-transcoders": ("qwen3-4b", "transcoder-hp"),
}
MODELS = {"gpt2": "gpt2-small"}
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Server:
    """Where Neuronpedia is, and the user's key; neither its repr nor an error shows the key."""

    url: str = field(default_factory=lambda: os.environ.get("NEURONPEDIA_URL", URL))
    key: str | None = field(default=None, repr=False)

    def ask(self, path: str, question: Any) -> Any:
        """The JSON that Neuronpedia answers to a question in JSON."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "circuits"}
        if self.key:
            headers["x-api-key"] = self.key
        text = self._send("POST", self.url.rstrip("/") + path, json.dumps(question).encode(), headers)
        try:
            return json.loads(text)
        except ValueError as error:
            raise CircuitsError(f"{self.url}{path}: answered with no JSON; is NEURONPEDIA_URL right?") from error

    def put(self, address: str, content: bytes) -> None:
        """Store content at an address that Neuronpedia has signed; without the key."""
        self._send("PUT", address, content, {"Content-Type": "application/json"})

    def _send(self, method: str, address: str, content: bytes, headers: dict[str, str]) -> bytes:
        try:
            return send(method, address, content, headers, who="Neuronpedia", key=self.key)
        except Refused as error:
            raise CircuitsError(_refusal(error)) from None


def _refusal(error: Refused) -> str:
    """What the server says of a question that it refuses."""
    said, details, address = "", "", error.address
    with suppress(ValueError, AttributeError):
        answer = json.loads(error.body)
        said = str(answer.get("error") or answer.get("message") or "")
        details = "; ".join(map(str, answer.get("details") or ()))[:300]
    if error.code in (401, 403):
        return f"{address}: the key was refused; copy it from neuronpedia.org/account into {KEY}"
    if said == "ERR_MODEL_DOES_NOT_EXIST":
        return f"{address}: Neuronpedia does not have this model; name one that it has with --model-id"
    if 300 <= error.code < 400:
        return f"{address}: leads elsewhere; set NEURONPEDIA_URL to where Neuronpedia is"
    return f"{address}: refused with code {error.code}{': ' if said else ''}{said}{' ' if details else ''}{details}"


def source_of(graph: Graph, model: str | None = None, source_set: str | None = None) -> tuple[str, str | None]:
    """Neuronpedia's names of a graph's model and of its dictionaries' source set, None if nothing tells.

    What is given goes first, then what the graph's metadata has in `feature_details` or `info`, then the public
    dictionaries that it was traced with; the model's own name, without its owner and in lower case, comes last.

    Raises
    ------
    CircuitsError
        A name is none that Neuronpedia can have.
    """
    data = graph.metadata
    scan = str(data.get("scan", ""))
    used = [scan, *(str(one.get("name", "")) for one in data.get("replacements", ()) if isinstance(one, dict))]
    public = next((SOURCES[name] for name in (re.split("[@:]", one)[0] for one in used) if name in SOURCES), None)
    for place in ("feature_details", "info"):
        details = data.get(place)
        if source_set is None and isinstance(details, dict):
            source_set = details.get("neuronpedia_source_set")
    own = re.split("[@:]", model_name(graph))[0].rpartition("/")[2]
    found = model or (public[0] if public else MODELS.get(own, own.lower()))
    source_set = source_set or (public[1] if public else None)
    for what, name in (("model", found), ("source set", source_set)):
        if name is not None and not _NAME.fullmatch(name):
            raise CircuitsError(f"{name!r} can be no {what} of Neuronpedia; name it with --model-id or --source-set")
    return found, source_set


def upload(
    graph: Graph, server: Server, *, model: str | None = None, source_set: str | None = None, name: str | None = None
) -> str:
    """Upload a graph; everybody can then see it.

    Parameters
    ----------
    server
        With the user's key.
    model, source_set
        Neuronpedia's names, such as "gemma-2-2b" and "gemmascope-transcoder-16k"; see `source_of`.
    name
        The graph's name in its address, its slug; by default from the prompt. One that the user has used before for
        this model is replaced.

    Returns
    -------
    str
        The address where the graph can be seen.

    Raises
    ------
    CircuitsError
        There is no key, the graph is too large, or Neuronpedia refuses it or cannot be reached.
    """
    if not server.key:
        raise CircuitsError(f"no key for Neuronpedia; copy yours from neuronpedia.org/account into {KEY}")
    scan, source_set = source_of(graph, model, source_set)
    chosen = slug(graph) if name is None else name
    if not re.fullmatch(r"[A-Za-z0-9_-]+", chosen):
        raise CircuitsError(f"the slug {chosen!r} may have letters, digits, - and _ only; give another with --slug")
    details = dict(graph.metadata.get("feature_details") or {})
    if source_set is not None:
        details["neuronpedia_source_set"] = source_set
    named = {"scan": scan, "slug": chosen.lower(), "feature_details": details}
    content = dumps(replace(graph, metadata={**graph.metadata, **named})).encode("ascii")
    if len(content) > LARGEST:
        raise CircuitsError(
            f"the graph has {len(content) / 2**20:.0f} MB, Neuronpedia takes up to {LARGEST / 2**20:.0f}; prune it "
            "tighter with `circuits render --node-threshold`"
        )
    question = {
        "filename": f"{named['slug']}.json",
        "contentLength": len(content),
        "contentType": "application/json",
    }
    signed = server.ask("/api/graph/signed-put", question)
    address, ticket = _field(signed, "url"), _field(signed, "putRequestId")
    server.put(address, content)
    return _field(server.ask("/api/graph/save-to-db", {"putRequestId": ticket}), "url")


def _field(answer: Any, key: str) -> str:
    if not isinstance(answer, dict) or not isinstance(answer.get(key), str):
        raise CircuitsError(f"Neuronpedia's answer has no {key!r}; has its interface changed?")
    return str(answer[key])
