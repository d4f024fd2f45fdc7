"""How good is a ranking, and how sure can we be? Metrics, statistics, the test protocol and baselines."""

from __future__ import annotations

from lwa_helpers.evaluation.baselines import EASE, ItemKNN, Popularity, RecentPopularity, Tuned, tune
from lwa_helpers.evaluation.calibration import Calibration, calibrated, ensemble, fitted_scale
from lwa_helpers.evaluation.cross_fit import CrossFitted
from lwa_helpers.evaluation.metrics import (
    bias_frame,
    coverage_at_k,
    hit_rate_at_k,
    metric_frame,
    mrr_at_k,
    ndcg_at_k,
    popularity_at_k,
    rank_of_target,
    top_k,
)
from lwa_helpers.evaluation.protocol import Baseline, Cases, cases, ranks, recommended
from lwa_helpers.evaluation.sasrec import ESASRec, SASRec
from lwa_helpers.evaluation.statistics import (
    contrasts,
    difference_of_arms,
    difference_over_seeds,
    effect_size,
    holm,
    kendall_tau,
    mean_interval,
    paired_difference,
    randomization_test,
    ratio_of_arms,
    ratio_of_means,
    smallest_detectable_difference,
    spearman,
    top_k_overlap,
    variance_components,
)
from lwa_helpers.evaluation.tuned_baselines import tuned_baselines

__all__ = [
    "EASE",
    "Baseline",
    "Calibration",
    "Cases",
    "CrossFitted",
    "ESASRec",
    "ItemKNN",
    "Popularity",
    "RecentPopularity",
    "SASRec",
    "Tuned",
    "bias_frame",
    "calibrated",
    "cases",
    "contrasts",
    "coverage_at_k",
    "difference_of_arms",
    "difference_over_seeds",
    "effect_size",
    "ensemble",
    "fitted_scale",
    "hit_rate_at_k",
    "holm",
    "kendall_tau",
    "mean_interval",
    "metric_frame",
    "mrr_at_k",
    "ndcg_at_k",
    "paired_difference",
    "popularity_at_k",
    "randomization_test",
    "rank_of_target",
    "ranks",
    "ratio_of_arms",
    "ratio_of_means",
    "recommended",
    "smallest_detectable_difference",
    "spearman",
    "top_k",
    "top_k_overlap",
    "tune",
    "tuned_baselines",
    "variance_components",
]
