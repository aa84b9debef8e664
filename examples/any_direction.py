"""Explain any direction of the stream, not only a token: here the mean of all number words at the last position.

python examples/any_direction.py
"""

import circuits
from circuits.targets import token_id

model = circuits.load()
words = [" one", " two", " three", " four", " five", " six", " seven", " eight"]
rows = model.base.unembedding[[token_id(model.base, word) for word in words]].float()
number = circuits.Direction(rows.mean(0) - model.base.unembedding_mean, name="a number word")
graph = circuits.trace(model, "Tom began to count: three, four, five,", [number])
graph.save("numbers.json")
graph.save("numbers.svg")
