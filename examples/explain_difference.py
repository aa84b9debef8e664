"""Why one token and not another? Trace the difference of two logits, then prune harder.

python examples/explain_difference.py
"""

import circuits
from circuits.targets import token_id

model = circuits.load()
target = circuits.TokenDifference(token_id(model.base, " Mary"), token_id(model.base, " John"))
graph = circuits.trace(model, "When Mary and John went to the store, John gave a drink to", [target])
small = graph.prune(node_threshold=0.5, edge_threshold=0.9)
print(f"{len(graph.nodes)} nodes, pruned harder {len(small.nodes)}")
small.save("difference.svg")
