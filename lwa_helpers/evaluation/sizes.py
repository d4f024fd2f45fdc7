"""Whether the data and the teacher are large enough for the settings: known before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.baselines import BASELINES, EASE_LIMIT
from lwa_helpers.evaluation.metrics import KS
from lwa_helpers.evaluation.protocol import cases

if TYPE_CHECKING:
    from lwa_helpers.config import ExperimentConfig
    from lwa_helpers.data.interactions import Interactions

FEWEST_CASES = 5  # that an interval, or a ratio of two systems, can be computed from
FEWEST_LAYERS = 5  # that a rank correlation over layers can be computed from
ARMS = ("labels", "none", "uniform", "fisher")  # that notebook 03 compares


class Sizes(NamedTuple):
    """What there is of everything that the settings ask for a number of.

    Attributes:
        items: items in the catalogue.
        unseen: items that the test user who has seen most has not seen.
        layers: layers of the teacher.
        train_users: users with at least two items to train on.
        windows: training windows.
        valid_cases: validation cases.
        test_cases: test cases.
    """

    items: int
    unseen: int
    layers: int
    train_users: int
    windows: int
    valid_cases: int
    test_cases: int


def sizes_of(data: Interactions, layers: int, windows: int, every_target: bool) -> Sizes:
    """Count what a dataset has.

    Args:
        data: the dataset.
        layers: number of layers of the teacher.
        windows: number of training windows.
        every_target: as in `cases`.

    Returns:
        The sizes.

    Raises:
        LwaError: if the valid or the test part is empty.
    """
    test, valid = cases(data, "test", every_target), cases(data, "valid", every_target)
    unseen = len(data.items) - max(len({*history}) for history in test.histories)
    train_users = int((data.train.groupby("user_id").size() > 1).sum())
    return Sizes(len(data.items), unseen, layers, train_users, windows, len(valid.targets), len(test.targets))


def check_sizes(data: Interactions, layers: int, windows: int, config: ExperimentConfig) -> list[str]:
    """Compare what a dataset and a teacher have with what the settings ask for.

    Args:
        data: the dataset.
        layers: number of layers of the teacher.
        windows: number of training windows.
        config: the settings.

    Returns:
        A line for each number that is cut to what there is.

    Raises:
        LwaError: naming all settings that cannot be met, and the fix of each.
    """
    sizes = sizes_of(data, layers, windows, config.evaluation.every_target)
    if problems := refusals(sizes, config):
        raise LwaError(f"{data.name} and {config.teacher.model} do not fit the settings:\n  " + "\n  ".join(problems))
    return cuts(sizes, config)


def refusals(sizes: Sizes, config: ExperimentConfig) -> list[str]:
    """Return a line for each setting that cannot be met: what it asks for, what there is, and the fix."""
    asked = min(config.evaluation.users or sizes.test_cases, sizes.test_cases)
    lines = []
    if asked < FEWEST_CASES:
        lines.append(f"{asked} test cases: an interval needs {FEWEST_CASES}; use more users, or evaluation.users")
    if sizes.windows < 1 or sizes.train_users < 2:
        lines.append(
            f"{sizes.train_users} users have two or more items to train on: at least 2 are needed; lower data.k_core, "
            "or change data.split"
        )
    if sizes.unseen < 1:
        lines.append("a test user has seen the whole catalogue, so nothing can be ranked: use more items")
    return lines + _wrong_depths(sizes.layers, config) + _wrong_names(sizes.items, config)


def cuts(sizes: Sizes, config: ExperimentConfig) -> list[str]:
    """Return a line for each number that is larger than what there is, which the notebooks then take."""
    fisher, distillation, comparison = config.fisher, config.distillation, config.comparison
    asked = {
        "evaluation.users": (config.evaluation.users, sizes.test_cases, "test cases"),
        "distillation.valid_users": (distillation.valid_users, sizes.valid_cases, "validation cases"),
        "distillation.timing_users": (distillation.timing_users, sizes.test_cases, "test cases"),
        "comparison.n_users": (comparison.n_users, sizes.test_cases, "test cases"),
        "comparison.fisher_windows": (comparison.fisher_windows, sizes.train_users, "users to train on"),
        "fisher.n_examples": (fisher.n_examples, sizes.windows, "training windows"),
        "fisher.loo_users": (fisher.loo_users, sizes.test_cases, "test cases"),
    }
    lines = [
        f"{name} = {wanted} is cut to {there}: there are no more {what}"
        for name, (wanted, there, what) in asked.items()
        if wanted and wanted > there
    ]
    if max(KS) > sizes.unseen:
        longest = fitting_length(sizes.unseen)
        lines.append(
            f"lists of {max(KS)} recommendations are cut to {longest}: a user has only {sizes.unseen} to choose from"
        )
    if comparison.n_candidates > sizes.unseen:
        lines.append(f"comparison.n_candidates = {comparison.n_candidates}: lists are shorter, or users are left out")
    return lines + _left_out(sizes.layers, config)


def fitting_length(unseen: int, ks: Sequence[int] = KS) -> int:
    """Return the longest of the list lengths `ks` that `unseen` items can fill; the first of them if none is."""
    return max((k for k in ks if k <= unseen), default=ks[0])


def fitting_ks(n_items: int, histories: Sequence[Sequence[int]], ks: Sequence[int] = KS) -> list[int]:
    """Return the lengths of lists of recommendations that every user has enough unseen items for.

    Args:
        n_items: items in the catalogue.
        histories: the items that each user has seen.
        ks: lengths of lists, ascending.

    Returns:
        Those of `ks` that fit, at least the first.
    """
    longest = fitting_length(n_items - max(len({*history}) for history in histories), ks)
    return [k for k in ks if k <= longest]


def _left_out(layers: int, config: ExperimentConfig) -> list[str]:
    """Say what is left out because the teacher has so few layers."""
    first, deeper = config.teacher.first_layers, [depth for depth in config.distillation.frontier if depth >= layers]
    lines = [f"distillation.frontier: no student of {depth} layers, for the teacher has {layers}" for depth in deeper]
    if first >= layers:
        lines.append(f"teacher.first_layers = {first}: no first step of tuning, for the teacher has {layers} layers")
    if layers < FEWEST_LAYERS:
        lines.append(f"no correlation over layers (H2): the teacher has {layers}, and {FEWEST_LAYERS} are needed")
    return lines


def _wrong_depths(layers: int, config: ExperimentConfig) -> list[str]:
    """Name the students that are to have more layers than the teacher."""
    if layers < 2:
        return ["the teacher has 1 layer, so no student can have fewer: take a deeper teacher"]
    distillation, teacher = config.distillation, config.teacher
    depths = {"ablation.n_layers": max(config.ablation.depths), "distillation.n_layers": distillation.n_layers}
    depths["distillation.steps"] = max(distillation.steps, default=0)
    lines = [
        f"{name} = {depth}: the teacher has {layers} layers; --set {name}={max(1, layers // 2)}"
        for name, depth in depths.items()
        if depth > layers
    ]
    if teacher.co_teachers and not 0 < teacher.first_layers < layers:
        lines.append(f"teacher.co_teachers teach beside teacher.first_layers, which must be 1 to {layers - 1}")
    return lines


def _wrong_names(n_items: int, config: ExperimentConfig) -> list[str]:
    """Name the arms, seeds and baselines that a later notebook would stumble over."""
    named = {
        "evaluation.baselines": config.evaluation.baselines,
        "teacher.co_teachers": config.teacher.co_teachers,
        "distillation.co_teachers": config.distillation.co_teachers,
        "ablation.levels": config.ablation.co_teachers,
    }
    ablation = config.ablation
    lists: dict[str, Sequence[str | int | float]] = {**named, "ablation.levels": ablation.levels}
    lists |= {"ablation.seeds": config.ablation.seeds, "distillation.seeds": config.distillation.seeds}
    lines = [
        f"{name} names {value} {times} times: name it once"
        for name, values in lists.items()
        for value, times in Counter(values).items()
        if times > 1
    ]
    if ablation.factor == "strategy":
        lines += [f"ablation.levels lacks {arm}: add it" for arm in ARMS if arm not in ablation.levels]
    for name, values in named.items():
        lines += [f"{name}: no baseline {x!r}; there are {', '.join(BASELINES)}" for x in values if x not in BASELINES]
        if "ease" in values and n_items > EASE_LIMIT:
            lines.append(f"{name}: ease takes at most {EASE_LIMIT:,} items, and there are {n_items:,}; leave it out")
    return lines
