"""Run the numbered notebooks in order, each only if it is stale, and sum up what they found."""

from __future__ import annotations

import errno
import fcntl
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lwa_helpers import files, paths
from lwa_helpers.config import ExperimentConfig, load_config
from lwa_helpers.errors import LwaError
from lwa_helpers.pipeline import code_digest, manifest, publish, time_estimate
from lwa_helpers.pipeline.notebook import Progress, clock, execute
from lwa_helpers.pipeline.staleness import Stage, components, load_state, save_state, stages, why_stale

NEEDED_BYTES = 2 * 1024**3
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL}  # of a file system without locks


def reproduce(
    profile: str,
    overrides: dict[str, Any] | None = None,
    only: str | None = None,
    force: bool = False,
    publish_too: bool = False,
) -> None:
    """Bring a profile's results up to date: run each stale notebook, merge the numbers, print a summary, publish.

    Raises LwaError on bad settings or notebooks before anything runs, when a notebook fails, and when the system does
    not let results be written.
    """
    config = load_config(profile, overrides)
    chosen = stages(only)
    for stage in stages():
        code_digest.notebook_tree(stage.path)
    results = paths.results_dir(profile)
    with files.explained(results):
        whole = _run(config, overrides or {}, chosen, results, force)
        if whole and (publish_too or (profile == publish.paper_profile() and not overrides)):
            publish.publish(profile)


def _run(config: ExperimentConfig, overrides: dict[str, Any], chosen: list[Stage], results: Path, force: bool) -> bool:
    """Run the chosen stages that are stale, and sum up if all stages have been run. Return whether they have."""
    _check_disk(results)
    start = time.monotonic()
    with _lock(results):
        expected = _expected(config.profile, results)
        for stage in chosen:
            _bring_up_to_date(stage, config, overrides, results, force, start, expected)
        missing = [stage.name for stage in stages() if manifest.load(results, stage.name) is None]
        if missing:
            print(f"not summed up: {', '.join(missing)} {'has' if len(missing) == 1 else 'have'} not been run yet")
            return False
        publish.merge(results, [stage.name for stage in stages()])
    print(summary(results, config, time.monotonic() - start))
    return True


def _bring_up_to_date(
    stage: Stage,
    config: ExperimentConfig,
    overrides: dict[str, Any],
    results: Path,
    force: bool,
    start: float,
    expected: dict[str, float],
) -> None:
    """Run one stage if it is stale, or skip it; one line says which and why.

    Args:
        stage: the notebook.
        config: its settings.
        overrides: those of them that differ from the profile's.
        results: the profile's folder.
        force: run it even if it is current.
        start: when the whole run began, on the monotonic clock.
        expected: seconds that each stage takes, as far as known.

    Raises:
        LwaError: when the notebook ran through and saved nothing.
    """
    every = stages()
    label = f"[{every.index(stage) + 1}/{len(every)}] {stage.name}"
    reason = why_stale(stage, config, results) or ("--force" if force else None)
    if reason is None:
        print("\n".join([f"{label} is current", *_warnings([manifest.load_named(results, stage.name)])]), flush=True)
        return
    print(f"{label} runs: {reason}", flush=True)
    before, began = components(stage, config), time.time()
    later = [expected.get(other.name) for other in every if other.name > stage.name]
    remaining = None if None in later else sum(seconds for seconds in later if seconds)
    with Progress(label, start, expected.get(stage.name), remaining) as progress:
        parameters = {"profile": config.profile, "overrides": overrides}
        execute(stage.path, results / "notebooks" / stage.path.name, parameters, progress)
    record = manifest.load(results, stage.name)
    if record is None or record["started"] < began:
        raise LwaError(f"{stage.path.name} ran through but saved no results: it must end with run.finish()")
    seconds = time.time() - began
    save_state(results, stage, before, seconds)
    print("\n".join([f"{label} done in {clock(seconds)}", *_warnings([record])]), flush=True)


def _expected(profile: str, results: Path) -> dict[str, float]:
    """What each stage took when it last ran here or, if one of them never did, what the published run lets expect."""
    states = {stage.name: load_state(results, stage) for stage in stages()}
    here = {name: state["seconds"] for name, state in states.items() if state}
    return here if len(here) == len(states) else time_estimate.expected_seconds(paths.PAPER, profile) | here


def summary(results: Path, config: ExperimentConfig, spent: float) -> str:
    """What was found, in how much time, and where everything lies."""
    records = manifest.load_all(results)
    lines = ["", "Hypotheses"]
    for key, found in sorted((key, found) for record in records for key, found in record["verdicts"].items()):
        lines.append(f"  {key} {found['outcome']}: {found['sentence']} [figures/{found['figure']}.pdf]")
    lines += ["Wall time of each notebook's last run", *_times(results, config, spent)]
    names = [name for record in records for name in record["outputs"]]
    figures = sum(name.startswith("figures/") and name.endswith(".pdf") for name in names)
    tables = sum(name.startswith("tables/") for name in names)
    numbers = sum(len(record["numbers"]) for record in records)
    lines += [
        f"Results in {results}",
        f"  figures/ {figures} figures, tables/ {tables} tables, results.tex {numbers} numbers,",
        "  notebooks/ executed copies, manifest.json what made each result",
    ]
    return "\n".join([*lines, *_warnings(records)])


def _warnings(records: list[dict[str, Any]]) -> list[str]:
    """What the notebooks warned of, a line each."""
    return [f"warning: {text}" for record in records for text in record.get("warnings", [])]


def _times(results: Path, config: ExperimentConfig, spent: float) -> list[str]:
    """Each notebook's wall time, and the total against the profile's target."""
    seconds = {stage.name: state["seconds"] for stage in stages() if (state := load_state(results, stage))}
    total = sum(seconds.values())
    word = "within" if total <= 60 * config.target_minutes else "over"
    target = f"{word} the {config.target_minutes:g} min meant for `{config.profile}` (this call: {clock(spent)})"
    lines = [f"  {name:28} {clock(value)}" for name, value in seconds.items()]
    return [*lines, f"  {'all':28} {clock(total)}, {target}"]


def _check_disk(results: Path) -> None:
    """Raise LwaError unless there is room for a run."""
    place = next(parent for parent in (results, *results.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < NEEDED_BYTES:
        raise LwaError(
            f"only {free / 1024**3:.1f} GiB are free on the disk of {place}, and a run needs "
            f"{NEEDED_BYTES / 1024**3:.0f} GiB: make room (an old results/<profile>/ can go) and start again"
        )


@contextmanager
def _lock(results: Path) -> Iterator[None]:
    """Let one run at a time write a profile's results; the lock goes with its process, however that ends."""
    with files.explained(results):
        results.mkdir(parents=True, exist_ok=True)
        file = open(results / ".lock", "w", encoding="utf-8")  # noqa: SIM115 - closed below, by the other `with`
    with file:
        with files.explained(results):
            _take(file, results)
        yield


def _take(file: IO[str], results: Path) -> None:
    """Take the lock that a file stands for. Raises LwaError where another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LwaError(f"another run is writing {results}: wait for it, or end it") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warnings.warn(
            f"the file system of {results} has no locks ({error.strerror}), so nothing keeps a second run out: "
            "start only one at a time",
            stacklevel=1,
        )
