"""What a study will run, why, and for about how long."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lwa_helpers import paths
from lwa_helpers.pipeline import time_estimate
from lwa_helpers.pipeline.sharing import find_donor, key_of
from lwa_helpers.pipeline.staleness import Stage, load_state, why_stale
from lwa_helpers.pipeline.study import Unit


def expected_seconds(units: Sequence[Unit]) -> dict[str, float]:
    """Return the seconds that each notebook is expected to take.

    They are the longest that it took in a point of the study or, if it has run in none, what the published run of the
    profile lets expect on this machine.
    """
    expected = time_estimate.expected_seconds(paths.PAPER, units[0].config.profile)
    for unit in units:
        for stage in unit.stages:
            state = load_state(unit.folder, stage)
            if state and state["seconds"]:
                expected[stage.name] = max(state["seconds"], expected.get(stage.name, 0.0))
    return expected


def plan(units: Sequence[Unit], workers: int) -> list[str]:
    """Say of each run which of its notebooks are current, shared or stale and why, and how long all will take.

    Args:
        units: The runs.
        workers: How many run at a time.

    Returns:
        The lines.
    """
    expected, planned = expected_seconds(units), dict[str, str]()
    lines, seconds, unknown = [], 0.0, set[str]()
    for unit in units:
        lines.append(unit.name)
        for stage in unit.stages:
            word = _state(unit, stage, planned)
            lines.append(f"  {stage.name:28} {word}")
            if word.startswith("runs"):
                seconds += expected.get(stage.name, 0.0)
                unknown |= {stage.name} - expected.keys()
    return [*lines, _total(seconds / workers, unknown)]


def _state(unit: Unit, stage: Stage, planned: dict[str, str]) -> str:
    """Return "current", "shared with …" or "runs: …"; a notebook that an earlier run of the plan computes is shared."""
    reason = why_stale(stage, unit.config, unit.folder)
    if reason is None:
        return "current"
    donor = find_donor(stage, unit.config, unit.folder)
    if donor is not None:
        return f"shared with {donor.relative_to(paths.RESULTS)}"
    key = key_of(stage, unit.config, unit.stages)
    first = planned.setdefault(key, unit.name)
    return f"runs: {reason}" if first == unit.name else f"shared with {first}, which runs it"


def _total(seconds: float, unknown: Iterable[str]) -> str:
    names = ", ".join(sorted(unknown))
    rest = f", and {names}, which has not run here yet" if names else ""
    return f"about {seconds / 3600:.1f} hours{rest}"
