"""Explanations from an OpenAI-compatible endpoint, played by a server on this machine that checks what it is sent."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from shelves import tiny_store

from circuits.errors import CircuitsError
from circuits.feature_explaining import Endpoint, explain_features, question
from circuits.feature_store import FeatureStore

KEY = "sk-secret-0123456789"


@dataclass
class Played:
    """What the server was asked, and how it answers."""

    asked: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    code: int = 200
    answer: Any = None
    url: str = ""


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    """A server that wants a key and answers with the number of the question."""
    played = Played()

    class Handler(BaseHTTPRequestHandler):
        """Speaks JSON."""

        def do_POST(self) -> None:
            """A question."""
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            played.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}, content))
            said = {"choices": [{"message": {"content": f' "words of\n{len(played.asked)}."'}}]}
            code = 401 if self.headers.get("Authorization") != f"Bearer {KEY}" else played.code
            text = json.dumps(said if played.answer is None else played.answer).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(text)))
            if code == 302:
                self.send_header("Location", "https://example.org/")
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args: object) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    played.url = f"http://127.0.0.1:{server.server_address[1]}/v1/"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield played
    server.shutdown()
    server.server_close()


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return tiny_store(tmp_path / "tiny.sqlite")


def test_answers_become_labels_of_the_model(played: Played, store: FeatureStore) -> None:
    """One question a feature, with its examples; a person's label is still shown first."""
    store.set_label("mtc.1", 4, "mine")
    found = explain_features(store, "mtc.1", [3, 4], Endpoint(played.url, "some-model", KEY))
    assert found == {3: "words of 1", 4: "words of 2"}
    page = store.page("mtc.1", 3)
    assert (page["label"], page["label_by"]) == ("words of 1", "some-model")
    assert store.label("mtc.1", 4) == "mine"
    store.set_label("mtc.1", 4, "")
    assert store.label("mtc.1", 4) == "words of 2"
    for (path, headers, content), feature in zip(played.asked, (3, 4), strict=True):
        assert path == "/v1/chat/completions"
        assert headers["authorization"] == f"Bearer {KEY}"
        assert content["model"] == "some-model"
        asked = content["messages"][-1]["content"]
        assert asked == question(store.page("mtc.1", feature))
        assert "<<" in asked
        assert page["examples"]
        assert "Attention moves" in asked


def test_refusals_are_said_without_the_key(played: Played, store: FeatureStore) -> None:
    """A wrong key, an error, another interface, an empty answer, a way elsewhere, nobody there, no https."""
    endpoint = Endpoint(played.url, "some-model", KEY)
    assert KEY not in repr(endpoint)
    cases: list[tuple[int, Any, str]] = [
        (500, {"error": f"bad {KEY}"}, "code 500"),
        (200, {"choices": []}, "does not answer as"),
        (200, ["x"], "does not answer as"),
        (200, {"choices": [{"message": {"content": None}}]}, "answered nothing"),
        (302, {}, "code 302"),
    ]
    for played.code, played.answer, said in cases:
        with pytest.raises(CircuitsError, match=said) as caught:
            explain_features(store, "mtc.1", [3], endpoint)
        assert KEY not in str(caught.value)
    with pytest.raises(CircuitsError, match="CIRCUITS_EXPLAIN_KEY"):
        explain_features(store, "mtc.1", [3], Endpoint(played.url, "some-model", "sk-other"))
    with pytest.raises(CircuitsError, match="cannot be reached"):
        explain_features(store, "mtc.1", [3], Endpoint("http://127.0.0.1:9/v1", "some-model", KEY))
    with pytest.raises(CircuitsError, match="https only"):
        explain_features(store, "mtc.1", [3], Endpoint("http://example.org/v1", "some-model", KEY))
    with pytest.raises(CircuitsError, match="cannot be told"):
        explain_features(store, "mtc.1", [3], Endpoint(played.url, "person", KEY))
    assert store.page("mtc.1", 3)["label_by"] == "automatic"


def test_what_was_answered_before_a_refusal_is_kept(played: Played, store: FeatureStore) -> None:
    """Label by label."""

    def stop(done: int, total: int) -> None:
        played.code = 500

    with pytest.raises(CircuitsError, match="code 500"):
        explain_features(store, "mtc.1", [3, 4], Endpoint(played.url, "some-model", KEY), stop)
    assert store.page("mtc.1", 3)["label_by"] == "some-model"
    assert store.page("mtc.1", 4)["label_by"] == "automatic"
