"""The arms of an ablation: what each level of a factor changes, and that nothing else differs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_lm import CUT, distillation, item_lm, office_task, windows
from trained_students import same_weights, watch_training, weights

from lwa_helpers.config import load_config
from lwa_helpers.distillation.arms import Starts, arms_of, run_arm
from lwa_helpers.distillation.recipes import budget
from lwa_helpers.errors import LwaError
from lwa_helpers.models.layers import decoder_layers

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def trained(monkeypatch):
    return watch_training(monkeypatch)


def ablation(seed=0, **changes):
    own = load_config("smoke").ablation.model_copy(
        update={"n_layers": 2, "tokens_per_batch": 10, "bf16": False, "rank": 4, "epochs": 0.5} | changes
    )
    data = windows(item_lm(), CUT * 12)
    return replace(distillation(seed=seed), section=own, windows=budget(data, own, seed))


def test_arms_of_a_seed_start_alike_and_see_the_same_batches_and_other_seeds_others(trained, tmp_path):
    task, drawn, starts = office_task(tmp_path / "office"), {}, {}
    for seed in (0, 1):
        own = ablation(seed, levels=["labels", "none", "uniform", "fisher"])
        made = Starts(own)
        for arm in arms_of(own.section):
            before = weights(made.of(arm))
            frame = run_arm(arm, own, made, {}, task)
            last = list(trained.values())[-1]
            trainer, order, head = last.trainer, last.batches, last.head
            drawn.setdefault(seed, []).append(order)
            starts.setdefault(seed, []).append(head)
            assert set(frame.arm) == {arm.name} and set(frame.seed) == {seed}
            assert frame.user_id.tolist() == task.eval_cases.user_ids
            assert frame.target.tolist() == task.eval_cases.targets.tolist()
            assert set(frame.steps) == {len(order)} and set(frame.targets) == {int(own.teacher_outputs.starts[-1])}
            assert trainer.loss_config.alpha == (0 if arm.name == "labels" else own.section.loss.alpha)
            assert same_weights(weights(made.of(arm)), before)
        assert all(order == drawn[seed][0] for order in drawn[seed])
        assert all(torch.equal(head, starts[seed][0]) for head in starts[seed])
    assert drawn[0][0] != drawn[1][0] and ablation(0).windows != ablation(1).windows


def test_an_arm_is_the_same_bits_again_and_its_ranks_are_those_of_its_student(tmp_path):
    task, own = office_task(tmp_path / "office"), ablation(levels=["uniform", "none"])
    made, arm = Starts(own), arms_of(own.section)[0]
    first, again = (run_arm(arm, own, made, {}, task) for _ in range(2))
    assert first.equals(again)
    student = made.of(arm)
    own.train(student, "uniform")
    assert first["rank"].tolist() == task.ranks(student.model).tolist()


def test_the_shuffled_weights_of_an_arm_are_drawn_anew_for_each_seed():
    own = [ablation(seed, n_layers=4) for seed in (0, 1, 2)]
    found = [tuple(lesson.train(lesson.start(4), "shuffled_fisher").weights) for lesson in own]
    np.testing.assert_allclose([sorted(weights) for weights in found], [[0.4, 0.8, 1.2, 1.6]] * 3)
    assert len({tuple(np.round(weights, 6)) for weights in found}) == 3
    assert found[1] == tuple(own[1].train(own[1].start(4), "shuffled_fisher").weights)


FACTORS = {
    "selection": (["first", "last"], lambda arm: arm.selection, ["first", "last"]),
    "match": (["all", "last"], lambda arm: arm.loss.match, ["all", "last"]),
    "beta": ([0, 0.5], lambda arm: arm.loss.beta, [0, 0.5]),
    "depth": ([4, 1], lambda arm: arm.n_layers, [4, 1]),
    "steps": (["2", "4>3>2"], lambda arm: arm.steps, [(), (4, 3, 2)]),
    "teachers": (["teacher", "sasrec+ease"], lambda arm: arm.teachers, [("teacher",), ("sasrec", "ease")]),
    "strategy": (["uniform", "linear"], lambda arm: arm.strategy, ["uniform", "linear"]),
}


@pytest.mark.parametrize("factor", FACTORS)
def test_arms_differ_in_the_factor_and_in_nothing_else(factor):
    levels, value, want = FACTORS[factor]
    section = ablation().section.model_copy(update={"factor": factor, "levels": levels})
    arms = arms_of(section)
    assert [value(arm) for arm in arms] == want and [arm.name for arm in arms] == [str(level) for level in levels]
    first, second = arms
    field = {"depth": "n_layers", "match": "loss", "beta": "loss"}.get(factor, factor)
    assert first != second and replace(second, name=first.name, **{field: getattr(first, field)}) == first
    losses = [arm.loss.model_dump(exclude={factor}) for arm in arms]
    assert losses[0] == losses[1]


DEEP = [("depth", [4, 1], [4, 1]), ("steps", ["2", "3>2"], [2, 3, 2])]


@pytest.mark.parametrize(("factor", "levels", "layers"), DEEP)
def test_students_have_the_layers_of_their_level(trained, tmp_path, factor, levels, layers):
    own, task = ablation(factor=factor, levels=levels), office_task(tmp_path / "office")
    made = Starts(own)
    for arm in arms_of(own.section):
        run_arm(arm, own, made, {}, task)
    assert [found.depth for found in trained.values()] == layers


def test_an_arm_of_other_teachers_learns_from_what_they_say(trained, tmp_path):
    own, task = ablation(factor="teachers", levels=["teacher", "ease"]), office_task(tmp_path / "office")
    said = own.teacher_outputs
    for arm in arms_of(own.section):
        run_arm(arm, own, Starts(own), {("ease",): said}, task)
    assert len(trained) == 2
    with pytest.raises(LwaError, match="ease"):
        run_arm(arms_of(own.section)[1], own, Starts(own), {}, task)


@pytest.mark.parametrize(
    ("factor", "levels", "message"),
    [
        ("depth", [8, "all"], "level 'all' of depth: give a number of layers"),
        ("depth", [8, 0], "level 0 of depth"),
        ("beta", [1.0, -0.5], "level -0.5 of beta"),
        ("steps", ["8", "8>15"], "falling numbers of layers that end with 8"),
        ("steps", ["8", "15>6"], "end with 8"),
        ("match", ["all", "none"], "level 'none' of match: give one of all, no_last"),
        ("selection", ["first", 3], "level 3 of selection: give a name"),
    ],
)
def test_a_level_that_is_none_of_its_factor_is_named(factor, levels, message):
    with pytest.raises(LwaError, match=message):
        load_config("smoke", {"ablation.factor": factor, "ablation.levels": levels})


def test_the_reference_is_a_level():
    assert load_config("smoke").ablation.against == "uniform"
    changes = {"ablation.factor": "depth", "ablation.levels": [8, 4, 2]}
    assert load_config("smoke", changes).ablation.against == "8"
    assert load_config("smoke", changes | {"ablation.reference": 4}).ablation.against == "4"
    with pytest.raises(LwaError, match="reference 3 is not among the levels"):
        load_config("smoke", changes | {"ablation.reference": 3})


def test_layers_are_chosen_by_the_scores_that_are_given():
    own = ablation(factor="selection", levels=["first", "block_influence"])
    layers = own.n_layers
    scores = {"block_influence": np.arange(layers, dtype=float)}  # the last two are the highest
    first, last = (Starts(own, scores).of(arm) for arm in arms_of(own.section))
    teacher = decoder_layers(own.teacher.model)
    for student, kept in ((first, teacher[:2]), (last, teacher[layers - 2 :])):
        for made, theirs in zip(decoder_layers(student.model), kept, strict=True):
            assert same_weights(dict(made.named_parameters()), dict(theirs.named_parameters()))
    with pytest.raises(LwaError, match="'greedy' needs scores"):
        Starts(own, scores).of(replace(arms_of(own.section)[0], selection="greedy"))
