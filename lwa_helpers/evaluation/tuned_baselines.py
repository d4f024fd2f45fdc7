"""The baselines of the main table, each with its tuning grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.baselines import EASE, ItemKNN, Popularity, RecentPopularity, Tuned, tune
from lwa_helpers.evaluation.protocol import Baseline
from lwa_helpers.evaluation.sasrec import ESASRec, SASRec

if TYPE_CHECKING:
    from lwa_helpers.config import EvaluationConfig
    from lwa_helpers.data.interactions import Interactions

BUDGET = 6  # maximum number of settings per baseline


def tuned_baselines(
    interactions: Interactions, evaluation: EvaluationConfig, seed: int, names: Sequence[str] = ()
) -> dict[str, Tuned]:
    """Tune baselines on the valid part, each with at most BUDGET settings.

    Args:
        interactions: the dataset.
        evaluation: the settings, which name the baselines and the values of SASRec's grid.
        seed: of SASRec's training and of the choice among settings.
        names: the baselines to tune; those of evaluation.baselines by default.

    Returns:
        The tuned baselines by name.

    Raises:
        LwaError: for an unknown name.
    """
    known = grids(evaluation, seed)
    if unknown := set(names or evaluation.baselines) - set(known):
        raise LwaError(f"unknown baselines {sorted(unknown)}: choose among {', '.join(known)}")
    return {name: tune(*known[name], interactions, BUDGET, seed=seed) for name in names or evaluation.baselines}


def grids(evaluation: EvaluationConfig, seed: int) -> dict[str, tuple[type[Baseline], dict[str, list[Any]]]]:
    """Return the class of each known baseline, and the values to try of its parameters.

    Args:
        evaluation: the settings, which name the values of SASRec's grid.
        seed: of SASRec's training.
    """
    sasrec: dict[str, list[Any]] = {
        "max_epochs": [evaluation.sasrec_epochs],
        "seed": [seed],
        "dropout": evaluation.sasrec_dropouts,
        "learning_rate": evaluation.sasrec_learning_rates,
        "dim": evaluation.sasrec_dims,
    }
    return {
        "popularity": (Popularity, {}),
        "recent_popularity": (RecentPopularity, {"half_life": [0.02, 0.05, 0.2]}),
        "itemknn": (ItemKNN, {"neighbours": [50, 200], "shrinkage": [10.0, 100.0]}),
        "ease": (EASE, {"l2": [100.0, 300.0, 1000.0]}),
        "sasrec": (SASRec, sasrec),
        "esasrec": (ESASRec, sasrec),
    }
