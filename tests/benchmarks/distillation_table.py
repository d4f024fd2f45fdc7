"""The finished rows of distillation_ablation.py, as the paper shows them.

    python tests/benchmarks/distillation_table.py FOLDER

FOLDER holds the ranks of one teacher under one set of settings,
results/benchmarks/distillation_ablation/<teacher>-<settings>/test. Writes paper/distillation_<experiment>.tex for the
arms, the selections, the matched layers, the teachers and the depths that have rows, paper/distillation.tex (a macro
per number), paper/distillation.json (what made each row) and the README's block of answers. Rows of uncommitted changes
are refused.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
from distillation_ablation import Rows, against, measured
from row_file import interval_macros, refuse_dirty, short_commits, write, write_json

from lwa_helpers import paths
from lwa_helpers.distillation.weighting import LABELS, NO_HIDDEN
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.hypotheses import h3_growing_weights
from lwa_helpers.evaluation.statistics import difference_of_arms, mean_interval, ratio_of_means, spearman
from lwa_helpers.pipeline.readme import write_block
from lwa_helpers.report.style import LOOKS, look
from lwa_helpers.report.tables import booktabs, escape, format_number, results_tex

WEIGHTED_BY = "uniform"  # what each weighting is held against
SHOWN = {  # an experiment's reference arms, each a column of differences, and what heads its first column
    "arms": ((NO_HIDDEN, WEIGHTED_BY), "Arm"), "selection": (("first",), "Layers kept"),
    "match": (("all",), "Matched"), "fusion": (("teacher alone",), "Taught by"),
    "languages": (("teacher alone",), "Taught by"), "frontier": ((), "Depth"),
}  # fmt: skip
START, END = "<!-- ablation: written by tests/benchmarks/distillation_table.py -->", "<!-- end of ablation -->"
QUESTIONS = {  # of the README: what is asked, what is held against what, and the macros of the difference
    "What is the teacher worth?": ("its outputs − labels alone", "TeacherMinusLabels"),
    "Does a hidden-state term pay?": ("uniform weights − no such term", "HiddenMinusNone"),
    "Do weights that grow with depth pay (H3)?": ("three of them, pooled − uniform", "DepthMinusUniform"),
    "Do Fisher weights?": ("Fisher − uniform", "FisherMinusUniform"),
    "Does their order say anything?": ("Fisher − the same, shuffled", "FisherMinusShuffled"),
    "Does it matter which layers are kept?": ("the first − the last", "FirstMinusLast"),
    "Are the first ones a good choice?": ("the first − random ones, pooled", "FirstMinusRandom"),
    "Does Fisher choose better?": ("the first − those of most Fisher information", "FirstMinusTopFisher"),
    "Is one cut too big?": ("two steps − one", "TwoStepsMinusOne"),
    "What is lost with the other layers?": ("the few layers − all layers", "FewMinusWhole"),
    "Do SASRec and EASE add to the teacher?": ("all three − the teacher alone", "FusedMinusTeacher"),
    "Does the teacher add to SASRec?": ("all three − SASRec alone", "FusedMinusSasrec"),
    "Does a second language model add to the teacher?": ("both − the teacher alone", "LanguagesMinusTeacher"),
    "Does the teacher add to that one?": ("both − Gemma-3-270M alone", "LanguagesMinusGemma"),
}
TAUGHT = {"fusion": "Fused", "languages": "Languages"}  # in macros' names
SEEDED = (*SHOWN, "steps")
NAMES = {"fused": "All", "first_last": "First and last", "top_fisher": "Top Fisher", "teacher alone": "Teacher"}
BESIDE = (
    ("kept", 100, "{:.0f}", "Kept (%)"),
    ("overlap", 100, "{:.0f}", "Overlap (%)"),
    ("tau", 1, "{:.2f}", "Kendall"),
)
CONTRASTS = {  # macros of the experiment arms: which arm minus which
    "HiddenMinusNone": ("uniform", NO_HIDDEN), "TeacherMinusLabels": (NO_HIDDEN, LABELS),
    "FisherMinusUniform": ("fisher", "uniform"), "FisherMinusShuffled": ("fisher", "shuffled_fisher"),
}  # fmt: skip


def label(arm: str) -> str:
    """An arm's name in a table."""
    name = arm.removesuffix(" alone")
    return NAMES.get(arm) or (look(name).label if name in LOOKS else name.replace("_", " ").capitalize())


def letters(name: str) -> str:
    """The first word of a teacher's name, for a macro's name."""
    return re.match("[A-Za-z]+", name)[0].title()


def table(rows: Rows, experiment: str) -> str:
    """The table of one experiment: quality before and after recovery, agreement with the teacher, differences."""
    mean, tables, _ = measured(rows, experiment)
    references, head = SHOWN[experiment]
    frame = pd.DataFrame({head: [label(name) for name in mean.index]}, index=mean.index)
    formats, headers = {}, {}
    if experiment in ("selection", "frontier"):
        frame["before"], formats["before"], headers["before"] = mean.ndcg_before, "{:.3f}", "Before"
    quality = {name: mean_interval(values.mean(1), seed=0) for name, values in tables.items()}
    frame = frame.join(pd.DataFrame.from_dict(quality, orient="index", columns=["ndcg", "ndcg_low", "ndcg_high"]))
    formats["ndcg"], headers["ndcg"] = "{:.3f}", "NDCG@10"
    for column, factor, form, text in BESIDE:
        if not (experiment == "match" and column == "kept"):  # a table of one column of text
            frame[column], formats[column], headers[column] = factor * mean[column], form, text
    if experiment == "frontier":
        frame["seconds"], formats["seconds"], headers["seconds"] = mean.seconds, "{:.0f}", "Seconds"
    for reference in references:
        key = f"to_{reference}"
        found = against(tables, reference, 0)[["difference", "low", "high"]]
        frame = frame.join(found.set_axis([key, f"{key}_low", f"{key}_high"], axis=1))
        formats[key], headers[key] = "{:+.4f}", f"minus {label(reference).lower()}"
    return booktabs(frame, formats, best={"ndcg": "max"}, headers=headers)


def arm_numbers(tables: dict[str, np.ndarray]) -> dict[str, str]:
    """Macros of the arms: the hypothesis on growing weights, what each part of the loss is worth, who wins."""
    verdict, by_seed = h3_growing_weights(tables, seed=0), tables[WEIGHTED_BY].mean(axis=0)
    found = {"RecoveryHThreeVerdict": escape(verdict.verdict)} | interval_macros(
        "RecoveryDepthMinusUniform", verdict[1:4]
    )
    for name, (one, other) in CONTRASTS.items():
        found |= interval_macros(f"Recovery{name}", difference_of_arms(tables[one], tables[other], seed=0))
    weightings = {name: values for name, values in tables.items() if name not in (NO_HIDDEN, LABELS)}
    to_uniform, to_none = against(weightings, WEIGHTED_BY, 0), against(tables, NO_HIDDEN, 0).loc[list(weightings)]
    for name, frame in {"Uniform": to_uniform, "None": to_none}.items():
        found[f"RecoveryBetterThan{name}"] = str((frame.says == "better").sum())
        found[f"RecoveryWorseThan{name}"] = str((frame.says == "worse").sum())
    for name in (LABELS, NO_HIDDEN, WEIGHTED_BY):
        found[f"Recovery{name.title()}Ndcg"] = format_number(tables[name].mean(), "{:.3f}")
    found["RecoveryWeightings"] = str(len(weightings))
    found["RecoverySeedSd"] = format_number(by_seed.std(ddof=1), "{:.4f}")
    return found


def selection_numbers(mean: pd.DataFrame, tables: dict[str, np.ndarray]) -> dict[str, str]:
    """Macros of the experiment selection: the first layers, others, and whether quality before recovery tells."""
    worst, verdicts = mean.ndcg.idxmin(), against(tables, "first", 0)
    told = spearman(mean.ndcg_before.to_numpy(), mean.ndcg.to_numpy(), seed=0)
    found = {
        "RecoverySelectionWorst": label(worst),
        "RecoverySelectionWorstNdcg": format_number(mean.ndcg[worst], "{:.3f}"),
    }
    random = [name for name in mean.index if name.startswith("random")]
    others = {
        "Last": tables["last"],
        "TopFisher": tables["top_fisher"],
        "Random": np.mean([tables[name] for name in random], axis=0),
    }
    for name, values in others.items():
        found |= interval_macros(f"RecoveryFirstMinus{name}", difference_of_arms(tables["first"], values, seed=0))
    found["RecoveryFirstNdcg"] = format_number(mean.ndcg["first"], "{:.3f}")
    found["RecoverySelections"] = str(len(mean))
    found |= {f"Recovery{word.title()}ThanFirst": str((verdicts.says == word).sum()) for word in ("better", "worse")}
    return found | interval_macros("RecoveryBeforeTellsAfter", told[:3], "{:.2f}")


def numbers(rows: Rows, layers: int) -> dict[str, str]:
    """All macros: the budget, and what each experiment found; layers: the depth that the others are cut to."""
    every = rows.read()
    found = {
        "RecoveryEpochs": format_number(every.epochs.iloc[0], "{:.2f}"),
        "RecoveryTokens": format_number(every.tokens.iloc[0], "{:,}"),
    }  # fmt: skip
    taken = every.groupby(["experiment", "arm"], sort=False).seconds.median()
    for experiment in every.experiment.unique():
        mean, tables, seeds = measured(rows, experiment)
        found[f"Recovery{experiment.title()}Seeds"] = str(len(seeds))
        if experiment == "arms":
            found |= arm_numbers(tables)
            found["RecoverySecondsLow"] = format_number(taken[experiment].min(), "{:.0f}")
            found["RecoverySecondsHigh"] = format_number(taken[experiment].max(), "{:.0f}")
        if experiment == "selection":
            found |= selection_numbers(mean, tables)
        if experiment == "match":
            verdicts = against(tables, "all", 0)
            found |= {
                f"RecoveryMatch{word.title()}": str((verdicts.says == word).sum()) for word in ("better", "worse")
            }
            found["RecoveryMatches"] = str(len(verdicts))
        if experiment in TAUGHT:
            for name in (name for name in tables if name != "fused"):
                gain, other = difference_of_arms(tables["fused"], tables[name], seed=0), letters(name)
                found |= interval_macros(f"Recovery{TAUGHT[experiment]}Minus{other}", gain)
        if experiment == "languages":  # what each was heard by
            heard = json.loads(every.heard[(every.experiment == experiment) & (every.arm == "fused")].iloc[0])
            found |= {f"RecoveryHeard{letters(name)}": format_number(value, "{:.3f}") for name, value in heard.items()}
        if experiment == "frontier":
            whole, few = (tables[name] for name in (mean.index[0], f"{layers} layers"))
            found |= interval_macros("RecoveryFewMinusWhole", difference_of_arms(few, whole, seed=0))
            kept = (100 * value for value in ratio_of_means(few.mean(1), whole.mean(1), seed=0))
            found |= interval_macros("RecoveryFewKeptOfWhole", kept, "{:.0f}")
        if experiment == "steps":
            one, two = tables.values()
            found["RecoveryTwoStepsTimes"] = format_number(
                taken[experiment].iloc[1] / taken[experiment].iloc[0], "{:.1f}"
            )
            found |= interval_macros("RecoveryTwoStepsMinusOne", difference_of_arms(two, one, seed=0))
    return found


def answers(found: dict[str, str], layers: int, device: str, commits: str) -> str:
    """The README's block: each question whose experiment has rows, and the difference that answers it."""
    budget = f"{found['RecoveryEpochs']} epochs, {found['RecoveryTokens']} tokens, the same for all"
    seeds = ", ".join(f"{name} {found[key]}" for name in SEEDED if (key := f"Recovery{name.title()}Seeds") in found)
    made = (
        f"NDCG@10 of students of {layers} layers, {budget}; users and seeds paired; seeds: {seeds}; {device}; "
        f"commits {commits}."
    )
    lines = [made, "", "| question | held against each other | difference [95 %] |", "|---|---|---|"]
    for question, (what, name) in QUESTIONS.items():
        if f"Recovery{name}" in found:
            value, low, high = (found[f"Recovery{name}{end}"].replace("$-$", "−") for end in ("", "Low", "High"))
            lines.append(f"| {question} | {what} | {value} [{low}, {high}] |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    file = parser.parse_args().folder / "manifest.json"
    if not file.exists():
        raise LwaError(f"{file} does not exist: run distillation_ablation.py first, and name the folder of its ranks")
    made = json.loads(file.read_text(encoding="utf-8"))
    rows = Rows(made["teacher"], made["settings_hash"], made["part"])
    refuse_dirty(rows.read(), "arm", rows.file.path)
    for experiment in SHOWN:
        if (rows.read().experiment == experiment).any():
            write(paths.PAPER / f"distillation_{experiment}.tex", table(rows, experiment))
    layers = made["settings"]["distillation"]["n_layers"]
    found, header = numbers(rows, layers), "Generated by tests/benchmarks/distillation_table.py; do not edit."
    write(paths.PAPER / "distillation.tex", results_tex(found, header))
    commits = short_commits(rows.read().commit)
    write_block(paths.ROOT / "README.md", START, END, answers(found, layers, made["device"], commits))
    if (languages := rows.folder / "languages.json").exists():
        made["languages"] = json.loads(languages.read_text(encoding="utf-8"))
    made |= {"rows": json.loads(rows.read().to_json(orient="records"))}
    write_json(paths.PAPER / "distillation.json", made)


if __name__ == "__main__":
    main()
