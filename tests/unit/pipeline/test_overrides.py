"""Settings as people type them mean what their field says, and every slip is one clear message."""

from __future__ import annotations

import os
from typing import Literal

import pytest

from lwa_helpers.config import load_config
from lwa_helpers.errors import LwaError
from lwa_helpers.pipeline.overrides import parse_overrides, typed, value_of


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("teacher.learning_rate=1e-4", 0.0001),
        ("teacher.learning_rate=5E-5", 0.00005),
        ("teacher.learning_rate=.5e-3", 0.0005),
        ("teacher.epochs=2", 2.0),
        ("teacher.evaluate_every=None", None),
        ("teacher.evaluate_every=1e-1", 0.1),
        *((f"data.name={name}", name) for name in ("No", "On", "null", "None", "~", "true", "007", "1e5", "0x10")),
        *((f"data.name={name}", name) for name in ("2023-01-01", "1_000", "Épicerie fine", "a=b", "[x]")),
        ("data.name= Toys ", "Toys"),
        (" data.name =Toys", "Toys"),
        ('data.name="No"', "No"),
        *((f"data.max_tokens={nothing}", None) for nothing in ("None", "none", "null", "~", "")),
        *((f"data.max_tokens={number}", 1000) for number in ("1000", "1_000", "1e3", "1000.0", "0x3e8", "01000")),
        *((f"evaluation.every_target={yes}", True) for yes in ("true", "True", "YES", "on", "1")),
        *((f"evaluation.every_target={no}", False) for no in ("false", "No", "off", "0")),
        ("evaluation.bf16=auto", "auto"),
        ("evaluation.bf16=no", False),
        ("data.split=Timestamp", "timestamp"),
        *((f"ablation.seeds={seeds}", [0, 1]) for seeds in ("0,1", "0, 1", "[0,1]", "[0, 1,]", "(0,1)", "0\n1")),
        ("ablation.seeds=7", [7]),
        ("evaluation.baselines=", []),
        ("evaluation.baselines=[]", []),
        ("evaluation.sasrec_learning_rates=1e-3,3e-3", [0.001, 0.003]),
        ("comparison.teachers=llama3:latest,No", ["llama3:latest", "No"]),
        ("""comparison.teachers=[smollm2-135m, "llama3:latest"]""", ["smollm2-135m", "llama3:latest"]),
        ("comparison.teachers=['a, b', c]", ["a, b", "c"]),
    ],
)
def test_a_value_means_what_its_field_says(assignment: str, value: object) -> None:
    overrides = parse_overrides([assignment])
    (key,) = overrides
    found = load_config("smoke", overrides)
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


def test_a_path_may_begin_at_home() -> None:
    given = ["data.root=~/data", "teacher.model=~/models/own", "comparison.teachers=~/a.gguf,qwen3", "data.name=~/x"]
    config, home = load_config("smoke", parse_overrides(given)), os.path.expanduser("~")
    assert config.data.root == f"{home}/data" and config.teacher.model == f"{home}/models/own"
    assert config.comparison.teachers == [f"{home}/a.gguf", "qwen3"] and config.data.name == "~/x"


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["seed"], "'seed': write it as KEY=VALUE"),
        (["=3"], "write it as KEY=VALUE"),
        (["seed=1", "seed=2"], "seed is given twice, as '1' and as '2'"),
        (["data.nam=x"], r"data.nam: no such setting; did you mean data.name\?"),
        (["Data.Name=x"], r"no section 'Data'; did you mean data.name\?"),
        (["tacher.model=x"], r"no section 'tacher'; did you mean teacher.model\?"),
        (["teacher.learning-rate=1"], "did you mean teacher.learning_rate"),
        (["learning_rate=1"], "teacher.learning_rate or ablation.learning_rate or distillation.learning_rate"),
        (["nowhere.x=1"], "no section 'nowhere'; lwa_helpers/configs/experiment_config.yaml lists them"),
        (["data=x"], "data: a section, not a setting; name one of its settings: data.name, data.root"),
        (["ablation.loss=x"], "ablation.loss.alpha"),
        (["profile=paper"], "choose it with --profile"),
        (["data.name="], "no value is given"),
    ],
)
def test_a_key_that_names_no_field_is_explained(assignments: list[str], message: str) -> None:
    with pytest.raises(LwaError, match=message):
        parse_overrides(assignments)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("teacher.learning_rate=fast", "teacher.learning_rate = 'fast': Input should be a valid number"),
        ("teacher.learning_rate=None", "teacher.learning_rate = 'None'"),
        ("teacher.learning_rate=1,5", "teacher.learning_rate = '1,5'"),
        ("teacher.learning_rate=nan", "finite"),
        ("teacher.epochs=inf", "finite"),
        ("data.max_tokens=2.5", "data.max_tokens = '2.5': Input should be a valid integer"),
        ("evaluation.every_target=maybe", "evaluation.every_target = 'maybe'"),
        ("ablation.seeds=0 1", "ablation.seeds.0 = '0 1'"),
        ("ablation.seeds=a,1", "ablation.seeds.0 = 'a': Input should be a valid integer"),
        ("ablation.seeds=[0,1", r"ablation.seeds = '\[0,1'"),
        ("seed=-3", "seed = -3"),
    ],
)
def test_a_value_that_is_none_of_its_type_is_named_as_it_was_typed(assignment: str, message: str) -> None:
    with pytest.raises(LwaError, match=message):
        load_config("smoke", parse_overrides([assignment]))


def test_overrides_of_a_notebook_are_read_alike_and_values_stay() -> None:
    given = {"teacher.learning_rate": "1e-4", "ablation.seeds": ["0", 1], "data.max_tokens": None, "seed": 3}
    expected = {"teacher.learning_rate": 0.0001, "ablation.seeds": [0, 1], "data.max_tokens": None, "seed": 3}
    assert typed(given) == expected == typed(expected) and typed(None) == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("data.name=x", "give settings by name"),
        ({"data.name": False}, "data.name = False: a text is needed"),
        ({"data": {"name": "x"}}, "a section, not a setting"),
        ({1: 2}, "1: no such setting"),
    ],
)
def test_overrides_of_a_notebook_that_are_none(overrides: object, message: str) -> None:
    with pytest.raises(LwaError, match=message):
        typed(overrides)


def test_a_text_that_fits_no_choice_is_refused() -> None:
    assert value_of(Literal["a"] | list[int] | None, "1,2") == [1, 2]
    with pytest.raises(ValueError, match="'b' is no value"):
        value_of(Literal["a"] | bool, "b")
