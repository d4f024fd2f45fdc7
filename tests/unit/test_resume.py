"""A run that stops and goes on ends where an uninterrupted one does, and other ways to train the same thing."""

import copy

import numpy as np
import pytest
import torch
from test_distillation import item_model, windows
from tiny_lm import language_model
from transformers import TrainerCallback

from lwa_helpers import DistillationTrainer, paths
from lwa_helpers.arms import checkpoint_folder, distil
from lwa_helpers.config import load_config
from lwa_helpers.signals import TeacherSignals
from lwa_helpers.tuning import last_checkpoint, train_or_go_on, training_arguments, window_loader

SECTION = load_config("smoke").ablation.model_copy(
    update={"epochs": 3.0, "tokens_per_batch": 40, "save_steps": 2, "bf16": False, "learning_rate": 1e-2}
)


class Stop(TrainerCallback):
    """Break off before step n."""

    def __init__(self, n):
        self.n = n

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.n:
            raise KeyboardInterrupt


def trainer(student, teacher, data, folder, callbacks=(), section=SECTION):
    loader = window_loader(data, section.tokens_per_batch, 0, 7)
    arguments = training_arguments(section, len(loader), 0, checkpoints=folder)
    return DistillationTrainer(
        teacher, student, strategy="linear", args=arguments, loader=loader, head_learning_rate=2e-2, callbacks=callbacks
    )


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stop", [3, 8])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, tied, stop):
    """Seven batches an epoch: it stops inside the first or the second, and the width differs, so projections are trained."""
    lm = language_model(hidden=48)
    data = windows(lm) * 3
    whole = item_model(language_model(layers=2, tie_word_embeddings=tied), seed=1)
    cut, teacher = copy.deepcopy(whole), item_model(lm)
    torch.manual_seed(1)
    trainer(whole, teacher, data, None).train()
    with pytest.raises(KeyboardInterrupt):
        torch.manual_seed(1)
        train_or_go_on(trainer(copy.deepcopy(cut), teacher, data, tmp_path / "run", [Stop(stop)]), tmp_path / "run")
    assert last_checkpoint(tmp_path / "run").endswith(f"checkpoint-{stop // 2 * 2}")
    torch.manual_seed(2)
    again = trainer(cut, teacher, data, tmp_path / "run")
    train_or_go_on(again, tmp_path / "run")
    want, got = weights(whole), weights(cut)
    assert want.keys() == got.keys() and not any("projections" in name for name in got)
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert not (tmp_path / "run").exists() and again.state.global_step == 3 * len(again.loader)


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path):
    for name, state in (("checkpoint-9", '{"a": 1}\n'), ("checkpoint-10", '{"a": 1}'), ("checkpoint-12", '{"a": ')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-14").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_a_run_goes_on_from_its_own_checkpoints_only(tmp_path, monkeypatch):
    from test_weighting import result

    monkeypatch.setattr(paths, "CACHE", tmp_path)
    lm = language_model()
    data, fisher = windows(lm), result([1.0, 2, 3, 4])
    ordered = window_loader(data, 60, 0, 0, shuffle=False)
    signals = TeacherSignals.compute(item_model(lm), ordered, [2, 4], tmp_path / "s", False)
    student = item_model(language_model(layers=2), seed=1)
    first = checkpoint_folder(student, signals, fisher, "linear", SECTION, 0)
    others = [
        checkpoint_folder(student, signals, fisher, "uniform", SECTION, 0),
        checkpoint_folder(student, signals, fisher, "linear", SECTION, 1),
        checkpoint_folder(student, signals, fisher, "linear", SECTION.model_copy(update={"epochs": 2.0}), 0),
        checkpoint_folder(student, signals, result([1.0, 2, 3, 5]), "linear", SECTION, 0),
        checkpoint_folder(item_model(language_model(layers=2), seed=2), signals, fisher, "linear", SECTION, 0),
    ]
    assert len({first, *others}) == 6 and first == checkpoint_folder(student, signals, fisher, "linear", SECTION, 0)
    distil(student, signals, data, fisher, "linear", SECTION, 0, 0)
    assert not first.exists()


def test_gradient_checkpointing_gives_the_same_weights():
    lm = language_model()
    data, teacher = windows(lm) * 2, item_model(lm)
    plain = item_model(language_model(layers=2), seed=1)
    saving = copy.deepcopy(plain)
    section = SECTION.model_copy(update={"save_steps": None, "epochs": 1.0})
    trainer(plain, teacher, data, None, section=section).train()
    with pytest.warns(FutureWarning, match="checkpointing"):
        trainer(saving, teacher, data, None, section=section.model_copy(update={"gradient_checkpointing": True})).train()
    assert saving.causal_lm.is_gradient_checkpointing and not plain.causal_lm.is_gradient_checkpointing
    for name, value in weights(plain).items():
        np.testing.assert_allclose(saving.state_dict()[name].numpy(), value.numpy(), rtol=1e-4, atol=1e-5)
