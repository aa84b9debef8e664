"""Questions to servers on the web, with a key that must not get lost: https or this machine only, and no redirects."""

from http.client import HTTPException, HTTPMessage
from typing import IO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from circuits.errors import CircuitsError

TIMEOUT = 60.0
LARGEST = 1 << 28  # bytes of an answer


class Unreachable(CircuitsError):
    """Nobody answered."""


class Refused(CircuitsError):
    """The server answered with an error.

    Attributes
    ----------
    address : without what stands behind its ?, which may be secret
    code : of HTTP; 300 to 399 where it leads elsewhere
    body : what it said, without the key
    """

    def __init__(self, address: str, code: int, body: str) -> None:
        super().__init__(f"{address}: refused with code {code}: {body[:300]}")
        self.address, self.code, self.body = address, code, body


def send(
    method: str, address: str, content: bytes, headers: dict[str, str], *, who: str, key: str | None = None
) -> bytes:
    """What a server answers.

    who
        The server, for messages.
    key
        What no message may show.

    Raises
    ------
    Refused, Unreachable, CircuitsError
        The server says no, cannot be reached, or is asked without https.
    """

    def hidden(text: str) -> str:
        return text.replace(key, "***") if key else text

    parts = urlsplit(address)
    local = parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1", "::1")
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if parts.scheme != "https" and not local:
        raise CircuitsError(f"{shown}: {who} is spoken to by https only")
    try:
        request = Request(address, content, headers, method=method)
        with build_opener(_NoRedirect).open(request, timeout=TIMEOUT) as answer:
            found: bytes = answer.read(LARGEST)
            return found
    except HTTPError as error:
        with error:
            try:
                body = error.read(1 << 20).decode("utf-8", "replace")
            except (OSError, HTTPException):
                body = ""
            raise Refused(shown, error.code, hidden(body)) from None
    except (OSError, HTTPException, ValueError) as error:
        why = hidden(str(getattr(error, "reason", error)) or type(error).__name__)
        raise Unreachable(f"{shown}: cannot be reached ({why}); try again where there is a network") from None


class _NoRedirect(HTTPRedirectHandler):
    """Goes nowhere else: urllib would take the key along."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None
