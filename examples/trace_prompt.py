"""Trace a prompt on the embedded default and look at the graph in Python.

python examples/trace_prompt.py
"""

import numpy as np

import circuits
from circuits.graph import head_name

model = circuits.load()
graph = circuits.trace(model, "When Mary and John went to the store, John gave a drink to")

best = int(np.argmax(graph.nodes.probability == np.nanmax(graph.nodes.probability)))
print(f"prediction: {graph.nodes.label[best]!r} with probability {graph.nodes.probability[best]:.3f}")
print(f"scores: {graph.metadata['scores']}")
print(f"worst ledger gap: {graph.metadata['ledger']['max_relative_gap']:.1e}")

names = graph.node_ids()
strongest = np.argsort(-np.abs(graph.heads.weight))[:5]
for i in strongest:
    edge = graph.heads.edge[i]
    source, target = names[graph.edges.source[edge]], names[graph.edges.target[edge]]
    head = head_name(int(graph.heads.head[i]), layer=int(graph.heads.layer[i]))
    print(f"{source} -> {target}: {graph.heads.weight[i]:+.3f} of {graph.edges.weight[edge]:+.3f} through {head}")

graph.save("graph.svg")
