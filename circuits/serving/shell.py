"""The frame of every page: head, navigation, the data as JSON, and the module that draws it. All text is escaped."""

import html
import json
from typing import Any

from starlette.responses import HTMLResponse, Response

from circuits.graph.formats.text import visible

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="/static/icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="/static/viewer.css">
<link rel="stylesheet" href="/static/serve.css">
{script}</head>
<body class="{page}-page">
<nav aria-label="Pages">
<a class="brand" href="/">circuits</a><a href="/">Trace</a><a href="/features">Features</a>
</nav>
<main id="page">{main}</main>
<p id="status" role="status" class="unseen"></p>
<script type="application/json" id="data">{data}</script>
</body>
</html>
"""
NOSCRIPT = "<noscript>These pages need JavaScript, which is switched off.</noscript>"


def shell(title: str, page: str, data: dict[str, Any]) -> Response:
    """A page that `static/PAGE.js` draws from `data`."""
    return HTMLResponse(
        PAGE.format(
            title=html.escape(f"{visible(title)[:80]} · circuits" if title != "circuits" else title),
            page=page,
            script=f'<script type="module" src="/static/{page}.js"></script>\n',
            main=NOSCRIPT,
            data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
        )
    )


def not_found(words: str, status: int) -> Response:
    """A page that says what went wrong, in place of the one that was asked for."""
    said = f'<section class="panel"><h1>{status}</h1><p>{html.escape(visible(words))}</p></section>'
    return HTMLResponse(PAGE.format(title=str(status), page="error", script="", main=said, data="null"), status)
