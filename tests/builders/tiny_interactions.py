"""Small leave-one-out data of known or random sequences."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lwa_helpers.data.interactions import Interactions


def frame(rows):
    columns = ["user_id", "parent_asin", "rating", "timestamp"]
    table = pd.DataFrame([(u, i, 5.0, t) for u, i, t in rows], columns=columns)
    return table.astype({"user_id": "object", "parent_asin": "object", "rating": "float64", "timestamp": "int64"})


def interactions(sequences, n_items, held_out=2):
    """Leave-one-out data from {user: [item index, …]}; timestamps count up over the whole train part."""
    parts, clock = {"train": [], "valid": [], "test": []}, 0
    for user, items in sequences.items():
        names = ["train"] * (len(items) - held_out) + ["valid", "test"][:held_out]
        for item, part in zip(items, names, strict=True):
            clock += 1
            parts[part].append((user, f"i{item}", clock))
    names = range(n_items)
    items = pd.DataFrame({"parent_asin": [f"i{n}" for n in names], "title": [f"Item {n}" for n in names]})
    return Interactions(name="small", items=items, **{name: frame(rows) for name, rows in parts.items()})


def random_interactions(seed, users=40, n_items=9):
    rng = np.random.default_rng(seed)
    sequences = [rng.permutation(n_items)[: rng.integers(3, 8)].tolist() for _ in range(users)]
    return interactions({f"u{u}": items for u, items in enumerate(sequences)}, n_items)


def decided_by_the_last_but_one(n_items=11):
    """Each next item follows from the last but one, so that neither popularity nor the last item gives it away."""
    follows = np.random.default_rng(0).permutation(n_items).tolist()
    sequences = {}
    for user in range(n_items**2):
        items = [user % n_items, user // n_items]
        while len(items) < 8 + user % 11:
            items.append(follows[items[-2]])
        sequences[f"u{user}"] = items
    return interactions(sequences, n_items)
