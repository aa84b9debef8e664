"""Explanations of features by a language model behind any OpenAI-compatible endpoint; nothing is sent unless asked for.

    POST ENDPOINT/chat/completions  {model, messages, temperature, max_tokens}  ->  {choices: [{message: {content}}]}

The model reads a feature's strongest examples, their active tokens marked as `<<token>>`, and the tokens that the
feature speaks for, as in Bills et al. 2023, *Language models can explain neurons in language models*. What it answers
becomes a label with the model's name; a label that a person wrote is still the one that is shown.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from circuits.errors import CircuitsError
from circuits.feature_records import AUTOMATIC, PERSON, Page, tidy
from circuits.feature_store import FeatureStore
from circuits.labels import Progress
from circuits.web import Refused, send

EXAMPLES, ACTIVE = 8, 0.3  # examples that are sent; a token counts as active from this share of the largest on
TASK = (
    "You are shown what one feature of a language model is active on. Tokens at which it is active stand in <<double "
    "angles>>. Say in at most twelve words what these tokens or their contexts have in common. Answer with the "
    "explanation alone."
)


@dataclass(frozen=True)
class Endpoint:
    """Whom to ask: an address, a model, and a key that neither its repr nor an error shows."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)

    def ask(self, question: str) -> str:
        """The model's answer."""
        messages = [{"role": "system", "content": TASK}, {"role": "user", "content": question}]
        asked = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 60}
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "circuits"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        address = self.url.rstrip("/") + "/chat/completions"
        try:
            text = send("POST", address, json.dumps(asked).encode(), headers, who="the endpoint", key=self.key)
        except Refused as error:
            if error.code in (401, 403):
                raise CircuitsError(f"{error.address}: the key was refused; set CIRCUITS_EXPLAIN_KEY") from None
            raise
        try:
            answer = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise CircuitsError(f"{address}: does not answer as OpenAI's interface does; is it the address?") from error
        if not isinstance(answer, str) or not tidy(answer):
            raise CircuitsError(f"{address}: answered nothing; the model {self.model} may need more room to think")
        return tidy(answer).strip("\"'. ")


def explain_features(
    store: FeatureStore,
    dictionary: str,
    features: Sequence[int],
    endpoint: Endpoint,
    progress: Progress | None = None,
) -> dict[int, str]:
    """Ask about features and write the answers down as labels, each at once, by the model's name.

    Raises
    ------
    CircuitsError
        There is no page of a feature, or the endpoint refuses or cannot be reached; what was answered before is kept.
    """
    if endpoint.model in (PERSON, AUTOMATIC):
        raise CircuitsError(f"a model called {endpoint.model!r} cannot be told from other authors of labels")
    pages = {feature: store.page(dictionary, feature) for feature in features}
    found = {}
    for number, (feature, page) in enumerate(pages.items(), 1):
        found[feature] = endpoint.ask(question(page))
        store.set_label(dictionary, feature, found[feature], tidy(endpoint.model))
        if progress is not None:
            progress(number, len(pages))
    return found


def question(page: Page) -> str:
    """What the model is shown of a page."""
    lines = [f"Example {number}: {_marked(one)}" for number, one in enumerate(page["examples"][:EXAMPLES], 1)]
    if "head_loading" in page and any("query_activations" in one for one in page["examples"]):
        lines.append("Attention moves the feature from the marked tokens to later ones.")
    if page["top_outputs"]:
        lines.append("It makes these next tokens more likely: " + json.dumps([t for t, _ in page["top_outputs"]]))
    return "\n".join(lines)


def _marked(example: dict[str, Any]) -> str:
    largest = max((abs(value) for value in example["activations"]), default=0.0)
    return "".join(
        f"<<{token}>>" if value and abs(value) >= ACTIVE * largest else token
        for token, value in zip(example["tokens"], example["activations"], strict=True)
    )
