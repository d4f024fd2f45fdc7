"""From Fisher information to layer weights: the strategies that the ablation compares, and how to add one."""

from __future__ import annotations

import inspect
from typing import ClassVar

import numpy as np

from lwa_helpers.errors import LwaError
from lwa_helpers.fisher.result import FisherResult

FLOOR = 1e-12


class LayerwiseDistillation:
    """How much each matched layer of the student counts in the hidden-state term of the distillation loss.

    Subclass it, give it a `name` and write `calculate_layer_weights`; the name can then be used in every YAML file.
    """

    name: ClassVar[str] = ""
    strategies: ClassVar[dict[str, type[LayerwiseDistillation]]] = {}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if not cls.__dict__.get("name"):
            raise LwaError(f"strategy {cls.__name__} needs a class attribute `name`")
        LayerwiseDistillation.strategies[cls.name] = cls

    def calculate_layer_weights(self, fisher_scores: FisherResult | None, n_layers: int) -> np.ndarray:
        """Return (n_layers,) weights >= 0 with mean 1, the layer next to the input first."""
        raise NotImplementedError(f"strategy {type(self).__name__} must define calculate_layer_weights")


def get_strategy(name: str | type[LayerwiseDistillation], seed: int = 0) -> LayerwiseDistillation:
    """Return the strategy of that name, or class, with its default parameters; LwaError lists the known names.

    seed: handed to a strategy that takes one, because it draws its weights.
    """
    known = LayerwiseDistillation.strategies
    if not isinstance(name, type) and name not in known:
        raise LwaError(f"unknown weighting strategy {name!r}: known are {', '.join(sorted(known))}")
    chosen = name if isinstance(name, type) else known[name]
    return chosen(seed=seed) if "seed" in inspect.signature(chosen).parameters else chosen()


def mean_one(values: np.ndarray) -> np.ndarray:
    """Scale non-negative finite values to mean 1. Raises LwaError for negative, non-finite or all-zero values."""
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
        raise LwaError(f"layer weights must be finite, >= 0 and not all zero, got {values.tolist()}")
    return values / values.mean()


def fisher_at_depths(fisher_scores: FisherResult | None, n_layers: int, name: str) -> np.ndarray:
    """Average the teacher's per-layer trace over the n_layers equal slices of its depth, (n_layers,).

    Slice s holds the teacher layers between the outputs that student layers s-1 and s are matched to; a layer that a
    border cuts counts by the part inside. Raises LwaError without scores.
    """
    if fisher_scores is None:
        raise LwaError(f"strategy {name!r} needs Fisher scores: pass a FisherResult of the teacher")
    trace = np.asarray(fisher_scores.per_layer, dtype=np.float64)
    cumulative = np.concatenate([[0.0], np.cumsum(trace)])
    borders = np.interp(np.linspace(0, len(trace), n_layers + 1), np.arange(len(trace) + 1), cumulative)
    return np.diff(borders) * n_layers / len(trace)


class Uniform(LayerwiseDistillation):
    """w_s = 1."""

    name = "uniform"

    def calculate_layer_weights(self, fisher_scores, n_layers):
        return np.ones(n_layers)


class Linear(LayerwiseDistillation):
    """w_s proportional to s."""

    name = "linear"

    def calculate_layer_weights(self, fisher_scores, n_layers):
        return mean_one(np.arange(1, n_layers + 1))


class Exponential(LayerwiseDistillation):
    """w_s proportional to ratio^((s-1)/(S-1)): the last layer counts `ratio` times the first."""

    name = "exponential"

    def __init__(self, ratio: float = 10.0):
        self.ratio = ratio

    def calculate_layer_weights(self, fisher_scores, n_layers):
        return mean_one(np.geomspace(1.0, self.ratio, n_layers))


class Schedule(LayerwiseDistillation):
    """A fixed table of weights along the depth, 0.1, 0.2, … 1.0 by default, read off by linear interpolation."""

    name = "schedule"

    def __init__(self, values: tuple[float, ...] = tuple(np.linspace(0.1, 1.0, 10))):
        self.values = values

    def calculate_layer_weights(self, fisher_scores, n_layers):
        at = np.linspace(0, len(self.values) - 1, n_layers)
        return mean_one(np.interp(at, np.arange(len(self.values)), self.values))


class Fisher(LayerwiseDistillation):
    """w_s proportional to the mean Fisher trace of the teacher layers that student layer s stands for."""

    name = "fisher"

    def calculate_layer_weights(self, fisher_scores, n_layers):
        return mean_one(fisher_at_depths(fisher_scores, n_layers, self.name))


class FisherTimesDepth(LayerwiseDistillation):
    """w_s proportional to s times the Fisher trace."""

    name = "fisher_x_depth"

    def calculate_layer_weights(self, fisher_scores, n_layers):
        return mean_one(fisher_at_depths(fisher_scores, n_layers, self.name) * np.arange(1, n_layers + 1))


class SoftmaxFisher(LayerwiseDistillation):
    """w_s proportional to F_s^(1/temperature), a softmax of log F: high temperatures flatten it."""

    name = "softmax_fisher"

    def __init__(self, temperature: float = 2.0):
        self.temperature = temperature

    def calculate_layer_weights(self, fisher_scores, n_layers):
        log_f = np.log(fisher_at_depths(fisher_scores, n_layers, self.name) + FLOOR)
        return mean_one(np.exp((log_f - log_f.max()) / self.temperature))


class FisherAhead(LayerwiseDistillation):
    """w_s proportional to the Fisher trace of slice s and all slices above it: what stands or falls with the state after s.

    A wrong state is read by every later layer, so it costs as much as the information that these and its own layers hold.
    Because lower layers hold most of the trace the weights fall with depth, and the last state, which cross-entropy and KL
    judge already, counts least.
    """

    name = "fisher_ahead"

    def calculate_layer_weights(self, fisher_scores, n_layers):
        return mean_one(np.cumsum(fisher_at_depths(fisher_scores, n_layers, self.name)[::-1])[::-1])


class InverseFisher(LayerwiseDistillation):
    """w_s proportional to 1 / F_s, the control that turns the claim around."""

    name = "inverse_fisher"

    def calculate_layer_weights(self, fisher_scores, n_layers):
        return mean_one(1.0 / (fisher_at_depths(fisher_scores, n_layers, self.name) + FLOOR))


class ShuffledFisher(LayerwiseDistillation):
    """The Fisher weights in a random order: same values, no link to the layers."""

    name = "shuffled_fisher"

    def __init__(self, seed: int = 0):
        self.seed = seed

    def calculate_layer_weights(self, fisher_scores, n_layers):
        weights = mean_one(fisher_at_depths(fisher_scores, n_layers, self.name))
        return np.random.default_rng(self.seed).permutation(weights)


NO_HIDDEN, LABELS = "none", "labels"  # arms without a hidden-state term, and without a teacher at all


def layer_map(n_student: int, n_teacher: int) -> list[int]:
    """Return, for student layers 1 … S, the teacher layer (1 … L) at the same relative depth: round(s L / S), at least 1."""
    return [max(1, round(layer * n_teacher / n_student)) for layer in range(1, n_student + 1)]


def matched_layers(n_layers: int, match: str) -> np.ndarray:
    """Return which of the student's layers are matched, (n_layers,) bool.

    all; no_last, no_last_two: without the last one or two; last: it alone; lower, upper: the half next to the input or the
    output; middle: without the first and last quarter. Raises LwaError when none is left, or for an unknown word.
    """
    depth = (np.arange(n_layers) + 0.5) / n_layers
    places = np.arange(n_layers, 0, -1)  # 1 for the last layer
    chosen = {
        "all": places > 0,
        "no_last": places > 1,
        "no_last_two": places > 2,
        "last": places == 1,
        "lower": depth < 0.5,
        "upper": depth >= 0.5,
        "middle": abs(depth - 0.5) <= 0.25,
    }
    if match not in chosen:
        raise LwaError(f"match {match!r}: choose one of {', '.join(chosen)}")
    if not chosen[match].any():
        raise LwaError(f"match {match!r} leaves none of the student's {n_layers} layers to be matched")
    return chosen[match]


def layer_weights(
    fisher: FisherResult | np.ndarray | None,
    strategy: str | LayerwiseDistillation,
    n_layers: int,
    match: str = "all",
    seed: int = 0,
) -> np.ndarray | None:
    """Return the (n_layers,) weights with mean 1, 0 on layers that are not matched, or None for "none" and "labels".

    An array is taken as it is, scaled; the strategy must be a known one all the same. The mean over all layers of weight times
    distance is then the mean over the matched ones. Raises LwaError when the number of weights is not n_layers.
    """
    if isinstance(strategy, str) and strategy in (NO_HIDDEN, LABELS):
        return None
    chosen = strategy if isinstance(strategy, LayerwiseDistillation) else get_strategy(strategy, seed)
    given = fisher is not None and not isinstance(fisher, FisherResult)
    weights = mean_one(fisher if given else chosen.calculate_layer_weights(fisher, n_layers))
    if weights.shape != (n_layers,):
        raise LwaError(
            f"{weights.size} layer weights for a student of {n_layers} layers: they must be as many, in one row, "
            f"not of shape {weights.shape}"
        )
    return mean_one(weights * matched_layers(n_layers, match))
