"""Data sets, readings and controls: runs of notebooks 02 and 04 side by side, as paper and README show them.

    lwa reproduce --only 01,02,04 --set data.name=Office_Products … && mv results/quick results/office2014
    python tests/benchmarks/across_data.py "NAME=RUN" ["NAME=RUN" …]

NAME: what the row is called, such as "Office 2014". RUN: a folder of results in which notebook 02 has finished, and 04
where students are to be shown. A name that begins with "control: " is left out of the sentence on all sets, and its
teacher is held against that of the first RUN, user by user. Writes paper/across_data_table.tex, paper/across_data.tex
(macros), paper/across_data.json (what made each row) and the README's block. What uncommitted changes made is refused.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd
from row_file import commit_of, interval_macros, refuse_dirty, short_commits, write, write_json

from lwa_helpers import paths
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.metrics import ndcg_at_k
from lwa_helpers.evaluation.statistics import mean_interval, paired_difference
from lwa_helpers.pipeline.readme import write_block
from lwa_helpers.report.tables import booktabs, format_number, results_tex

START, END = "<!-- sets: written by tests/benchmarks/across_data.py -->", "<!-- end of sets -->"
NOTEBOOKS = ("02_fisher_heatmaps", "04_distillation")
CONTROL = "control: "
COLUMNS = {  # of a row: the number of a notebook, how it is printed, its heading
    "esasrec": ("EsasrecNdcg", "{:.4f}", "eSASRec"),
    "teacher": ("TeacherNdcg", "{:.4f}", "Teacher"),
    "to_sasrec": ("TeacherMinusSasrec", "{:+.4f}", "to SASRec"),
    "to_first": (None, "{:+.4f}", "to the first teacher"),
    "student": ("StudentNdcg", "{:.4f}", "Student"),
    "kept": ("StudentKept", "{:.0f}", "Kept (%)"),
    "of_teacher": ("StudentKeptOfTeacher", "{:.0f}", "Of teacher (%)"),
    "student_to_sasrec": ("StudentMinusSasrec", "{:+.4f}", "to SASRec "),
    "co_taught": ("CoTaughtNdcg", "{:.4f}", "Co-taught"),
    "ensemble": ("EnsembleNdcg", "{:.4f}", "Ensemble"),
}  # fmt: skip


def manifests(run: Path) -> list[dict]:
    """What the notebooks wrote down, 02 first. Raises LwaError where notebook 02 has not finished in this folder."""
    files = [run / "manifests" / f"{name}.json" for name in NOTEBOOKS]
    if not files[0].exists():
        raise LwaError(f"{files[0]} does not exist: RUN is a folder of results that notebook 02 has finished in")
    made = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    for each in made:
        del each["settings"]["data"]["root"]  # where the data lay on that machine
        each["records"]["overrides"].pop("data.root", None)
    return made


def row(name: str, run: Path, made: list[dict]) -> dict:
    """A run as a row of the table."""
    numbers = {key: value["value"] for each in made for key, value in each["numbers"].items()}
    ranks = pd.read_parquet(run / "data" / "teacher_ranks.parquet")
    sasrec = mean_interval(ndcg_at_k(ranks["sasrec"].to_numpy(), 10), seed=made[0]["seed"])
    found = {"commit": commit_of(*made), "name": name, "users": len(ranks)}
    found["reading"] = made[0]["settings"]["data"]["reading"]
    found["settings"] = (
        " ".join(f"{key}={value}" for key, value in made[0]["records"]["overrides"].items()) or "as they are"
    )
    found["tokens"] = numbers["TeacherTrainTokens"]
    best = f"{numbers['BestBaselineName']} {numbers['BestBaselineNdcg']:.4f}" if "BestBaselineName" in numbers else "--"
    found |= {"sasrec": sasrec.estimate, "best": best}
    for column, (number, _, _) in COLUMNS.items():
        for end in ("", "Low", "High"):
            if number and f"{number}{end}" in numbers:
                found[column + ("_" + end.lower() if end else "")] = numbers[f"{number}{end}"]
    return found


def against_first(run: Path, first: Path) -> dict:
    """How a run's teacher differs from the first run's, paired by user. Raises LwaError where the users are others."""
    own, reference = (pd.read_parquet(folder / "data" / "teacher_ranks.parquet") for folder in (run, first))
    if not own.user_id.equals(reference.user_id):
        raise LwaError(
            f"{run} and {first} ranked for different users: a control has the data and settings of the first RUN"
        )
    difference = paired_difference(
        ndcg_at_k(own.teacher.to_numpy(), 10), ndcg_at_k(reference.teacher.to_numpy(), 10), seed=0
    )
    return dict(zip(("to_first", "to_first_low", "to_first_high"), difference))


def control_macros(frame: pd.DataFrame) -> dict[str, str]:
    """ControlRandomWeights and the like: a control's teacher minus the first one, with its interval."""
    macros = {}
    for _, one in frame[frame["name"].str.startswith(CONTROL)].iterrows():
        name = "Control" + "".join(word.title() for word in one["name"].removeprefix(CONTROL).split())
        macros |= interval_macros(name, one[["to_first", "to_first_low", "to_first_high"]], "{:+.3f}")
    return macros


def latex(frame: pd.DataFrame) -> str:
    """The table for the paper."""
    shown = {column: what for column, what in COLUMNS.items() if column in frame}
    kept = [
        "name",
        "reading",
        "sasrec",
        "best",
        *(c for c in frame if c.removesuffix("_low").removesuffix("_high") in shown),
    ]
    headers = {column: heading for column, (_, _, heading) in shown.items()}
    headers |= {"name": "Data", "reading": "Reading", "sasrec": "SASRec", "best": "Best baseline"}
    forms = {column: form for column, (_, form, _) in shown.items()} | {"sasrec": "{:.4f}"}
    return booktabs(frame[kept], forms, headers=headers)


def cell(one: pd.Series, column: str) -> str:
    """An estimate with its interval, as Markdown; a dash where the run did not measure it."""
    if column not in one or pd.isna(one[column]):
        return "–"
    form = COLUMNS[column][1]
    text = form.format(one[column])
    if f"{column}_low" in one:
        text += f" [{form.format(one[f'{column}_low'])}, {form.format(one[f'{column}_high'])}]"
    return text.replace("-0", "−0")


def markdown(frame: pd.DataFrame, devices: list[str]) -> str:
    """The table for the README, and what made it."""
    measured = [heading.strip() for _, _, heading in COLUMNS.values()]
    heads = ["data", "reading", "users", "SASRec", "best baseline", *measured, "settings"]
    lines = [
        f"NDCG@10, all items ranked, seen ones left out; {', '.join(devices)}; commits {short_commits(frame.commit)}.",
        "",
        f"| {' | '.join(heads)} |", "|" + "---|" * len(heads),
    ]  # fmt: skip
    for _, one in frame.iterrows():
        cells = [
            one["name"],
            one.reading,
            f"{one.users:,}",
            f"{one.sasrec:.4f}",
            one.best,
            *(cell(one, column) for column in COLUMNS),
        ]
        lines.append(f"| {' | '.join(cells)} | {one.settings} |")
    return "\n".join(lines)


def sentence(frame: pd.DataFrame) -> str:
    """What eight layers keep on each set, for the abstract."""
    parts = []
    for _, one in frame[~frame["name"].str.startswith(CONTROL)].dropna(subset="kept").iloc[1:].iterrows():
        kept = f"{one.kept:.0f}\\,\\% [{one.kept_low:.0f}, {one.kept_high:.0f}]"
        to_sasrec = format_number(one.student_to_sasrec, "{:+.4f}")
        parts.append(
            f"on {one['name']} it keeps {kept} and differs from SASRec by {to_sasrec}, "
            f"where the best baseline is {one.best}"
        )
    text = "; ".join(parts) or "other sets have not been run"
    return f"{text[0].upper()}{text[1:]}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    named = [text.partition("=")[::2] for text in parser.parse_args().runs]
    made = {name: manifests(Path(run)) for name, run in named}
    first = Path(named[0][1])
    frame = pd.DataFrame(
        [
            row(name, Path(run), made[name]) | (against_first(Path(run), first) if name.startswith(CONTROL) else {})
            for name, run in named
        ]
    )
    refuse_dirty(frame, "name", paths.RESULTS)
    write(paths.PAPER / "across_data_table.tex", latex(frame))
    header = "Generated by tests/benchmarks/across_data.py; do not edit."
    write(
        paths.PAPER / "across_data.tex", results_tex({"SetsSentence": sentence(frame), **control_macros(frame)}, header)
    )
    write_json(paths.PAPER / "across_data.json", {"runs": made})
    devices = sorted({each["device"] for group in made.values() for each in group})
    write_block(paths.ROOT / "README.md", START, END, markdown(frame, devices))
    print(frame.round(4).to_string(index=False))


if __name__ == "__main__":
    main()
