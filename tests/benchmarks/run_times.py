"""How long whole runs took, by notebook and by the processor's instructions, for the README.

    lwa reproduce && mv results/quick results/quick-bf16
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 lwa reproduce
    python tests/benchmarks/run_times.py results/smoke results/quick-bf16 results/quick

RUN: a folder of results in which the five notebooks have finished, with nothing beside them. The three variables keep
torch and its libraries from every instruction beyond AVX2, as on an older processor; the manifests say so. What
uncommitted changes made is refused.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd
from row_file import commit_of, refuse_dirty, short_commits, write_json

from lwa_helpers import paths
from lwa_helpers.errors import LwaError
from lwa_helpers.pipeline.readme import write_block

START, END = "<!-- times: written by tests/benchmarks/run_times.py -->", "<!-- end of times -->"


def wall_seconds(run: Path, notebook: str) -> float:
    """What a notebook took in all, the start of its Python included, which its own manifest cannot know."""
    return json.loads((run / "state" / f"{notebook}.json").read_text(encoding="utf-8"))["seconds"]


def row(run: Path) -> dict:
    """The minutes of a run's notebooks and what it computed with. Raises LwaError where there is no manifest."""
    files = sorted((run / "manifests").glob("0[1-5]_*.json"))
    if not files:
        raise LwaError(f"{run} has no manifests of notebooks: RUN is a folder of results, such as results/quick")
    made = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    tuned = next(each for each in made if each["notebook"].startswith("02"))
    minutes = {each["notebook"]: wall_seconds(run, each["notebook"]) / 60 for each in made}
    return {
        "run": run.name, "commit": commit_of(*made), "profile": tuned["profile"], "seed": tuned["seed"],
        "device": tuned["device"], "instructions": tuned["instructions"], "bf16": tuned["has_bf16"],
        "speed": tuned["speed"],
        **minutes, "total": sum(minutes.values()),
    }  # fmt: skip


def markdown(frame: pd.DataFrame) -> str:
    """The table for the README, and what made it."""
    notebooks = [name for name in frame if name[:2].isdigit()]
    heads = ["profile", "computes in", "instructions", *(name[:2] for name in notebooks), "minutes", "GFLOP/s"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for _, one in frame.iterrows():
        minutes = [f"{one[name]:.1f}" for name in (*notebooks, "total")]
        cells = [one.profile, "bfloat16" if one.bf16 else "float32", one.instructions, *minutes, f"{one.speed:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    devices, commits = "; ".join(sorted(set(frame.device))), short_commits(frame.commit)
    measured = (
        "Minutes of each notebook, the start of its Python included, nothing beside it, on a machine that is set up"
    )
    lines += ["", f"{measured}; {devices}; commits {commits}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    frame = pd.DataFrame([row(run) for run in parser.parse_args().runs])
    refuse_dirty(frame, "run", paths.RESULTS)
    write_json(paths.PAPER / "run_times.json", {"runs": frame.to_dict("records")})
    write_block(paths.ROOT / "README.md", START, END, markdown(frame))
    print(frame.round(1).to_string(index=False))


if __name__ == "__main__":
    main()
