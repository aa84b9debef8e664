"""Who is answered: hosts, origins, sizes, forms; and hostile names and prompts reach nothing outside the folder."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from asking import PROMPT, traced
from click.testing import CliRunner

from circuits.errors import CircuitsError
from circuits.serving.guard import Guard, hostname
from circuits.serving.shelf import NAME, Shelf, named

HOSTILE = '</script><img src=x onerror="window.ran = true"><script>window.ran = true</script>'
NAMES = ["../secret", "..", "%2e%2e/secret", "..%2fsecret", "/etc/passwd", "a/../../secret", "a\0b", ".hidden", "A",
         "-a", "a-", "a b", "a.json", "a" * 200, "ä", "con:x", "link", "folder", "<b>"]  # fmt: skip


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:8000", 200), ("localhost:8000", 200), ("LOCALHOST", 200), ("[::1]:8000", 200), ("127.0.0.2", 200),
     ("evil.example:8000", 421), ("127.0.0.1.evil.example", 421), ("localhost.evil.example", 421), ("10.0.0.7", 421),
     ("localhost:80@evil.example", 421), ("", 421), ("127.0.0.1:", 421), ("[::1", 421), ("::1", 421), ("0", 421)],
)  # fmt: skip
def test_only_names_of_the_loopback_are_answered(make: Any, host: str, status: int) -> None:
    """A name that somebody else has made to point here (DNS rebinding) is refused, on pages and on the interface."""
    client = make()
    for address in ("/", "/api/graphs", "/static/api.js"):
        assert client.get(address, headers={"host": host}).status_code == status


def test_bound_elsewhere_numbers_are_answered_and_strange_names_are_not() -> None:
    """A number cannot be made to point anywhere; the name that the server was given is its own."""
    guard = Guard(lambda scope, receive, send: None, "studio.lan")  # type: ignore[arg-type,return-value]
    assert [guard.knows(host) for host in ("192.168.1.7:8000", "[fe80::1]:80", "studio.lan", "localhost")] == [True] * 4
    assert not guard.knows("evil.example")
    assert [hostname(host) for host in ("[::1]:1", "a:b", "a:1:2", "[x")] == ["::1", None, None, None]


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 400), ({"origin": "http://127.0.0.1:8000"}, 400), ({"origin": "http://127.0.0.1:9000"}, 403),
     ({"origin": "https://127.0.0.1:8000"}, 403), ({"origin": "null"}, 403), ({"origin": "http://evil.example"}, 403),
     ({"sec-fetch-site": "same-origin"}, 400), ({"sec-fetch-site": "cross-site"}, 403),
     ({"sec-fetch-site": "same-site"}, 403), ({"content-type": "text/plain"}, 415),
     ({"content-type": "application/x-www-form-urlencoded"}, 415), ({"content-type": ""}, 415),
     ({"content-type": "application/json; charset=utf-8"}, 400)],
)  # fmt: skip
def test_what_changes_something_comes_from_our_own_pages(make: Any, headers: dict[str, str], status: int) -> None:
    """Another page's request never reaches the application; ours does, and is refused there for what it says (400)."""
    given = {"content-type": "application/json", **headers}
    posts = ["/api/traces", "/api/graphs/x/annotations"]
    codes = [make().post(address, content=b"{}", headers=given).status_code for address in posts]
    assert codes == [status, status]


def test_other_pages_get_nothing_but_by_a_link(make: Any) -> None:
    """A frame, a script or a fetch of another page is refused; a link that somebody follows is not."""
    client = make()
    asked = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert client.get("/api/graphs", headers=asked).status_code == 403
    assert client.get("/", headers={**asked, "sec-fetch-mode": "navigate"}).status_code == 200
    assert client.put("/api/traces", json={}).status_code == 405


def test_every_answer_has_the_headers(make: Any) -> None:
    """Pages, scripts, errors and refusals alike."""
    client = make()
    client.headers["accept"] = "*/*"
    for address, host in [("/", "localhost"), ("/static/home.js", "localhost"), ("/nothing", "localhost"),
                          ("/api/jobs/x", "localhost"), ("/", "evil.example")]:  # fmt: skip
        headers = client.get(address, headers={"host": host}).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'self'" in headers["content-security-policy"]


def test_long_requests_are_refused(make: Any) -> None:
    """By their length as it is said, by what comes all the same, by letters, and by tokens."""
    client = make(max_tokens=20)
    big = json.dumps({"prompt": "a" * 600_000}).encode()
    assert client.post("/api/traces", content=big, headers={"content-type": "application/json"}).status_code == 413

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(big), 65536):
            yield big[start : start + 65536]

    streamed = client.post("/api/traces", content=pieces(), headers={"content-type": "application/json"})
    assert streamed.status_code == 413
    letters = client.post("/api/traces", json={"prompt": "a" * 400})
    assert (letters.status_code, "more than the 320" in letters.json()["error"]) == (400, True)
    tokens = client.do("/api/traces", {"prompt": "a b c d e f g h i j k l m n o p q r s t u v w"})
    assert "this server takes 20" in tokens["error"]
    for bad in (b"{", b"[" * 100_000, b"\xff", b'"x"', b'{"prompt": 5}', b'{"prompt": "a", "node_threshold": NaN}',
                b'{"prompt": "a", "x": 1}', b'{"prompt": "\\ud800"}', b'{"prompt": "a", "explain": 1}'):  # fmt: skip
        answer = client.post("/api/traces", content=bad, headers={"content-type": "application/json"})
        assert answer.status_code == 400, (bad[:40], answer.text)
    assert client.studio.shelf.names() == []


def test_hostile_names_reach_nothing(make: Any, tmp_path: Path) -> None:
    """Whatever stands where a graph's name belongs: no file outside is read, written, renamed or deleted."""
    client = make()
    secret = tmp_path / "secret.json"
    secret.write_text('{"secret": "told"}')
    (tmp_path / "graphs" / "link.json").symlink_to(secret)
    (tmp_path / "graphs" / "folder.json").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in NAMES:
        whole = quote(name, safe="").replace(".", "%2E")  # a client would take dots out of a path by itself
        for form in (whole, whole.replace("%2F", "/")):
            answers = [client.get(f"{place}/{form}") for place in ("/graphs", "/view", "/api/graphs")]
            posts = [("rename", {"name": "x"}), ("delete", {}), ("annotations", {"qParams": {}}),
                     ("interventions", {"changes": [{"nodes": ["a"], "how": "ablate"}]})]  # fmt: skip
            answers += [client.post(f"/api/graphs/{form}/{what}", json=content) for what, content in posts]
            for answer in answers:
                assert answer.status_code in (404, 405), (form, answer.status_code, answer.text)
                assert "told" not in answer.text
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert client.get("/api/graphs").json()["graphs"] == []
    for static in ("..%2fapp.py", "../app.py", "page.html", "base.css%00", "%2e%2e/%2e%2e/pyproject.toml"):
        assert client.get(f"/static/{static}").status_code == 404


@pytest.mark.parametrize("wish", [*NAMES, "", "  ", "x\u202ey", "COM1", PROMPT, HOSTILE])
def test_any_wish_becomes_a_name(tmp_path: Path, wish: str) -> None:
    """Names that a graph is given are always of the allowed letters, and lie in the folder."""
    name = named(wish)
    assert NAME.fullmatch(name)
    assert Shelf(tmp_path)._free(wish) == name


def test_damaged_files_are_left_out_of_the_list(make: Any) -> None:
    """A file that is no graph neither breaks the list nor a page."""
    client = make()
    traced(client)
    folder = client.studio.shelf.folder
    for number, text in enumerate(["", "[]", "{}", '{"metadata": 5, "nodes": 3}', '{"metadata": {}, "nodes": [1]}']):
        (folder / f"bad-{number}.json").write_text(text)
    assert len(client.get("/api/graphs").json()["graphs"]) == 1
    for number in range(5):
        assert client.get(f"/view/bad-{number}").status_code in (400, 404)
        assert client.get(f"/graphs/bad-{number}").status_code == 404


def test_a_hostile_prompt_is_text(make: Any) -> None:
    """In pages it stands as JSON without `<`, or escaped; a file name is made of its letters alone."""
    client = make()
    name = traced(client, HOSTILE)
    assert name == "script-img-src-x-onerror-window-ran-true-script-window-ran-true"
    for address in ("/", f"/graphs/{name}", f"/view/{name}"):
        page = client.get(address).text
        assert "<img" not in page
        assert "<script>window" not in page
    assert client.get("/graphs/<img src=x>").text.count("<img") == 0


def test_without_the_framework_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that a user can act on, before anything is loaded."""
    from circuits.cli import serve

    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    result = CliRunner().invoke(serve.command, [])
    assert isinstance(result.exception, CircuitsError)
    assert "pip install 'attention-circuits[serve]'" in str(result.exception)
