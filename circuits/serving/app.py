"""Addresses and answers: pages for people, JSON for their scripts, and the progress of jobs as server-sent events."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any

import anyio
from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from circuits.errors import CircuitsError
from circuits.graph import GraphError
from circuits.graph.formats import html_file
from circuits.serving.asked import Bad, annotations_asked, changes_asked, text, trace_asked
from circuits.serving.guard import VIEWER_POLICY, Guard
from circuits.serving.shelf import Missing
from circuits.serving.shell import not_found, shell
from circuits.serving.studio import Studio
from circuits.serving.work import Act, Full, Job, Worker

MAX_BODY = 512 * 1024  # bytes of a request
BODY_SECONDS = 15.0  # in which it must have come
BEAT = 0.1  # seconds between two looks at a job
KEEP_ALIVE = 15.0  # seconds after which a silent stream says that it is there
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
Answer = Callable[[Request], Awaitable[Response]]


def application(studio: Studio, worker: Worker, host: str) -> Starlette:
    """The web application; `host` is what the server is bound to."""
    site = _Site(studio, worker)
    routes = [
        Route("/", site.home),
        Route("/graphs/{name}", site.graph),
        Route("/features", site.features),
        Route("/features/{dictionary}/{feature:int}", site.feature),
        Route("/view/{name}", site.view),
        Route("/static/{name}", static),
        Route("/api/traces", site.trace, methods=["POST"]),
        Route("/api/jobs/{job}", site.job),
        Route("/api/jobs/{job}/events", site.events),
        Route("/api/jobs/{job}/stop", site.stop, methods=["POST"]),
        Route("/api/graphs", site.graphs),
        Route("/api/graphs/{name}", site.file),
        Route("/api/graphs/{name}/interventions", site.intervene, methods=["POST"]),
        Route("/api/graphs/{name}/annotations", site.annotate, methods=["POST"]),
        Route("/api/graphs/{name}/rename", site.rename, methods=["POST"]),
        Route("/api/graphs/{name}/delete", site.delete, methods=["POST"]),
        Route("/api/features/{dictionary}/{feature:int}", site.page),
        Route("/api/features/{dictionary}/{feature:int}/label", site.label, methods=["POST"]),
    ]
    known: dict[Any, Any] = dict.fromkeys((CircuitsError, GraphError, Full), _refused)
    known[HTTPException] = _http
    return Starlette(routes=routes, middleware=[Middleware(Guard, host=host)], exception_handlers=known)


@dataclass(frozen=True)
class _Site:
    studio: Studio
    worker: Worker

    # --- pages ------------------------------------------------------------------------------------------------------

    async def home(self, request: Request) -> Response:
        model = self.studio.model
        about = {
            "model": model.base.name,
            "replacements": [replacement.name for replacement in model.replacements],
            "max_tokens": self.studio.max_tokens,
            "graphs": await self._entries(),
        }
        return shell("circuits", "home", about)

    async def graph(self, request: Request) -> Response:
        name = request.path_params["name"]
        entries = {entry["name"]: entry for entry in await self._entries()}
        if name not in entries:
            raise Missing(f"there is no graph named {name[:80]!r}")
        graph = await run_sync(self.studio.shelf.open, name)
        made = graph.metadata.get("intervention") or {}
        about = {
            "graph": entries[name],
            "before": entries.get(str(made.get("of"))),
            "intervention": made or None,
            "tokens": list(graph.tokens),
        }
        return shell(graph.prompt, "graph", about)

    async def features(self, request: Request) -> Response:
        store = await run_sync(self.studio.store)
        stored = {} if store is None else await run_sync(store.dictionaries)
        known = [{"name": name, "kind": one.kind, "features": one.features} for name, one in sorted(stored.items())]
        return shell("Feature pages", "features", {"dictionaries": known})

    async def feature(self, request: Request) -> Response:
        page = await run_sync(self.studio.page, *_feature(request))
        return shell(f"{page['dictionary']} #{page['feature']}", "feature", {"page": page})

    async def view(self, request: Request) -> Response:
        text = await run_sync(self.studio.viewer, request.path_params["name"])
        return HTMLResponse(text, headers={"content-security-policy": VIEWER_POLICY})

    # --- jobs -------------------------------------------------------------------------------------------------------

    async def trace(self, request: Request) -> Response:
        asked = trace_asked(await _body(request), self.studio.max_tokens)
        return self._begun(partial(self.studio.trace, asked))

    async def intervene(self, request: Request) -> Response:
        asked = changes_asked(await _body(request))
        name = request.path_params["name"]
        self.studio.shelf.path(name)
        return self._begun(partial(self.studio.intervene, name, asked))

    def _begun(self, act: Act) -> Response:
        return JSONResponse({"job": self.worker.submit(act).id}, 202)

    async def job(self, request: Request) -> Response:
        return JSONResponse(self._report(self._job(request)))

    async def stop(self, request: Request) -> Response:
        await _body(request)
        job = self._job(request)
        self.worker.stop(job)
        return JSONResponse(self._report(job))

    async def events(self, request: Request) -> Response:
        return StreamingResponse(self._stream(self._job(request)), media_type="text/event-stream")

    async def _stream(self, job: Job) -> AsyncIterator[str]:
        """The job's report each time that it changes, to the end."""
        last, silent = "", 0.0
        while True:
            over = job.finished
            now = json.dumps(self._report(job))
            if now != last:
                yield f"data: {now}\n\n"
                last, silent = now, 0.0
            if over:
                return
            await anyio.sleep(BEAT)
            silent += BEAT
            if silent >= KEEP_ALIVE:
                yield ": still here\n\n"
                silent = 0.0

    def _job(self, request: Request) -> Job:
        job = self.worker.job(request.path_params["job"])
        if job is None:
            raise Missing("there is no such job")
        return job

    def _report(self, job: Job) -> dict[str, Any]:
        return {**job.report(), "ahead": self.worker.ahead(job)}

    # --- graphs and features ----------------------------------------------------------------------------------------

    async def graphs(self, request: Request) -> Response:
        return JSONResponse({"graphs": await self._entries()})

    async def _entries(self) -> list[dict[str, Any]]:
        return [entry.as_json() for entry in await run_sync(self.studio.shelf.entries)]

    async def file(self, request: Request) -> Response:
        name = request.path_params["name"]
        content = await run_sync(self.studio.shelf.text, name)
        return Response(
            content,
            media_type="application/json",
            headers={"content-disposition": f'attachment; filename="{name}.json"'},
        )

    async def annotate(self, request: Request) -> Response:
        kept = annotations_asked(await _body(request))
        await run_sync(self.studio.shelf.annotate, request.path_params["name"], kept)
        return JSONResponse({"saved": len(kept.get("pinnedIds") or ())})

    async def rename(self, request: Request) -> Response:
        wish = text(await _body(request), "name", 200)
        return JSONResponse({"graph": await run_sync(self.studio.shelf.rename, request.path_params["name"], wish)})

    async def delete(self, request: Request) -> Response:
        await _body(request)
        await run_sync(self.studio.shelf.delete, request.path_params["name"])
        return JSONResponse({"deleted": request.path_params["name"]})

    async def page(self, request: Request) -> Response:
        return JSONResponse(await run_sync(self.studio.page, *_feature(request)))

    async def label(self, request: Request) -> Response:
        wish = text(await _body(request), "label", 500)
        return JSONResponse(await run_sync(self.studio.set_label, *_feature(request), wish))


def _feature(request: Request) -> tuple[str, int]:
    feature = request.path_params["feature"]
    if feature >= 2**31:
        raise Missing("there is no such feature")
    return request.path_params["dictionary"], feature


async def static(request: Request) -> Response:
    """Our own scripts and style sheets, and the viewer's modules, which some of them import."""
    name = request.path_params["name"]
    if name == "viewer.css":
        return Response(html_file.style_sheet(), media_type="text/css")
    ours = files("circuits.serving").joinpath("static")
    theirs = files("circuits.graph.formats").joinpath("viewer")
    for folder, names in ((ours, [item.name for item in ours.iterdir()]), (theirs, html_file.MODULES)):
        suffix = name[name.rfind(".") :]
        if name in names and suffix in TYPES:
            return Response(folder.joinpath(name).read_bytes(), media_type=TYPES[suffix])
    raise HTTPException(404)


async def _body(request: Request) -> Any:
    """The JSON of a request, which must not be long and must come soon.

    Raises
    ------
    Bad, HTTPException
        It is no JSON; too long (413); too slow (408).
    """
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MAX_BODY:
        raise HTTPException(413, f"the request is longer than {MAX_BODY} bytes")
    got = bytearray()
    try:
        with anyio.fail_after(BODY_SECONDS):
            async for piece in request.stream():
                got += piece
                if len(got) > MAX_BODY:
                    raise HTTPException(413, f"the request is longer than {MAX_BODY} bytes")
    except TimeoutError as error:
        raise HTTPException(408, "the request did not come to its end") from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the request broke off") from error
    try:
        return json.loads(got.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Bad("the request is no JSON") from error


async def _refused(request: Request, error: Exception) -> Response:
    status = 404 if isinstance(error, Missing) else 429 if isinstance(error, Full) else 400
    return _said(request, status, str(error))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _said(request, error.status_code, error.detail)


def _said(request: Request, status: int, words: str) -> Response:
    if request.url.path.startswith(("/api/", "/static/", "/view/")):
        return JSONResponse({"error": words}, status)
    return not_found(words, status)
