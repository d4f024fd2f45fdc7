"""The comparisons of a study's points, against the same numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.across import compare_arms, compare_students, compare_teachers, ndcg_of

pytestmark = pytest.mark.unit
USERS = [f"u{i}" for i in range(60)]
GAIN = {1: 1.0, 2: 1 / np.log2(3), 50: 0.0}  # NDCG@10 by rank


def systems(seed: int, users=USERS) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    ranks = {name: rng.choice(list(GAIN), len(users)) for name in ("teacher", "sasrec", "co_taught")}
    return pd.DataFrame({"user_id": users, **ranks})


def gains(frame: pd.DataFrame, system: str) -> float:
    return float(np.mean([GAIN[rank] for rank in frame[system]]))


def depths(seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    parts = [pd.DataFrame({"seed 0": rng.random(60), "seed 1": rng.random(60)}) for _ in range(2)]
    return pd.concat([p.assign(layers=n, user_id=USERS) for p, n in zip(parts, (8, 30))], ignore_index=True)


@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
def test_a_teacher_is_held_against_sasrec_and_the_first_teacher(seeds):
    own, first = [systems(s) for s in seeds], [systems(s + 10) for s in seeds]
    row = compare_teachers(own, first, 0)
    teacher, sasrec = (np.mean([gains(f, name) for f in own]) for name in ("teacher", "sasrec"))
    assert row["ndcg"] == pytest.approx(teacher) and row["sasrec"] == pytest.approx(sasrec)
    assert row["to_sasrec"] == pytest.approx(teacher - sasrec)
    assert row["to_first"] == pytest.approx(teacher - np.mean([gains(f, "teacher") for f in first]))
    assert row["to_first_low"] < row["to_first"] < row["to_first_high"]
    assert "to_first" not in compare_teachers(first, first, 0)
    assert "to_first" not in compare_teachers(own, [systems(0, USERS[::-1])] * len(seeds), 0)


def test_a_student_is_held_against_all_layers_on_its_budget():
    frames, ranks = [depths(0), depths(1)], [systems(2), systems(3)]
    row = compare_students(frames, ranks, 8, 0)
    few, whole = (np.mean([f[f.layers == n][["seed 0", "seed 1"]].to_numpy().mean() for f in frames]) for n in (8, 30))
    teacher, sasrec = (np.mean([gains(f, name) for f in ranks]) for name in ("teacher", "sasrec"))
    assert row["student"] == pytest.approx(few) and row["kept"] == pytest.approx(100 * few / whole)
    assert row["of_teacher"] == pytest.approx(100 * few / teacher)
    assert row["student_to_sasrec"] == pytest.approx(few - sasrec)
    assert row["kept_low"] < row["kept"] < row["kept_high"]


def test_arms_are_held_against_the_reference_and_judged_by_their_intervals():
    rng = np.random.default_rng(0)
    base, parts = rng.random(60), []
    for seed in (0, 1):
        for arm, shift in {"uniform": 0.0, "up": 0.5, "down": -0.5, "same": 0.0}.items():
            noise = 0.0 if arm == "uniform" else 0.1 * rng.normal(size=60)
            values = {"case": range(60), "user_id": USERS, "ndcg": base + shift + noise}
            parts.append(pd.DataFrame(values).assign(arm=arm, seed=seed).sample(frac=1, random_state=seed))
    found = compare_arms([pd.concat(parts)], "uniform", 0).set_index("arm")
    assert found.says.to_dict() == {"uniform": "", "up": "better", "down": "worse", "same": "no difference shown"}
    assert found.difference["up"] == pytest.approx(0.5, abs=0.05) and np.isnan(found.difference["uniform"])
    assert set(found.seeds) == {2}


def test_cases_of_one_user_count_together():
    several = systems(0, [f"u{i // 2}" for i in range(60)])
    assert ndcg_of([several], "teacher").shape == (30, 1)
    assert ndcg_of([several], "teacher").mean() == pytest.approx(gains(several, "teacher"))


def test_other_users_are_an_error():
    with pytest.raises(LwaError, match="other users"):
        ndcg_of([systems(0), systems(0, USERS[::-1])], "teacher")
