"""A run that stops and goes on ends where an uninterrupted one does, and other ways to train the same thing."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_lm import distillation, item_lm, section, windows
from transformers import TrainerCallback

from lwa_helpers import DistillationTrainer, build_student
from lwa_helpers.distillation import teacher_tuning
from lwa_helpers.distillation.recipes import trained_rows
from lwa_helpers.models.low_rank import low_rank
from lwa_helpers.ranking.training import (
    RankingTrainer,
    last_checkpoint,
    train_or_resume,
    training_arguments,
    window_loader,
)

SECTION = section(epochs=3.0, tokens_per_batch=12, save_steps=2, learning_rate=1e-2)


class Stop(TrainerCallback):
    """Break off before step n."""

    def __init__(self, n):
        self.n = n

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.n:
            raise KeyboardInterrupt


def data_of(lm):
    """Six batches of at most twelve tokens."""
    return windows(lm) * 6


def trainer(student, teacher, data, folder, callbacks=(), section=SECTION):
    loader = window_loader(data, section.tokens_per_batch, 0, 7)
    arguments = training_arguments(section, len(loader), 0, checkpoints=folder)
    return DistillationTrainer(
        teacher,
        student,
        strategy="linear",
        args=arguments,
        loader=loader,
        head_learning_rate=2e-2,
        dropout=0.1,
        callbacks=callbacks,
    )


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(got, want):
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def tied_or_apart(tied):
    """A student of another width than its teacher's, with one matrix at both ends or with two."""
    student = item_lm(layers=2, seed=1).model
    if tied:
        student.config.tie_word_embeddings = True
        student.lm_head.weight = student.model.embed_tokens.weight
    return student


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stop", [3, 8])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, tied, stop):
    """Six batches an epoch: it stops inside the first or the second; the width differs, so projections are trained."""
    big = item_lm(hidden=48)
    data, whole = data_of(big), tied_or_apart(tied)
    cut = copy.deepcopy(whole)
    torch.manual_seed(1)
    trainer(whole, big, data, None).train()
    with pytest.raises(KeyboardInterrupt):
        torch.manual_seed(1)
        train_or_resume(trainer(copy.deepcopy(cut), big, data, tmp_path / "run", [Stop(stop)]), tmp_path / "run")
    assert last_checkpoint(tmp_path / "run").endswith(f"checkpoint-{stop // 2 * 2}")
    torch.manual_seed(2)
    again = trainer(cut, big, data, tmp_path / "run")
    assert len(again.loader) == 6
    train_or_resume(again, tmp_path / "run")
    want, got = weights(whole), weights(cut)
    assert not any("projections" in name for name in got)
    assert_same_bits(got, want)
    assert not (tmp_path / "run").exists() and again.state.global_step == 3 * len(again.loader)


MEASURED = [0.1, 0.4, 0.2, 0.3, 0.9, 0.8]  # with patience 2 the run ends after the fourth


@pytest.mark.parametrize("stop", [5, 10])
@pytest.mark.parametrize("measured", [False, True])
def test_an_interrupted_run_of_rows_in_few_dimensions_ends_with_the_same_bits(tmp_path, stop, measured):
    """Also where the best weights are kept: the value of each look is that of its step, whoever looks."""
    looks = 0.5 if measured else None

    def run(lm, folder, callbacks=()):
        loader = window_loader(data_of(lm), SECTION.tokens_per_batch, 0, 7)
        arguments = training_arguments(SECTION, len(loader), 0, checkpoints=folder, evaluate_every=looks)
        with low_rank(trained_rows(lm.model), SECTION.rank):
            made = RankingTrainer(
                lm.model,
                arguments,
                loader,
                2e-2,
                dropout=0.1,
                callbacks=callbacks,
                patience=2,
                valid=lambda model: MEASURED[made.state.global_step // 3 - 1],
            )
            train_or_resume(made, folder)
        return made, weights(lm.model)

    torch.manual_seed(1)
    through, want = run(item_lm(), tmp_path / "whole")
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        run(item_lm(), tmp_path / "run", [Stop(stop)])
    torch.manual_seed(2)
    again, got = run(item_lm(), tmp_path / "run")
    assert again.state.global_step == through.state.global_step == (12 if measured else 18)
    assert_same_bits(got, want)
    assert not (tmp_path / "run").exists() and not (tmp_path / "whole").exists()


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path):
    for name, state in (("checkpoint-9", '{"a": 1}\n'), ("checkpoint-10", '{"a": 1}'), ("checkpoint-12", '{"a": ')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-14").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_a_student_goes_on_from_its_own_checkpoints_only(cache):
    taught = distillation(save_steps=2, epochs=2.0)
    student = taught.start(2)

    def folder(distillation=taught, student=student, strategy="linear", **loss):
        changed = distillation.section.loss.model_copy(update=loss)
        return distillation.checkpoints(student, taught.teacher_outputs, strategy, changed)

    first = folder()
    others = [
        folder(strategy="uniform"),
        folder(beta=0.25),
        folder(distillation(seed=1)),
        folder(distillation(epochs=2.5, save_steps=2)),
        folder(distillation(per_layer=(4.0, 3, 2, 1.5), save_steps=2, epochs=2.0)),
        folder(student=taught.start(3)),
    ]
    others.append(folder(replace(taught, fisher=None)))
    assert len({first, *others}) == 8 and first == folder(distillation(save_steps=2, epochs=2.0))
    assert taught.train(student, "linear").state.global_step > 0
    assert first.parent == cache / "checkpoints" and not first.exists()


def test_a_teacher_goes_on_from_its_own_checkpoints_only(cache):
    lm = item_lm()

    def folder(lm=lm, data=None, section=SECTION, seed=0, shallow=None):
        return teacher_tuning.checkpoints([lm, shallow], window_loader(data or data_of(lm), 12, 0, 7), section, seed)

    others = [
        folder(item_lm(seed=1)),
        folder(data=data_of(lm)[1:]),
        folder(seed=1),
        folder(section=SECTION.model_copy(update={"dropout": 0.2})),
        folder(shallow=build_student(lm, 2, "first")),
    ]
    assert len({folder(), *others}) == 6 and folder() == folder(item_lm())


def test_gradient_checkpointing_gives_the_same_weights():
    big = item_lm()
    plain = build_student(big, 2, "first").model
    saving, data = copy.deepcopy(plain), data_of(big)
    own = SECTION.model_copy(update={"save_steps": None, "epochs": 1.0})
    torch.manual_seed(0)
    trainer(plain, big, data, None, section=own).train()
    torch.manual_seed(0)
    with pytest.warns(FutureWarning, match="checkpointing"):
        trainer(saving, big, data, None, section=own.model_copy(update={"gradient_checkpointing": True})).train()
    assert saving.is_gradient_checkpointing and not plain.is_gradient_checkpointing
    for name, value in weights(plain).items():
        np.testing.assert_allclose(saving.state_dict()[name].numpy(), value.numpy(), rtol=1e-4, atol=1e-5)
