"""A saved graph in networkx, without the model: the strongest path from a token to the prediction.

python examples/networkx_paths.py out/graph.json
"""

import math
import sys

import networkx as nx

from circuits.graph import Graph

graph = Graph.load(sys.argv[1])
digraph = graph.to_networkx()
into = {node: sum(abs(data["weight"]) for _, _, data in digraph.in_edges(node, data=True)) for node in digraph}
for _, target, data in digraph.edges(data=True):
    data["cost"] = -math.log(max(abs(data["weight"]) / into[target], 1e-12))
prediction = max(digraph, key=lambda node: digraph.nodes[node]["target_weight"])
lengths, paths = nx.single_source_dijkstra(digraph.reverse(), prediction, weight="cost")
tokens = [node for node in paths if digraph.nodes[node]["kind"] == "embedding"]
for token in sorted(tokens, key=lambda node: lengths[node])[:3]:
    print(f"{math.exp(-lengths[token]):.4f}", " -> ".join(reversed(paths[token])))
