"""What the tests of the server ask for."""

from typing import Any

PROMPT = "When Mary and John went to the store, John gave a drink to"


def traced(client: Any, prompt: str = PROMPT, **options: Any) -> str:
    """The name of a graph that was traced and saved."""
    report = client.do("/api/traces", {"prompt": prompt, **options})
    assert report["state"] == "done", report
    name: str = report["result"]["graph"]
    return name
