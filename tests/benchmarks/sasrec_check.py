"""Our SASRec beside cornac's on the same split, both chosen on the validation part and ranked by our own protocol.

    pip install --no-deps --target DIR 'cornac>=3,<4' powerlaw
    PYTHONPATH=DIR:. python tests/benchmarks/sasrec_check.py [--root FOLDER --category Office_Products --split file]
                                                             [--epochs 5 10]

cornac is no dependency of the package. Sizes are equal (2 layers, 64 wide, 1 head, the newest 20 items); cornac trains
on one prefix per target with its own cross-entropy over in-batch and drawn negatives. Exits with status 1 when our test
NDCG@10 is below cornac's with the whole interval of the paired difference.
"""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict
from typing import Self

import numpy as np

from lwa_helpers.data.amazon import load_amazon
from lwa_helpers.data.interactions import Interactions
from lwa_helpers.data.movielens import load_movielens
from lwa_helpers.evaluation.baselines import tune
from lwa_helpers.evaluation.metrics import ndcg_at_k
from lwa_helpers.evaluation.protocol import cases, ranks
from lwa_helpers.evaluation.sasrec import SASRec
from lwa_helpers.evaluation.statistics import mean_interval, paired_difference

LENGTH = 20


class CornacSASRec:
    """cornac's SASRec behind our Baseline interface."""

    def __init__(self, n_epochs: int, seed: int = 0) -> None:
        from cornac.models import SASRec as Theirs

        self.seed = seed
        self.model = Theirs(
            embedding_dim=64,
            num_blocks=2,
            num_heads=1,
            max_len=LENGTH,
            n_epochs=n_epochs,
            batch_size=256,
            n_sample=1024,
            learning_rate=1e-3,
            dropout=0.3,
            seed=seed,
        )

    def fit(self, interactions: Interactions) -> Self:
        """A session is a user's train items in order; item indices are made ours."""
        from cornac.data import SequentialDataset

        items = OrderedDict((item, index) for index, item in enumerate(interactions.item_ids))
        train = interactions.train.sort_values("user_id", kind="stable")
        rows = [(u, u, i, t) for t, (u, i) in enumerate(zip(train.user_id, train.parent_asin))]
        self.model.fit(SequentialDataset.build(rows, fmt="USIT", global_iid_map=items, seed=self.seed))
        return self

    def scores(self, histories: list[list[int]]) -> np.ndarray:
        """One call of cornac's score for each history."""
        return np.stack([self.model.score(0, history[-LENGTH:]) for history in histories])


def main(options: argparse.Namespace) -> int:
    data = load_amazon(options.root, options.category, split=options.split) if options.root else load_movielens()
    eval_cases = cases(data)
    ours = {"dim": [64], "heads": [1], "max_length": [LENGTH], "max_epochs": [options.max_epochs]}
    ndcg = {}
    for name, (kind, grid) in {"ours": (SASRec, ours), "cornac": (CornacSASRec, {"n_epochs": options.epochs})}.items():
        tuned = tune(kind, grid, data, budget=len(options.epochs))
        print(tuned.tried.round(4).assign(system=name).to_string(index=False), flush=True)
        ndcg[name] = ndcg_at_k(ranks(tuned.best, eval_cases), 10)
        print(name, "test NDCG@10 {:.4f} [{:.4f}, {:.4f}]".format(*mean_interval(ndcg[name], seed=0)), flush=True)
    lead = paired_difference(ndcg["ours"], ndcg["cornac"], seed=0)
    print(f"{data.name}, {len(eval_cases.targets)} users: ours - cornac " + "{:+.4f} [{:+.4f}, {:+.4f}]".format(*lead))
    return 1 if lead.high < 0 else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder of an Amazon category; MovieLens without it")
    parser.add_argument("--category", default="Office_Products")
    parser.add_argument("--split", default="file")
    parser.add_argument("--epochs", type=int, nargs="+", default=[5, 10], help="cornac's, tried in turn")
    parser.add_argument("--max-epochs", type=int, default=40, help="ours, which stops early")
    sys.exit(main(parser.parse_args()))
