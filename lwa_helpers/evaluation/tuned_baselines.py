"""The baselines of the main table, each with the grid that it is tuned on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.baselines import EASE, ItemKNN, Popularity, RecentPopularity, Tuned, tune
from lwa_helpers.evaluation.sasrec import ESASRec, SASRec

if TYPE_CHECKING:
    from lwa_helpers.config import EvaluationConfig
    from lwa_helpers.data.interactions import Interactions

BUDGET = 6  # settings tried of each


def tuned_baselines(
    interactions: Interactions, evaluation: EvaluationConfig, seed: int, names: Sequence[str] = ()
) -> dict[str, Tuned]:
    """Return the baselines by name, those that evaluation.baselines lists or those named, each tuned on the valid part with at
    most BUDGET settings.

    Raises LwaError for an unknown name.
    """
    sasrec = {
        "max_epochs": [evaluation.sasrec_epochs],
        "seed": [seed],
        "dropout": evaluation.sasrec_dropouts,
        "learning_rate": evaluation.sasrec_learning_rates,
        "dim": evaluation.sasrec_dims,
    }
    grids = {
        "popularity": (Popularity, {}),
        "recent_popularity": (RecentPopularity, {"half_life": [0.02, 0.05, 0.2]}),
        "itemknn": (ItemKNN, {"neighbours": [50, 200], "shrinkage": [10.0, 100.0]}),
        "ease": (EASE, {"l2": [100.0, 300.0, 1000.0]}),
        "sasrec": (SASRec, sasrec),
        "esasrec": (ESASRec, sasrec),
    }
    if unknown := set(names or evaluation.baselines) - set(grids):
        raise LwaError(f"unknown baselines {sorted(unknown)}: choose among {', '.join(grids)}")
    return {name: tune(*grids[name], interactions, BUDGET, seed=seed) for name in names or evaluation.baselines}
