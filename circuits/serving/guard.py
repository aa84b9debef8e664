"""Which requests are answered at all, and what every answer says about itself.

A server on the loopback can be reached by any page that the user's browser has open. Two checks keep them out. The Host
must be one that this server is asked by: an attacker's name that was made to point to this machine (DNS rebinding) is
not. And a request that changes something must come from this server's own pages (Origin, Sec-Fetch-Site) and be JSON,
which a form of another page cannot send (CSRF).
"""

import ipaddress
import socket
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = "; ".join(
    (
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "img-src 'self'",
        "frame-src 'self'", "base-uri 'none'", "form-action 'self'", "frame-ancestors 'self'",
    )
)  # fmt: skip
# The viewer's own page has a stricter policy in itself; it gets an origin of its own, apart from the server's.
VIEWER_POLICY = "sandbox allow-scripts allow-downloads; frame-ancestors 'self'"
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "SAMEORIGIN",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
READS = ("GET", "HEAD")


class Guard:
    """Stands before an application.

    Parameters
    ----------
    host
        What the server is bound to. On the loopback only the loopback's names are answered; else also any address
        given as a number, which no name can be made to be, and this machine's own name.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app, self.host = app, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope["method"], Headers(scope=scope))
        app: ASGIApp = self.app if refusal is None else JSONResponse({"error": refusal[1]}, refusal[0])

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                _add(MutableHeaders(scope=_as_scope(message)))
            await send(message)

        await app(scope, receive, send_with_headers)

    def _refusal(self, method: str, headers: Headers) -> tuple[int, str] | None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self.knows(hosts[0]):
            return 421, "this server is not asked by that name; open it by the address that it printed"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and (
            method not in READS or headers.get("sec-fetch-mode") != "navigate"
        ):
            return 403, "requests from other pages are not answered"
        if method in READS:
            return None
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{hosts[0]}":
            return 403, "requests from other pages are not answered"
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return 415, "expected content-type: application/json"
        return None

    def knows(self, host: str) -> bool:
        """Whether a Host header is one of this server's."""
        name = hostname(host)
        if name is None:
            return False
        if name == "localhost" or _is_loopback(name):
            return True
        if self.host == "localhost" or _is_loopback(self.host):
            return False
        return _address(name) is not None or name in {self.host.lower(), socket.gethostname().lower()}


def hostname(host: str) -> str | None:
    """The name in a Host header, in small letters; None if it is none."""
    name, bracket, port = host.lower().partition("]")
    if bracket:
        name, port = name.removeprefix("["), port.removeprefix(":") if port else "0"
    elif ":" in host:
        name, _, port = host.lower().rpartition(":")
    else:
        name, port = host.lower(), "0"
    if not name or "[" in name or not port.isdecimal() or (":" in name) != bool(bracket):
        return None
    return name


def is_loopback(host: str) -> bool:
    """Whether a server that is bound there can be reached from this machine alone."""
    return host == "localhost" or _is_loopback(host)


def _is_loopback(name: str) -> bool:
    address = _address(name)
    return address is not None and address.is_loopback


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _as_scope(message: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    message.setdefault("headers", [])
    return message


def _add(headers: MutableHeaders) -> None:
    for name, value in HEADERS.items():
        headers.setdefault(name, value)
    headers.setdefault("content-security-policy", POLICY)
