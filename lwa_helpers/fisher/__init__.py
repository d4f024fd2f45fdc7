"""Fisher information of causal LMs: per layer, module, attention head and parameter, exact and as cheap as a training step."""

from __future__ import annotations

from lwa_helpers.fisher.baseline import squared_batch_gradient
from lwa_helpers.fisher.calculator import FisherInformationCalculator
from lwa_helpers.fisher.convergence import convergence_curve, examples_needed, split_half_spearman
from lwa_helpers.fisher.kfac import kfac_effective_ranks
from lwa_helpers.fisher.losses import next_token_nll
from lwa_helpers.fisher.result import FisherResult

__all__ = [
    "FisherInformationCalculator",
    "FisherResult",
    "convergence_curve",
    "examples_needed",
    "kfac_effective_ranks",
    "next_token_nll",
    "split_half_spearman",
    "squared_batch_gradient",
]
