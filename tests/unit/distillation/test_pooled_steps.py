"""The batches of a step, in one process or several, have the gradient of one batch of all their rows."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_lm import language_model
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from lwa_helpers import DistillationTrainer
from lwa_helpers.configs.students import LossConfig
from lwa_helpers.distillation.trainer import loader_of
from lwa_helpers.errors import LwaError
from lwa_helpers.ranking.item_head import sampled_nll
from lwa_helpers.ranking.outputs import label_outputs
from lwa_helpers.ranking.training import RankingTrainer

LOSS = LossConfig(alpha=0.4, temperature=2.0, beta=0.8)
LABELS = (2, 11, 0, 7)  # labels of each row


def row(n, length=12):
    """A row whose last n tokens are labels."""
    ids = torch.randint(1, 300, (1, length), generator=torch.Generator().manual_seed(n))
    labels = ids.clone()
    labels[:, : length - n] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def together(rows):
    return {name: torch.cat([one[name] for one in rows]) for name in rows[0]}


def arguments(folder, **changes):
    own = {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 1e9, "save_strategy": "no", "logging_steps": 1}
    more = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "remove_unused_columns": False}
    return TrainingArguments(output_dir=str(folder), **own | more | changes)


class Keep(TrainerCallback):
    """Keeps the gradients of each step."""

    def __init__(self, steps):
        self.steps = steps

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def trainer_of(kind, args, batches, callbacks=()):
    """A trainer of one of the three losses; the distilled student has another width, so projections are trained."""
    student = language_model(layers=2, seed=1)
    if kind == "labels":
        return RankingTrainer(student.model, args, loader_of(batches), callbacks=callbacks)
    torch.manual_seed(5)  # draws the projections
    trainer = DistillationTrainer(language_model(hidden=48), student, np.array([0.5, 1.5]), loss=LOSS, args=args)
    trainer.loader = loader_of(batches)
    trainer.train_dataset = trainer.loader.dataset
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def steps_of(kind, folder, batches, **changes):
    """The gradients of each step, and the log."""
    steps = []
    trainer = trainer_of(kind, arguments(folder, **changes), batches, [Keep(steps)])
    trainer.train()
    return steps, [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same(got, want):
    assert got.keys() == want.keys() and any(value.any() for value in want.values())
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["labels", "distillation"])
def test_accumulated_batches_have_the_gradient_and_the_log_of_one_batch(tmp_path, kind):
    rows = [row(n) for n in LABELS]
    (got,), (log,) = steps_of(kind, tmp_path, rows, gradient_accumulation_steps=4)
    (want,), (whole,) = steps_of(kind, tmp_path, [together(rows)])
    assert_same(got, want)
    assert log.keys() == whole.keys() >= ({"loss"} if kind == "labels" else {"loss", "ce", "kl", "hidden"})
    for name in {"loss", "ce", "kl", "hidden"} & log.keys():
        assert log[name] == pytest.approx(whole[name], rel=1e-4)


def test_the_gradient_of_labels_by_hand(tmp_path):
    """The sum of -log p over all labels, divided by their number."""
    rows, model = [row(n) for n in LABELS], language_model(layers=2, seed=1).model
    (got,), _ = steps_of("labels", tmp_path, rows, gradient_accumulation_steps=4)
    total = sum(
        F.cross_entropy(model(one["input_ids"]).logits[0, :-1], one["labels"][0, 1:], reduction="sum") for one in rows
    )
    (total / sum(int((one["labels"][:, 1:] != -100).sum()) for one in rows)).backward()
    assert_same(got, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def test_a_last_step_of_fewer_batches_counts_these_alone(tmp_path):
    rows = [row(n) for n in (2, 11, 7)]
    (_, got), _ = steps_of("labels", tmp_path, rows, gradient_accumulation_steps=2, max_steps=2)
    (_, want), _ = steps_of("labels", tmp_path, [together(rows[:2]), rows[2]], max_steps=2)
    assert_same(got, want)


@pytest.mark.parametrize("kind", ["labels", "distillation"])
def test_two_processes_with_two_batches_each_average_to_the_gradient_of_one_batch(tmp_path, kind, monkeypatch):
    """Both are played here: each sees the other's count; the mean of their gradients is what DDP makes of them."""
    rows, mean = [row(n) for n in LABELS], {}
    (want,), _ = steps_of(kind, tmp_path, [together(rows)])
    counts = [sum(int((one["labels"][:, 1:] != -100).sum()) for one in part) for part in (rows[:2], rows[2:])]
    for part in (rows[:2], rows[2:]):
        trainer = trainer_of(kind, arguments(tmp_path), part)
        monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
        monkeypatch.setattr(trainer.accelerator, "gather", lambda _: torch.tensor(counts))
        if kind == "distillation":
            trainer.model.projections = trainer.projections
        batches, n = trainer.get_batch_samples(iter(part), 2, torch.device("cpu"))
        assert n == sum(counts) and len(batches) == 2
        for batch in batches:
            trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=n).backward()
        for name, p in trainer.model.named_parameters():
            if p.grad is not None:
                mean[name] = mean.get(name, 0) + p.grad / 2
    assert_same(mean, want)


def test_one_batch_a_step_is_its_loss_to_the_bit(tmp_path):
    trainer, batch = trainer_of("distillation", arguments(tmp_path), [row(7)]), row(7)
    alone = trainer.compute_loss(trainer.model, batch)
    n = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))[1]
    assert torch.equal(trainer.compute_loss(trainer.model, batch, num_items_in_batch=n), alone)


def test_sampled_batches_are_weighted_too(tmp_path):
    log_q = torch.full((340,), 1 / 340).log()
    trainer = trainer_of("labels", arguments(tmp_path), [row(7)])
    trainer.sampled = log_q, 5
    batch = row(7)
    own = label_outputs(trainer.model, batch)
    torch.manual_seed(3)
    alone = sampled_nll(trainer.model.lm_head, own.states, own.targets, log_q, 5)
    torch.manual_seed(3)
    got = trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=torch.tensor(28.0))
    assert got.item() == pytest.approx(alone.item() * 7 / 28, rel=1e-6)


def test_several_gpus_in_one_process_are_one(tmp_path, monkeypatch):
    """Simulated: Trainer sees two GPUs and would train replicas."""
    monkeypatch.setattr(nn.DataParallel, "__init__", lambda *_: pytest.fail("a replica was made"))
    late = trainer_of("distillation", arguments(tmp_path), [row(7)])
    seen = late.args
    seen._n_gpu = 2
    late.train()
    early = arguments(tmp_path)
    early._n_gpu = 2
    trainer_of("labels", early, [row(7)]).train()
    assert seen.n_gpu == early.n_gpu == 1


def test_what_a_run_would_miss_later_is_said_before_it_starts(tmp_path):
    with pytest.raises(LwaError, match="schedule evaluations: pass valid"):
        trainer_of("labels", arguments(tmp_path, eval_strategy="steps", eval_steps=1), [row(7)])
    frozen = language_model(layers=2).model.requires_grad_(False)
    with pytest.raises(LwaError, match="no weight of LlamaForCausalLM is trained"):
        RankingTrainer(frozen, arguments(tmp_path), loader_of([row(7)]))
