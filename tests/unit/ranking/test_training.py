"""Training on labels alone: the loss, dropout at the ends, learning rates, and which weights are kept."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tiny_lm import READINGS, SMALL, item_lm, language_model, section, windows
from transformers import Gemma3TextConfig, GPT2Config, TrainerCallback

from lwa_helpers.data.windows import collate
from lwa_helpers.distillation.recipes import trained_rows
from lwa_helpers.errors import LwaError
from lwa_helpers.models.layers import backbone, decoder_layers
from lwa_helpers.models.low_rank import low_rank
from lwa_helpers.ranking.item_head import sampled_nll
from lwa_helpers.ranking.outputs import label_outputs
from lwa_helpers.ranking.training import (
    RankingTrainer,
    dropout_at_the_ends,
    loss_frame,
    parameter_groups,
    train_or_resume,
    training_arguments,
    window_loader,
)

CONFIGS = {
    "llama": None,
    "gemma3": Gemma3TextConfig(**SMALL),
    "gpt2": GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=340, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
}


def trainer_of(lm, epochs=1.0, folder=None, evaluate_every=None, **options):
    own = section(epochs=epochs, tokens_per_batch=24, learning_rate=1e-2)
    loader = window_loader(windows(lm) * 8, own.tokens_per_batch, 0, 7)
    arguments = training_arguments(own, len(loader), 0, checkpoints=folder, evaluate_every=evaluate_every)
    return RankingTrainer(lm.model, arguments, loader, 1e-2, **options)


# The loss


@pytest.mark.parametrize("reading", [*READINGS, "text"])
@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_transformers_own_on_the_same_batch(reading, training):
    lm = language_model() if reading == "text" else item_lm(reading)
    batch = collate(windows(lm), 0)
    got = trainer_of(lm).compute_loss(lm.model.train(training), dict(batch))
    want = lm.model(**batch).loss
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, list(lm.model.parameters())) for loss in (got, want)]
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_only_training_draws_items_and_what_it_draws_is_the_sampled_loss():
    lm = item_lm()
    batch = collate(windows(lm), 0)
    log_q = torch.full((lm.items.tokens.stop,), -torch.inf)
    log_q[lm.items.tokens] = torch.arange(1.0, 9).log_softmax(0)
    trainer = trainer_of(lm, sampled=(log_q, 5))
    want = lm.model.eval()(**batch).loss
    assert trainer.compute_loss(lm.model, dict(batch)).item() == pytest.approx(want.item(), rel=1e-5)
    lm.model.train()
    own = label_outputs(lm.model, batch)
    torch.manual_seed(3)
    drawn = sampled_nll(lm.model.lm_head, own.states, own.targets, log_q, 5)
    torch.manual_seed(3)
    assert trainer.compute_loss(lm.model, dict(batch)).item() == pytest.approx(drawn.item(), rel=1e-6)
    assert drawn.item() != pytest.approx(want.item(), rel=1e-3)


def test_a_batch_without_a_label_counts_for_nothing():
    lm = item_lm()
    batch = collate(windows(lm), 0)
    batch["labels"][:] = -100
    loss = trainer_of(lm).compute_loss(lm.model.train(), batch)
    loss.backward()
    assert loss.item() == 0 and not any(p.grad.any() for p in lm.model.parameters() if p.grad is not None)


def test_training_lowers_the_loss_and_logs_it(tmp_path):
    lm = item_lm()
    batch = collate(windows(lm), 0)
    trainer = trainer_of(lm, epochs=4.0, logs=tmp_path / "logs")
    before = trainer.compute_loss(lm.model.eval(), dict(batch)).item()
    trainer.train()
    assert trainer.compute_loss(lm.model.eval(), dict(batch)).item() < 0.7 * before
    frame = loss_frame(trainer, "mine")
    assert set(frame.run) == {"mine"} and (np.diff(frame.step) > 0).all() and frame.loss.iloc[-1] < frame.loss.iloc[0]
    assert list((tmp_path / "logs").iterdir())


def test_evaluations_need_a_folder_and_a_folder_something_to_save(tmp_path):
    with pytest.raises(LwaError, match="evaluate_every keeps the best checkpoint: pass checkpoints"):
        training_arguments(section(), 5, 0, evaluate_every=0.5)
    with pytest.raises(LwaError, match="nothing says when to save"):
        training_arguments(section(save_steps=None), 5, 0, checkpoints=tmp_path)


# Learning rates


def test_the_rows_of_both_ends_have_a_learning_rate_of_their_own():
    lm = item_lm()
    layers = decoder_layers(lm.model)
    layers[0].requires_grad_(False)
    body, rows = parameter_groups(lm.model, 1e-4, 1e-2)
    ends = {id(lm.model.get_input_embeddings().weight), id(lm.model.get_output_embeddings().weight)}
    assert body["lr"] == 1e-4 and rows["lr"] == 1e-2 and {id(p) for p in rows["params"]} == ends
    want = {id(p) for p in lm.model.parameters()} - ends - {id(p) for p in layers[0].parameters()}
    assert {id(p) for p in body["params"]} == want
    with low_rank(trained_rows(lm.model), 3):
        rows = parameter_groups(lm.model, 1e-4, 1e-2)[1]
        assert sorted(tuple(p.shape) for p in rows["params"]) == [(3, 32)] * 2 + [(len(lm.tokenizer), 3)] * 2
    lm.model.requires_grad_(False)
    lm.model.get_input_embeddings().requires_grad_(True)
    assert [group["lr"] for group in parameter_groups(lm.model, 1e-4, 1e-2)] == [1e-2]


# Dropout


@pytest.mark.parametrize("kind", CONFIGS)
def test_dropout_at_the_ends_is_there_in_training_and_gone_afterwards(kind):
    """A share p of embeddings and of final states is zero, the others are 1 / (1 - p) of what they were."""
    model = language_model(config=CONFIGS[kind]).model.train()
    ids, p, seen = torch.randint(1, 300, (8, 40), generator=torch.Generator().manual_seed(0)), 0.3, {}
    first, body = decoder_layers(model)[0], backbone(model)
    norm = next(m for name, m in body.named_children() if "norm" in name or name == "ln_f")
    first.register_forward_pre_hook(lambda _, args: seen.update(layer=args[0]))
    norm.register_forward_hook(lambda _m, _a, out: seen.update(norm=out))
    embedding = model.get_input_embeddings()
    places = body.wpe(torch.arange(40)) if kind == "gpt2" else 0
    with torch.no_grad():
        plain = model(ids).logits
        table = embedding(ids)
        with dropout_at_the_ends(model, p):
            states = body(input_ids=ids, use_cache=False).last_hidden_state
            for got, was in ((seen["layer"] - places, table), (states, seen["norm"])):
                zero = got.abs() < 1e-7
                assert zero.float().mean().item() == pytest.approx(p, abs=0.02)
                torch.testing.assert_close(got[~zero], was[~zero] / (1 - p), rtol=1e-4, atol=1e-5)
            assert not torch.equal(model(ids).logits, model(ids).logits)
            torch.testing.assert_close(model.eval()(ids).logits, plain)
        assert torch.equal(model.train()(ids).logits, plain)
    assert not embedding._forward_hooks and not body._forward_hooks


def test_dropout_goes_after_an_exception_too_and_none_leaves_no_trace():
    model = language_model().model.train()
    with pytest.raises(RuntimeError), dropout_at_the_ends(model, 0.5):
        raise RuntimeError
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        want = model(ids).logits
        with dropout_at_the_ends(model, 0.0):
            assert torch.equal(model(ids).logits, want) and not backbone(model)._forward_hooks


def test_the_trainer_drops_out_while_it_trains_and_does_not_where_it_measures():
    lm, found = item_lm(), []
    ids = torch.tensor([[260, 261]])

    def count():
        with torch.no_grad():
            return (lm.model.get_input_embeddings()(ids) == 0).float().mean().item()

    class Look(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            found.append(count())

        on_step_end = on_substep_end

    trainer_of(lm, dropout=0.4, callbacks=[Look()]).train()
    assert np.mean(found) == pytest.approx(0.4, abs=0.1) and count() == 0


# Which weights are kept


def test_attention_on_a_cpu_is_eager_while_a_model_trains_and_as_before_afterwards():
    class Seen(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            seen.append(model.config._attn_implementation)

    seen, lm = [], item_lm()
    assert lm.model.config._attn_implementation == "sdpa"
    trainer_of(lm, callbacks=[Seen()]).train()
    assert set(seen) == {"eager"} and lm.model.config._attn_implementation == "sdpa"


class Weights:
    """Keeps the weights at each measurement, in turn of the values given."""

    def __init__(self, values):
        self.values, self.seen, self.modes = iter(values), [], []

    def __call__(self, model):
        self.seen.append({name: value.clone() for name, value in model.state_dict().items()})
        self.modes.append(model.training)
        model.eval()
        return next(self.values)


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize(
    ("values", "patience", "best", "measured"),
    [
        ([0.1, 0.5, 0.3, 0.2, 0.9], 2, 1, 4),
        ([0.1, 0.5, 0.3, 0.7, 0.6, 0.2, 0.9], 2, 3, 6),
        ([0.3, 0.2, 0.9], 1, 0, 2),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], 2, 7, 8),
    ],
)
def test_the_best_weights_come_back_and_patience_ends_the_run(tmp_path, rank, values, patience, best, measured):
    """Measured twice an epoch; with rows in few dimensions the matrices are those of the best factors."""
    lm, valid = item_lm(), Weights(values)
    with low_rank(trained_rows(lm.model), rank) if rank else nullcontext():
        trainer = trainer_of(
            lm, epochs=4.0, folder=tmp_path / "run", evaluate_every=0.5, valid=valid, patience=patience, dropout=0.1
        )
        train_or_resume(trainer, tmp_path / "run")
    assert len(valid.seen) == measured and all(valid.modes) and not (tmp_path / "run").exists()
    got, want = lm.model.state_dict(), valid.seen[best]
    if rank:
        for name in ("model.embed_tokens", "lm_head"):
            prefix = f"{name}.parametrizations.weight"
            base, left, right = (want.pop(f"{prefix}.{part}") for part in ("0.base", "original0", "original1"))
            want[f"{name}.weight"] = base + left @ right
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    assert any(not torch.equal(got[name], valid.seen[0].get(name, got[name])) for name in got) or best == 0
    logged = [row["eval_ndcg"] for row in trainer.state.log_history if "eval_ndcg" in row]
    assert logged == values[:measured]


def test_without_a_measure_the_last_weights_are_kept():
    lm = item_lm()
    trainer = trainer_of(lm, epochs=2.0)
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(lm.model.get_output_embeddings().weight.detach().clone())

    trainer.add_callback(Look())
    trainer.train()
    assert torch.equal(lm.model.get_output_embeddings().weight, seen[-1]) and not torch.equal(seen[-1], seen[0])
