"""The finished rows of literature.py, as the paper and the README show them.

    python tests/benchmarks/literature_table.py [RUN …]

Reads results/benchmarks/literature/<run>.csv, .json and the ranks beside them, by default for both runs of
literature.py, and writes paper/literature_table.tex, paper/literature.tex (a macro per number), paper/literature.json
(what made each row) and the README's block of them. Rows of uncommitted changes are refused.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import pandas as pd
from literature import BASELINES, RUNS, STUDENTS
from row_file import interval_macros, refuse_dirty, short_commits, write, write_json

from lwa_helpers import paths
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.metrics import ndcg_at_k
from lwa_helpers.evaluation.statistics import mean_interval, paired_difference, ratio_of_means
from lwa_helpers.pipeline.readme import write_block
from lwa_helpers.report.style import look
from lwa_helpers.report.tables import booktabs, format_number, results_tex

START, END = "<!-- literature: written by tests/benchmarks/literature_table.py -->", "<!-- end of literature -->"
WORDS = {"office2014": "OfficeFourteen", "office2018": "OfficeEighteen"}  # macro names have no digits
LABELS = {
    "student": "Student of the teacher", "student_of_sasrec": "Student of SASRec", "fused": "Student of all three",
    "fused_teacher": "Teacher, taught by all three", "student_of_fused": "Student of that teacher",
    "ensemble": "Teacher, SASRec, EASE asked together",
}  # fmt: skip
RATIOS = {
    "StudentKept": ("student", "teacher"), "FusedKept": ("fused", "fused_teacher"),
    "FusedKeptOfTuned": ("fused", "teacher"), "TeacherTimesSasrec": ("teacher", "sasrec"),
    "StudentTimesSasrec": ("student", "sasrec"), "FusedTimesSasrec": ("fused", "sasrec"),
    "FusedTimesStudent": ("fused", "student"), "FusedTeacherTimesSasrec": ("fused_teacher", "sasrec"),
}  # fmt: skip


class Rows:
    """The finished systems of one run: NDCG@10 of every case, seen items left out, and what made each row."""

    def __init__(self, run: str):
        self.folder = paths.RESULTS / "benchmarks" / "literature" / run
        if not self.folder.with_suffix(".csv").exists():
            raise LwaError(f"{self.folder}.csv does not exist: run literature.py --run {run} first")
        rows = pd.read_csv(self.folder.with_suffix(".csv"), dtype={"commit": str})
        self.tested = rows[rows["part"] == "test"].set_index("system")
        refuse_dirty(self.tested.reset_index(), "system", self.folder.with_suffix(".csv"))
        self.ndcg = {name: ndcg_at_k(np.load(self.folder / f"{name}.npy"), 10) for name in self.tested.index}
        self.manifest = json.loads(self.folder.with_suffix(".json").read_text(encoding="utf-8"))
        del self.manifest["settings"]["data"]["root"]  # where the data lay on that machine

    def records(self) -> list[dict]:
        """The rows, as JSON can hold them."""
        return json.loads(self.tested.reset_index().to_json(orient="records"))

    def numbers(self, word: str) -> dict[str, str]:
        """Macros: each system's NDCG@10, and ratios of two systems in per cent or times, with intervals."""
        found = {
            f"{word}{name.title().replace('_', '')}Ndcg": format_number(v.mean(), "{:.4f}")
            for name, v in self.ndcg.items()
        }
        found[f"{word}Cases"] = format_number(int(self.tested["cases"].iloc[0]), "{:,}")
        for name, (one, other) in RATIOS.items():
            if one in self.ndcg and other in self.ndcg:
                kept = "Kept" in name
                ratio = ratio_of_means(self.ndcg[one], self.ndcg[other], seed=0)
                found |= interval_macros(
                    word + name, (100 * v if kept else v for v in ratio), "{:.0f}" if kept else "{:.2f}"
                )
        return found

    def columns(self, name: str, run: str) -> dict[str, float]:
        """A system's NDCG@10 and its difference to SASRec, with intervals; nothing where it was not run."""
        if name not in self.ndcg:
            return {}
        parts = {run: mean_interval(self.ndcg[name], seed=0)}
        if name != "sasrec":
            parts[f"{run}_difference"] = paired_difference(self.ndcg[name], self.ndcg["sasrec"], seed=0)
        return {f"{key}{end}": value for key, i in parts.items() for end, value in zip(("", "_low", "_high"), i)}


def table(found: dict[str, Rows]) -> pd.DataFrame:
    """A row per system that was run, baselines first; columns for each run."""
    rows, there = [], {name for part in found.values() for name in part.ndcg}
    n_layers = next(iter(found.values())).manifest["settings"]["distillation"]["n_layers"]
    for name in (name for name in (*BASELINES, "teacher", *STUDENTS, "ensemble") if name in there):
        layers = "all" if name in ("teacher", "fused_teacher") else str(n_layers) if name in STUDENTS else "--"
        row = {"System": LABELS.get(name, look(name).label), "Layers": layers}
        rows.append(row | {key: value for run, part in found.items() for key, value in part.columns(name, run).items()})
    return pd.DataFrame(rows)


def latex(frame: pd.DataFrame, found: dict[str, Rows]) -> str:
    """The table for the paper."""
    formats = {key: spec for run in found for key, spec in ((run, "{:.4f}"), (f"{run}_difference", "{:+.4f}"))}
    headers = {
        key: name
        for run in found
        for key, name in ((run, f"NDCG@10, {run[-4:]}"), (f"{run}_difference", "minus SASRec"))
    }
    return booktabs(frame, formats, best=dict.fromkeys(found, "max"), headers=headers)


def markdown(frame: pd.DataFrame, found: dict[str, Rows]) -> str:
    """The table for the README, and what made it."""
    sides = " | ".join(f"{run[-4:]} ({rows.tested['cases'].iloc[0]:,} targets)" for run, rows in found.items())
    lines = [f"| system | layers | {sides} |", "|---|---|" + "---|" * len(found)]
    for _, row in frame.iterrows():
        means = [row[[run, f"{run}_low", f"{run}_high"]] for run in found]
        cells = ["" if pd.isna(mean.iloc[0]) else "{:.4f} [{:.4f}, {:.4f}]".format(*mean) for mean in means]
        lines.append(f"| {row['System']} | {row['Layers']} | {' | '.join(cells)} |")
    commits = short_commits(commit for rows in found.values() for commit in rows.tested["commit"])
    devices = sorted({rows.manifest["device"] for rows in found.values()})
    made = f"NDCG@10, all items ranked, seen ones left out, one seed, {', '.join(devices)}; commits {commits}."
    return "\n".join([made, "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", default=list(RUNS), help=f"of {', '.join(RUNS)}")
    found = {run: Rows(run) for run in parser.parse_args().runs}
    frame, numbers = table(found), {}
    for run, rows in found.items():
        numbers |= rows.numbers(WORDS[run])
    made = {run: rows.manifest | {"rows": rows.records()} for run, rows in found.items()}
    write(paths.PAPER / "literature_table.tex", latex(frame, found))
    write(
        paths.PAPER / "literature.tex",
        results_tex(numbers, "Generated by tests/benchmarks/literature_table.py; do not edit."),
    )
    write_json(paths.PAPER / "literature.json", made)
    write_block(paths.ROOT / "README.md", START, END, markdown(frame, found))
    print(frame.round(4).to_string(index=False))


if __name__ == "__main__":
    main()
