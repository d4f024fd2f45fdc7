"""The comparison with the literature, from baselines to fused students, on eight titles and a tiny model."""

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
from tiny_lm import USERS, language_model, office

from lwa_helpers.evaluation.metrics import ndcg_at_k

pytestmark = pytest.mark.smoke
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SYSTEMS = [
    "sasrec",
    "ease",
    "teacher",
    "student",
    "student_of_sasrec",
    "fused",
    "fused_teacher",
    "student_of_fused",
    "ensemble",
]


def test_every_system_ranks_the_same_users_and_a_second_run_trains_nothing(tmp_path):
    language_model().save(tmp_path / "tiny")
    data, table = office(tmp_path / "office"), tmp_path / "results" / "benchmarks" / "literature" / "office2014"
    environment = os.environ | {"LWA_ROOT": str(tmp_path), "LWA_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def python(*command):
        return subprocess.run(
            [sys.executable, *map(str, command)], check=False, env=environment, capture_output=True, text=True
        )

    def run(*more, systems=SYSTEMS):
        settings = [
            f"teacher.model={tmp_path / 'tiny'}",
            "teacher.first_layers=2",
            "distillation.epochs=1",
            "distillation.n_layers=2",
        ]
        flags = [word for setting in [*settings, *more] for word in ("--set", setting)]
        return python(
            BENCHMARKS / "literature.py", "--root", data, "--run", "office2014", "--systems", *systems, *flags
        )

    early = run(systems=["teacher", "fused"])
    assert early.returncode and "the tuned sasrec is needed" in early.stderr
    done = run()
    assert not done.returncode, done.stderr[-3000:]
    rows = pd.read_csv(table.with_suffix(".csv"))
    tested = rows[rows.part == "test"].set_index("system")
    assert sorted(tested.index) == sorted(SYSTEMS) and (tested.cases == USERS).all()
    for name in SYSTEMS:
        ranks = np.load(table / f"{name}.npy")
        assert ranks.shape == (USERS,) and tested.ndcg[name] == pytest.approx(ndcg_at_k(ranks, 10).mean())
    layers = {
        name: json.loads((table / name / "config.json").read_text())["num_hidden_layers"] for name in SYSTEMS[2:8]
    }
    assert layers == {
        "teacher": 4,
        "student": 2,
        "student_of_sasrec": 2,
        "fused": 2,
        "fused_teacher": 4,
        "student_of_fused": 2,
    }
    assert json.loads((table / "teacher" / "items.json").read_text())["reading"] == "titles"
    assert len({(table / name / "model.safetensors").read_bytes() for name in layers}) == len(layers), (
        "two were taught the same"
    )
    mixed = json.loads(tested.settings["ensemble"])
    assert list(mixed) == ["teacher", "sasrec", "ease"] and all(scale > 0 for scale, _ in mixed.values())

    before = table.with_suffix(".csv").read_bytes()
    assert not run().returncode and table.with_suffix(".csv").read_bytes() == before
    other = run("data.title_limit=50")
    assert other.returncode and "give this run another --name" in other.stderr

    readme, paper = tmp_path / "README.md", tmp_path / "paper"
    paper.mkdir()
    readme.write_text(
        "Before.\n<!-- literature: written by tests/benchmarks/literature_table.py -->\n"
        "<!-- end of literature -->\nAfter.\n"
    )
    shown = python(BENCHMARKS / "literature_table.py", "office2014")
    assert not shown.returncode, shown.stderr[-3000:]
    mean, low, high = tested.loc["fused", ["ndcg", "low", "high"]]
    assert f"| Student of all three | 2 | {mean:.4f} [{low:.4f}, {high:.4f}] |" in readme.read_text()
    assert r"\toprule" in (paper / "literature_table.tex").read_text()
    times = tested.ndcg["fused"] / tested.ndcg["sasrec"]
    assert rf"\newcommand{{\OfficeFourteenFusedTimesSasrec}}{{{times:.2f}}}" in (paper / "literature.tex").read_text()
    made = json.loads((paper / "literature.json").read_text())["office2014"]
    assert str(tmp_path) not in json.dumps(made["settings"]["data"])
    assert all(re.fullmatch("[0-9a-f]{64}", made[name]) for name in ("data_hash", "model_hash"))
    table.with_suffix(".csv").write_text(before.decode().replace("unknown", "unknown-dirty"))
    refused = python(BENCHMARKS / "literature_table.py", "office2014")
    assert refused.returncode and "rows of uncommitted changes" in refused.stderr
