"""H1 and H2 for other teachers, or one that was tuned otherwise: runs of notebook 02 side by side.

    lwa reproduce --only 01,02 --set data.reading=titles --set teacher.model=gemma3-270m
    mv results/quick results/gemma
    python tests/benchmarks/other_teachers.py RUN [RUN …]

RUN: a folder of results that notebook 02 has finished in, such as results/gemma. Writes paper/other_teachers_table.tex,
paper/other_teachers.tex (a macro per number), paper/other_teachers.json (what made each row) and the README's block of
them. What uncommitted changes made is refused.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd
from row_file import commit_of, refuse_dirty, short_commits, write, write_json

from lwa_helpers import paths
from lwa_helpers.errors import LwaError
from lwa_helpers.pipeline.readme import write_block
from lwa_helpers.report.style import look
from lwa_helpers.report.tables import booktabs, format_number, results_tex

START, END = "<!-- teachers: written by tests/benchmarks/other_teachers.py -->", "<!-- end of teachers -->"
DATA = {"movielens": "MovieLens-100K"}
COLUMNS = {  # of a row: the number of notebook 02, how it is printed, its heading
    "tokens": ("TeacherTrainTokens", "{:,.0f}", "Tokens"), "ndcg": ("TeacherNdcg", "{:.3f}", "NDCG@10"),
    "before": ("FisherBeforeUpperShare", "{:.0f}", "Before (%)"), "after": ("FisherUpperShare", "{:.0f}", "After (%)"),
    "ratio": ("FisherUpperLowerRatio", "{:.2f}", "Upper / lower"), "h1": None,
    "loo": ("FisherLooSpearman", "{:.2f}", "Fisher"),
    "block": ("BlockInfluenceLooSpearman", "{:.2f}", "Block influence"),
    "depth": ("DepthLooSpearman", "{:.2f}", "Depth"), "h2": None,
}  # fmt: skip
OUTCOMES = ("supported", "refuted", "undecided")
WORDS = {"h1": "HOne", "h2": "HTwo"}
RANGES = {"before": "Before", "after": "After", "loo": "Fisher", "block": "Block"}


def manifest(run: Path) -> dict:
    """What notebook 02 wrote down. Raises LwaError where it has not finished in this folder."""
    file = run / "manifests" / "02_fisher_heatmaps.json"
    if not file.exists():
        raise LwaError(f"{file} does not exist: RUN is a folder of results that notebook 02 has finished in")
    made = json.loads(file.read_text(encoding="utf-8"))
    del made["settings"]["data"]["root"]  # where the data lay on that machine
    made["records"]["overrides"].pop("data.root", None)
    return made


def row(made: dict) -> dict:
    """A run as a row of the table."""
    numbers, settings = made["numbers"], made["settings"]
    found = {"commit": commit_of(made), "Teacher": look(settings["teacher"]["model"]).label}
    found["settings"] = (
        " ".join(f"{key}={value}" for key, value in made["records"]["overrides"].items()) or "as they are"
    )
    found["Data"] = DATA.get(name := settings["data"]["name"], name.replace("_", " "))
    for column, shown in COLUMNS.items():
        if not shown:
            found[column] = made["verdicts"][column.upper()]["outcome"]
            continue
        for end in ("", "Low", "High"):
            if f"{shown[0]}{end}" in numbers:
                found[column + ("_" + end.lower() if end else "")] = numbers[f"{shown[0]}{end}"]["value"]
    return found


def latex(frame: pd.DataFrame) -> str:
    """The table for the paper."""
    shown = {column: what for column, what in COLUMNS.items() if what}
    frame = frame.drop(columns=["commit", "settings", "ndcg_low", "ndcg_high"])
    headers = {column: heading for column, (_, _, heading) in shown.items()} | {"h1": "H1", "h2": "H2"}
    return booktabs(frame, {column: form for column, (_, form, _) in shown.items()}, headers=headers)


def markdown(frame: pd.DataFrame, devices: list[str]) -> str:
    """The table for the README, and what made it."""
    lines = [
        f"One seed each, {', '.join(devices)}; commits {short_commits(frame.commit)}.", "",
        "| teacher | data | tuned on | settings | H1: upper / lower layers "
        "| H2: correlation with leave-one-layer-out loss |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for _, one in frame.iterrows():
        ratio = f"{one.h1}: {one.ratio:.2f} [{one.ratio_low:.2f}, {one.ratio_high:.2f}]"
        loo = f"{one.h2}: {one.loo:.2f} [{one.loo_low:.2f}, {one.loo_high:.2f}], block influence {one.block:.2f}"
        settings = f"| {one.Teacher} | {one.Data} | {one.tokens:,.0f} tokens | {one.settings} |"
        lines.append(settings + f" {ratio} | {loo} |".replace("-0.", "−0."))
    return "\n".join(lines)


def numbers(frame: pd.DataFrame) -> dict[str, str]:
    """Macros: how many teachers there are, how often each hypothesis came out how, a column's least and most."""
    found = {"OtherTeachers": str(len(frame))}
    for column, word in RANGES.items():
        form = COLUMNS[column][1]
        found |= {
            f"Other{word}Least": format_number(frame[column].min(), form),
            f"Other{word}Most": format_number(frame[column].max(), form),
        }
    for column, word in WORDS.items():
        found |= {f"Other{word}{outcome.title()}": str((frame[column] == outcome).sum()) for outcome in OUTCOMES}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    made = [manifest(run) for run in parser.parse_args().runs]
    frame = pd.DataFrame([row(each) for each in made])
    refuse_dirty(frame, "Teacher", paths.RESULTS)
    write(paths.PAPER / "other_teachers_table.tex", latex(frame))
    header = "Generated by tests/benchmarks/other_teachers.py; do not edit."
    write(paths.PAPER / "other_teachers.tex", results_tex(numbers(frame), header))
    write_json(paths.PAPER / "other_teachers.json", {"runs": made})
    write_block(paths.ROOT / "README.md", START, END, markdown(frame, sorted({each["device"] for each in made})))
    print(frame.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
