"""From Fisher information to layer weights: the strategies that the ablation compares, and how to add another."""

from __future__ import annotations

import inspect
from typing import ClassVar

import numpy as np

from lwa_helpers.errors import LwaError
from lwa_helpers.fisher.result import FisherResult

FLOOR = 1e-12  # keeps log F and 1 / F finite where a trace is 0


class LayerwiseDistillation:
    """A weighting strategy: how much each matched layer of the student counts in the hidden-state term of the loss.

    To add a strategy, write a subclass with a `name` and a method `calculate_layer_weights`. The name can then be used
    in every YAML file.

    Example:
        >>> class UpperHalf(LayerwiseDistillation):
        ...     name = "upper_half"
        ...
        ...     def calculate_layer_weights(self, fisher_scores, n_layers):
        ...         return [2.0 * (layer >= n_layers / 2) for layer in range(n_layers)]
        >>> layer_weights(None, "upper_half", n_layers=4).tolist()
        [0.0, 0.0, 2.0, 2.0]
    """

    name: ClassVar[str] = ""
    strategies: ClassVar[dict[str, type[LayerwiseDistillation]]] = {}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if not cls.__dict__.get("name"):
            raise LwaError(f"strategy {cls.__name__} needs a class attribute `name`")
        LayerwiseDistillation.strategies[cls.name] = cls

    def calculate_layer_weights(self, fisher_scores: FisherResult | None, n_layers: int) -> np.ndarray:
        """Return weights >= 0 with mean 1, the layer next to the input first, (n_layers,)."""
        raise NotImplementedError(f"strategy {type(self).__name__} must define calculate_layer_weights")


def get_strategy(name: str | type[LayerwiseDistillation], seed: int = 0) -> LayerwiseDistillation:
    """Return the strategy of that name, or of that class, with its default parameters.

    Args:
        name: the name or the class.
        seed: passed to a strategy that takes one, because it draws its weights at random.

    Raises:
        LwaError: if the name is unknown; the message lists the known names.
    """
    known = LayerwiseDistillation.strategies
    if not isinstance(name, type) and name not in known:
        raise LwaError(f"unknown weighting strategy {name!r}: known are {', '.join(sorted(known))}")
    chosen = name if isinstance(name, type) else known[name]
    if "seed" in inspect.signature(chosen).parameters:
        return chosen(seed=seed)  # type: ignore[call-arg]  # its signature has just been checked
    return chosen()


def mean_one(values: np.ndarray) -> np.ndarray:
    """Scale values to mean 1.

    Args:
        values: finite values >= 0, not all zero, of any shape.

    Returns:
        The scaled values as float64, of the same shape.

    Raises:
        LwaError: if a value is negative or not finite, or all are zero.
    """
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
        raise LwaError(f"layer weights must be finite, >= 0 and not all zero, got {values.tolist()}")
    return values / values.mean()


def fisher_at_depths(fisher_scores: FisherResult | None, n_layers: int, name: str) -> np.ndarray:
    """Average the teacher's per-layer Fisher trace over n_layers equal slices of its depth.

    Slice s holds the teacher layers between the outputs that student layers s-1 and s are matched to. A layer that a
    border cuts counts with the share of it that lies inside the slice.

    Args:
        fisher_scores: Fisher information of the teacher.
        n_layers: number of slices, one per student layer.
        name: name of the strategy, for the error message.

    Returns:
        The mean trace of each slice, (n_layers,).

    Raises:
        LwaError: if there are no scores.
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

    def calculate_layer_weights(self, fisher_scores: FisherResult | None, n_layers: int) -> np.ndarray:
        """Return equal weights."""
        return np.ones(n_layers)


class Linear(LayerwiseDistillation):
    """w_s proportional to s."""

    name = "linear"

    def calculate_layer_weights(self, fisher_scores: FisherResult | None, n_layers: int) -> np.ndarray:
        """Return weights that rise linearly with depth."""
        return mean_one(np.arange(1, n_layers + 1))


class Exponential(LayerwiseDistillation):
    """w_s proportional to ratio^((s-1)/(S-1)): the last layer counts `ratio` times the first."""

    name = "exponential"

    def __init__(self, ratio: float = 10.0):
        self.ratio = ratio

    def calculate_layer_weights(self, fisher_scores: FisherResult | None, n_layers: int) -> np.ndarray:
        """Return weights that rise geometrically with depth."""
        return mean_one(np.geomspace(1.0, self.ratio, n_layers))


class Schedule(LayerwiseDistillation):
    """A fixed table of weights along the depth, 0.1, 0.2, … 1.0 by default, interpolated linearly."""

    name = "schedule"

    def __init__(self, values: tuple[float, ...] = tuple(np.linspace(0.1, 1.0, 10))):
        self.values = values

    def calculate_layer_weights(self, fisher_scores: FisherResult | None, n_layers: int) -> np.ndarray:
        """Return the table interpolated at equally spaced depths."""
        at = np.linspace(0, len(self.values) - 1, n_layers)
        return mean_one(np.interp(at, np.arange(len(self.values)), self.values))


class Fisher(LayerwiseDistillation):
    """w_s proportional to F_s, the mean Fisher trace of the teacher layers in slice s (see fisher_at_depths)."""

    name = "fisher"

    def calculate_layer_weights(self, fisher_scores: FisherResult | None, n_layers: int) -> np.ndarray:
        """Return weights proportional to the Fisher trace."""
        return mean_one(fisher_at_depths(fisher_scores, n_layers, self.name))


class FisherTimesDepth(LayerwiseDistillation):
    """w_s proportional to s F_s."""

    name = "fisher_x_depth"

    def calculate_layer_weights(self, fisher_scores: FisherResult | None, n_layers: int) -> np.ndarray:
        """Return weights proportional to depth times Fisher trace."""
        return mean_one(fisher_at_depths(fisher_scores, n_layers, self.name) * np.arange(1, n_layers + 1))


class SoftmaxFisher(LayerwiseDistillation):
    """w_s proportional to F_s^(1/temperature), a softmax of log F; a high temperature makes the weights more equal."""

    name = "softmax_fisher"

    def __init__(self, temperature: float = 2.0):
        self.temperature = temperature

    def calculate_layer_weights(self, fisher_scores: FisherResult | None, n_layers: int) -> np.ndarray:
        """Return the softmax of the log Fisher trace at the temperature, scaled to mean 1."""
        log_f = np.log(fisher_at_depths(fisher_scores, n_layers, self.name) + FLOOR)
        return mean_one(np.exp((log_f - log_f.max()) / self.temperature))


class FisherAhead(LayerwiseDistillation):
    """w_s proportional to the sum of F over slice s and all slices above it.

    Every later layer reads the state after slice s. An error in it therefore affects the information that those layers
    and the layers of slice s hold. The weights fall with depth, because the lower layers hold most of the trace. The
    last state counts least; the cross-entropy and the KL term depend on it already.
    """

    name = "fisher_ahead"

    def calculate_layer_weights(self, fisher_scores: FisherResult | None, n_layers: int) -> np.ndarray:
        """Return weights proportional to the Fisher trace summed from the last slice down."""
        return mean_one(np.cumsum(fisher_at_depths(fisher_scores, n_layers, self.name)[::-1])[::-1])


class InverseFisher(LayerwiseDistillation):
    """w_s proportional to 1 / F_s, a control that reverses the order of the Fisher weights."""

    name = "inverse_fisher"

    def calculate_layer_weights(self, fisher_scores: FisherResult | None, n_layers: int) -> np.ndarray:
        """Return weights proportional to the inverse of the Fisher trace."""
        return mean_one(1.0 / (fisher_at_depths(fisher_scores, n_layers, self.name) + FLOOR))


class ShuffledFisher(LayerwiseDistillation):
    """The Fisher weights in random order, a control: the same values, without a relation to the layers."""

    name = "shuffled_fisher"

    def __init__(self, seed: int = 0):
        self.seed = seed

    def calculate_layer_weights(self, fisher_scores: FisherResult | None, n_layers: int) -> np.ndarray:
        """Return the Fisher weights permuted at random by the seed."""
        weights = mean_one(fisher_at_depths(fisher_scores, n_layers, self.name))
        return np.random.default_rng(self.seed).permutation(weights)


NO_HIDDEN, LABELS = "none", "labels"  # no hidden-state term; no teacher at all


def layer_map(n_student: int, n_teacher: int) -> list[int]:
    """Return for each student layer s = 1 … S the teacher layer at the same relative depth, max(1, round(s L / S))."""
    return [max(1, round(layer * n_teacher / n_student)) for layer in range(1, n_student + 1)]


def matched_layers(n_layers: int, match: str) -> np.ndarray:
    """Return which of the student's layers are matched, (n_layers,) bool.

    Args:
        n_layers: number of layers of the student.
        match: "all"; "no_last" or "no_last_two": all but the last one or two; "last": only the last; "lower" or
            "upper": the half next to the input or the output; "middle": all but the first and the last quarter.

    Raises:
        LwaError: if `match` is unknown, or no layer is matched.
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
    """Return the layer weights, (n_layers,), or None for the strategies "none" and "labels".

    The weights have mean 1, and are 0 on layers that are not matched. The mean of weight times distance over all layers
    is therefore the weighted mean over the matched layers.

    Args:
        fisher: Fisher information of the teacher for the strategy, or the weights themselves, which are only scaled.
        strategy: a strategy or its name. It must be a known one even if the weights are given.
        n_layers: number of layers of the student.
        match: which layers are matched (see matched_layers).
        seed: of a strategy that draws its weights at random.

    Raises:
        LwaError: if the number of weights is not n_layers.
    """
    if isinstance(strategy, str) and strategy in (NO_HIDDEN, LABELS):
        return None
    chosen = strategy if isinstance(strategy, LayerwiseDistillation) else get_strategy(strategy, seed)
    if fisher is None or isinstance(fisher, FisherResult):
        fisher = chosen.calculate_layer_weights(fisher, n_layers)
    weights = mean_one(fisher)
    if weights.shape != (n_layers,):
        raise LwaError(
            f"{weights.size} layer weights for a student of {n_layers} layers: they must be as many, in one row, "
            f"not of shape {weights.shape}"
        )
    return mean_one(weights * matched_layers(n_layers, match))
