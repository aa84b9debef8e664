"""Interventions drawn at random on a tiny model, and the addresses of its nodes."""

import random

from tiny_models import Case

from circuits.graph import ID_PREFIXES
from circuits.interventions import Bench, Change, PatternChange

Changes = list[Change | PatternChange]


def draw(bench: Bench, case: Case, *, count: int = 6, each: int = 3, seed: int = 0) -> list[Changes]:
    """Interventions of several changes on features, active or not, upstream and downstream of each other."""
    generator, n = random.Random(seed), bench.recording.n_positions
    table, batch = bench.table, []
    first = 1 if case.special else 0
    active = [i for i in range(len(table)) if table.dictionary[i] >= 0]
    for _ in range(count):
        changes: Changes = []
        for _ in range(each):
            i = generator.choice(active)
            dictionary = bench.linear.dictionaries[table.dictionary[i]]
            feature, at = int(table.feature[i]), int(table.position[i])
            if generator.random() < 0.3 and dictionary.rank == 1:
                feature, at = generator.randrange(dictionary.n_features), generator.randrange(first, n)
            where = generator.choice([f"{at}", f"{at}", f"{first}:{n - 1}", f"{at}:", ":"])
            how = generator.choice(["ablate", "set", "scale", "add"])
            address = f"{ID_PREFIXES[table.kind[i]]}{dictionary.layer}_{feature}_{where}@{dictionary.name}"
            changes.append(Change(address, how, round(generator.uniform(-1, 2), 3)))  # type: ignore[arg-type]
        batch.append(changes)
    return batch


def watch(bench: Bench) -> list[str]:
    """Every active feature node's address."""
    t, names = bench.table, [dictionary.name for dictionary in bench.linear.dictionaries]
    return [
        f"{ID_PREFIXES[t.kind[i]]}{t.layer[i]}_{t.feature[i]}_{t.position[i]}@{names[t.dictionary[i]]}"
        for i in range(len(t))
        if t.dictionary[i] >= 0
    ]
