"""The ablation with several seeds and its tables, on a catalogue of two dozen titles and a tiny model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "builders"))
from tiny_lm import TITLES, USERS, language_model, office

from lwa_helpers.config import load_config
from lwa_helpers.data.loading import load_data
from lwa_helpers.distillation.teacher_tuning import item_model
from lwa_helpers.evaluation.metrics import ndcg_at_k
from lwa_helpers.evaluation.statistics import difference_over_seeds
from lwa_helpers.fisher.calculator import FisherInformationCalculator
from lwa_helpers.models.loading import load_teacher
from lwa_helpers.ranking.task import RankingTask

pytestmark = pytest.mark.smoke
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
EXPERIMENTS = "arms,selection,match,steps,fusion,languages"
MANY = [f"{title}{more}" for more in ("", " II", " III") for title in TITLES]


def tuned_teacher(root: Path) -> dict[str, object]:
    """What `lwa reproduce --only 02` leaves, and a second model with another tokenizer; returns the settings.

    The model has not learned anything, but its layers say different things.
    """
    settings = {
        "data.name": "Office_Products", "data.root": str(office(root / "office", MANY)), "data.split": "file",
        "data.k_core": 0, "data.reading": "titles", "distillation.n_layers": 4,
        "distillation.windows_per_user": "null", "evaluation.users": "null",
        "fisher.loo_examples": 8, "distillation.learning_rate": 0.01, "distillation.head_learning_rate": 0.01,
    }  # fmt: skip
    config = load_config("smoke", {name: None if value == "null" else value for name, value in settings.items()})
    data, run = load_data(config.data), root / "results" / "smoke"
    vectors = np.random.default_rng(0).standard_normal((len(data.items), 8))
    first, second = language_model(layers=6, initializer_range=0.3), language_model(layers=3, hidden=16, vocabulary=300)
    for lm, folder in ((first, run / "models" / "teacher"), (second, root / "second")):
        item_model(lm, data, vectors, config.data, config.evaluation, config.seed).save(folder)
    teacher = load_teacher(run / "models" / "teacher")
    loader = RankingTask(data, teacher, config.data, config.evaluation, config.seed).train_loader(
        config.teacher, seed=0
    )
    FisherInformationCalculator().calculate(teacher.model, loader).save(run / "fisher" / "teacher.safetensors")
    return settings


def test_students_are_trained_once_and_the_paper_shows_their_rows(tmp_path):
    environment = os.environ | {"LWA_ROOT": str(tmp_path), "LWA_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    settings = tuned_teacher(tmp_path)

    def python(script, *command):
        words = [sys.executable, BENCHMARKS / script, *command]
        return subprocess.run(list(map(str, words)), check=False, env=environment, capture_output=True, text=True)

    def run(experiments, second, **changes):
        flags = [word for name, value in (settings | changes).items() for word in ("--set", f"{name}={value}")]
        words = (
            "--profile",
            "smoke",
            "--only",
            experiments,
            "--seeds",
            0,
            1,
            "--epochs",
            1,
            "--with",
            f"other-lm={second}",
        )
        return python("distillation_ablation.py", *words, *flags)

    done = run(EXPERIMENTS, tmp_path / "second")
    assert not done.returncode, done.stderr[-3000:]
    file = tmp_path / "results" / "benchmarks" / "distillation_ablation.csv"
    rows = pd.read_csv(file).set_index(["experiment", "arm", "seed"])
    assert len(rows) == 2 * (12 + 11 + 7 + 2 + 4 + 3) and rows.tokens.nunique() == rows.settings.nunique() == 1
    same = [("arms", "none", 1), ("selection", "first", 1), ("steps", "one step", 1), ("fusion", "teacher alone", 1)]
    for twins in ([*same, ("languages", "teacher alone", 1)], [("arms", "uniform", 1), ("match", "all", 1)]):
        assert rows.loc[twins, "seconds"].nunique() == rows.loc[twins, "student"].nunique() == 1
    assert rows.student.nunique() == 12 + 10 + 6 + 1 + 3 + 2
    folder = next(file.with_suffix("").glob("*/test"))

    def ndcg(experiment, arm):
        return np.stack([ndcg_at_k(np.load(folder / f"{experiment} {arm} {seed}.npy"), 10) for seed in (0, 1)], axis=1)

    assert ndcg("arms", "fisher").shape == (USERS, 2)
    assert rows.ndcg["arms", "fisher", 0] == pytest.approx(ndcg("arms", "fisher")[:, 0].mean())
    before = file.read_bytes()
    assert not run(EXPERIMENTS, tmp_path / "second").returncode and file.read_bytes() == before
    another = run("languages", tmp_path / "results" / "smoke" / "models" / "teacher")
    assert another.returncode and "are of other models" in another.stderr
    unread = run(EXPERIMENTS, tmp_path / "second", **{"data.reading": "items"})
    assert unread.returncode and "holds no teacher that reads items" in unread.stderr

    paper, readme = tmp_path / "paper", tmp_path / "README.md"
    paper.mkdir()
    readme.write_text(
        "<!-- ablation: written by tests/benchmarks/distillation_table.py -->\n<!-- end of ablation -->\n"
    )
    shown = python("distillation_table.py", folder)
    assert not shown.returncode, shown.stderr[-3000:]
    assert sorted(path.name for path in paper.glob("*.tex")) == [
        "distillation.tex", "distillation_arms.tex", "distillation_fusion.tex", "distillation_languages.tex",
        "distillation_match.tex", "distillation_selection.tex",
    ]  # fmt: skip
    macros = dict(re.findall(r"\\newcommand\{\\([A-Za-z]+)\}\{(.*)\}", (paper / "distillation.tex").read_text()))
    gain = difference_over_seeds(ndcg("arms", "fisher"), ndcg("arms", "uniform"))
    assert gain.low < gain.estimate < gain.high
    for end, value in zip(("", "Low", "High"), gain):
        assert macros[f"RecoveryFisherMinusUniform{end}"] == f"{value:+.4f}".replace("-", "$-$")
    both = difference_over_seeds(ndcg("languages", "fused"), ndcg("languages", "other-lm alone"))
    assert macros["RecoveryLanguagesMinusOther"] == f"{both.estimate:+.4f}".replace("-", "$-$")
    heard = json.loads(rows.heard["languages", "fused", 0])
    assert (
        macros["RecoveryHeardOther"] == f"{heard['other-lm']:.3f}"
        and macros["RecoveryHeardTeacher"] == f"{heard['teacher']:.3f}"
    )
    assert f"| Fisher − uniform | {gain.estimate:+.4f} [".replace("-", "−") in readme.read_text()
    made = json.loads((paper / "distillation.json").read_text())
    assert len(made["rows"]) == len(rows) and made["settings"]["distillation"]["epochs"] == 1.0
    assert list(made["languages"]) == ["other-lm"]
    file.write_text(before.decode().replace("unknown", "unknown-dirty"))
    refused = python("distillation_table.py", folder)
    assert refused.returncode and "rows of uncommitted changes" in refused.stderr
