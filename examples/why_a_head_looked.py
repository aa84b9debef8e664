"""Why a head looked where it did: the pairs of features, tokens and errors that made its attention score.

python examples/why_a_head_looked.py
"""

import circuits

model = circuits.load()
graph = circuits.trace(model, "When Mary and John went to the store, John gave a drink to")
strongest = graph.node_ids()[int(graph.nodes.target_weight.argmax())]
explanation = circuits.explain(model, graph, strongest)
print(*explanation.words, sep="\n")
for look in explanation.looks:
    print(f"\n{look.head}: {look.query} looks at {look.key}, attention {look.attention:.3f}, lead {look.lead:.2f}")
    for pair in look.pairs[:5]:
        print(f"  {pair.query.id:>14} meets {pair.key.id:<14} {pair.weight:+.2f}")
