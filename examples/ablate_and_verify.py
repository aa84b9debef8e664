"""Is the graph true? Ablate its strongest features in the base model, then test all of its nodes.

python examples/ablate_and_verify.py
"""

import numpy as np

import circuits

model = circuits.load()
graph = circuits.trace(model, "When Mary and John went to the store, John gave a drink to")
features = np.flatnonzero(graph.nodes.is_feature)
strongest = features[np.argsort(-graph.nodes.influence[features])][:4]
names = np.array(graph.node_ids())[strongest]
outcome = circuits.intervene(model, graph.prompt, [circuits.Change(name, "ablate") for name in names])
print("without", *names)
for token in outcome.top_tokens(count=4):
    print(f"  {token.text!r:12} {token.probability:.3f} -> {token.new_probability:.3f}")

figures = circuits.verify(model, graph).metadata["verification"]
for name in ("nodes", "random", "patterns"):
    row = figures[name]
    print(f"{name:10} {row['tested']:4} tested, rank correlation {row['spearman']:.2f}, slope {row['slope']:.2f}")
