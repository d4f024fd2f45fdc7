"""Cached teacher signals: the teacher's own, cut to the likely items, reused while nothing changed, fused over teachers."""

import itertools

import numpy as np
import pytest
import torch
from test_distillation import item_model, windows
from tiny_lm import TITLES, language_model

import lwa_helpers.signals as signals_module
from lwa_helpers import DistillationTrainer, paths
from lwa_helpers.config import LossConfig
from lwa_helpers.data.windows import Encoded
from lwa_helpers.distillation import kl_divergence
from lwa_helpers.errors import LwaError
from lwa_helpers.fused_signals import fuse, recommender_signals
from lwa_helpers.signals import KEPT, TeacherSignals, TopLogits, in_half
from lwa_helpers.tuning import window_loader


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "signals"


@pytest.fixture
def calls(monkeypatch):
    """How often a model has been asked for its signals."""
    counted, asked = [], signals_module.signals

    def counting(*args):
        counted.append(1)
        return asked(*args)

    monkeypatch.setattr(signals_module, "signals", counting)
    return counted


def ordered(lm, data=None, tokens=60):
    return window_loader(data or windows(lm), tokens, 0, 0, shuffle=False)


def test_the_teacher_runs_again_only_when_something_changed(cache, calls):
    lm = language_model()
    teacher, batches = item_model(lm), ordered(lm)

    def made(teacher=teacher, batches=batches, layers=(2, 4), **options):
        before = len(calls)
        TeacherSignals.cached(teacher, batches, list(layers), **{"bf16": False} | options)
        return len(calls) > before

    assert made() and not made() and not made(ordered(lm) and teacher, ordered(lm))
    assert made(layers=(1, 4)) and made(top_k=3) and made(top_k=3, temperature=2.0) and made(bf16=True)
    assert not made(temperature=2.0)  # all logits are kept, whatever the temperature
    assert made(batches=ordered(lm, windows(lm)[:2])) and made(batches=ordered(lm, tokens=1))
    with torch.no_grad():
        teacher.head.bias[3] += 1e-6
    assert made() and not made()
    teacher.config.rms_norm_eps *= 2
    assert made()


def test_a_run_that_fails_leaves_nothing_and_old_signals_go(cache, monkeypatch):
    lm = language_model()
    teacher = item_model(lm)
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            TeacherSignals.cached(teacher, ordered(lm), [4], bf16=False)
    assert list(cache.iterdir()) == []
    for layer in range(KEPT + 2):
        TeacherSignals.cached(teacher, ordered(lm), [layer % 4 + 1] * (1 + layer), bf16=False)
    assert len(list(cache.iterdir())) == KEPT


def test_signals_are_mapped_from_disk_in_half_precision(tmp_path):
    lm = language_model()
    signals = TeacherSignals.compute(item_model(lm), ordered(lm), [2, 4], tmp_path / "s", bf16=False, top_k=3)
    expected = ((signals.logits, (5, 4), "f2"), (signals.hidden, (5, 2, 32), "f2"), (signals.items, (5, 3), "i4"))
    for array, shape, kind in expected:
        assert isinstance(array, np.memmap) and array.shape == shape and array.dtype == kind
    with pytest.raises(LwaError, match="at least one window"):
        TeacherSignals.compute(item_model(lm), [], [2], tmp_path / "t", bf16=False)
    with pytest.raises(LwaError, match="read only once"):
        TeacherSignals.compute(item_model(lm), iter(list(ordered(lm))), [2], tmp_path / "u", bf16=False)
    assert not (tmp_path / "u").exists()


def test_states_beyond_half_precision_keep_their_direction():
    """Gemma's inner states grow that large; an infinite one would make the loss NaN."""
    small, large = torch.tensor([[[1.0, -3.5], [60000.0, 0.25]]]), torch.tensor([[[3e5, -4e5], [1.0, 7e4]]])
    torch.testing.assert_close(in_half(small), small.half(), rtol=0, atol=0)
    stored = in_half(large).float()
    assert stored.isfinite().all()
    torch.testing.assert_close(torch.cosine_similarity(stored, large, dim=-1), torch.ones(1, 2))


def test_kl_over_the_likely_items_and_the_rest_by_hand():
    """p = (.5, .3, .15, .05), q = (.4, .4, .1, .1), k = 2: classes .5, .3, .2 against .4, .4, .2."""
    p, q = (torch.tensor([row]).log() for row in ([0.5, 0.3, 0.15, 0.05], [0.4, 0.4, 0.1, 0.1]))
    want = 0.5 * np.log(0.5 / 0.4) + 0.3 * np.log(0.3 / 0.4)
    assert kl_divergence(q + 3, TopLogits.of(p - 7, 2, 1.0), 1.0).item() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_cut_kl_grows_to_the_full_one(temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 9), 3 * torch.randn(6, 9)
    full = kl_divergence(student, teacher, temperature).item()
    cut = [kl_divergence(student, TopLogits.of(teacher, k, temperature), temperature).item() for k in range(1, 9)]
    assert all(a <= b + 1e-6 for a, b in itertools.pairwise(cut)) and cut[0] < full
    assert cut[-1] == pytest.approx(full, rel=1e-4)  # eight of nine items and the ninth alone


def test_the_loss_on_cached_likely_items_is_that_of_the_live_teacher(tmp_path):
    lm = language_model()
    teacher, student = item_model(lm), item_model(language_model(layers=2), seed=1)
    data, loss = windows(lm), LossConfig(alpha=1.0, temperature=2.0, beta=0.0)
    signals = TeacherSignals.compute(teacher, ordered(lm, data), [2, 4], tmp_path / "s", False, top_k=7, temperature=2.0)
    live = DistillationTrainer(teacher, student, strategy="none", loss=loss)
    cached = DistillationTrainer(signals, student, strategy="none", loss=loss)
    cut = loss.model_copy(update={"top_k": 2})
    few = TeacherSignals.compute(teacher, ordered(lm, data), [2, 4], tmp_path / "f", False, top_k=2, temperature=2.0)
    lively = DistillationTrainer(teacher, student, strategy="none", loss=cut)
    stored = DistillationTrainer(few, student, strategy="none", loss=cut)
    for batch in window_loader(data, 60, 0, seed=3):
        for one, other in ((cached, live), (stored, lively)):
            want = other.compute_loss(student, batch).item()
            assert one.compute_loss(student, batch).item() == pytest.approx(want, rel=5e-3, abs=1e-6)
    whole = TeacherSignals.compute(teacher, ordered(lm, data), [2, 4], tmp_path / "w", False, top_k=8)
    assert whole.items is None and whole.logits.shape == (5, 8)
    with pytest.raises(LwaError, match=r"layers \[2, 4\]; a student of 3 is matched to \[1, 3, 4\]"):
        DistillationTrainer(whole, item_model(language_model(layers=3)), strategy="uniform", loss=loss)
    with pytest.raises(LwaError, match="at temperature 2.0, the loss has 1.0"):
        DistillationTrainer(signals, student, strategy="none", loss=LossConfig(alpha=1.0, temperature=1.0, beta=0.0))


@pytest.mark.parametrize("top_k", [None, 20])
def test_a_causal_lm_is_cached_as_it_speaks_at_its_labels(tmp_path, top_k):
    """The title head's loss: tokens of titles in place of items."""
    teacher, student = language_model(), language_model(layers=2, seed=1).model
    data, loss = windows(teacher), LossConfig(alpha=0.7, temperature=2.0, beta=0.5, top_k=top_k)
    batches = ordered(teacher, data)
    layers, folder = [2, 4], tmp_path / "s"
    signals = TeacherSignals.compute(teacher.model, batches, layers, folder, bf16=False, top_k=top_k, temperature=2.0)
    tokens = sum(len(window.input_ids) - 1 - next(i for i, x in enumerate(window.item_labels) if x != -100) for window in data)
    assert signals.logits.shape == (tokens, top_k + 1 if top_k else teacher.model.config.vocab_size) and signals.hidden.shape == (tokens, 2, 32)
    live = DistillationTrainer(teacher, student, strategy="uniform", loss=loss)
    cached = DistillationTrainer(signals, student, strategy="uniform", loss=loss)
    for batch in window_loader(data, 60, 0, seed=3):
        assert cached.compute_loss(student, batch).item() == pytest.approx(live.compute_loss(student, batch).item(), rel=5e-3)


def test_batches_that_do_not_say_which_windows_they_hold_are_named(tmp_path):
    lm = language_model()
    batches = [{key: value for key, value in batch.items() if key != "window"} for batch in ordered(lm, windows(lm))]
    with pytest.raises(LwaError, match="window_loader"):
        TeacherSignals.compute(item_model(lm), batches, [2, 4], tmp_path / "s", bf16=False)
    signals = TeacherSignals.compute(item_model(lm), ordered(lm, windows(lm)), [2, 4], tmp_path / "s", bf16=False)
    student = item_model(language_model(layers=2))
    with pytest.raises(LwaError, match="window_loader"):
        DistillationTrainer(signals, student, strategy="none").compute_loss(student, batches[0])


def test_fused_teachers_are_the_weighted_mean_of_their_probabilities(tmp_path):
    """Two teachers of other widths, one with its texts in another order of tokens: a position is a target in both."""
    small, wide = language_model(), language_model(hidden=48, seed=3)
    teachers = [item_model(small), item_model(wide, seed=5)]
    parts = [
        TeacherSignals.compute(t, ordered(small), [2, 4], tmp_path / str(i), bf16=False) for i, t in enumerate(teachers)
    ]
    fused = fuse(parts, [0.3, 0.1], tmp_path / "fused")
    p = [torch.from_numpy(np.array(s.logits, dtype=np.float32)).softmax(-1).numpy() for s in parts]
    np.testing.assert_allclose(np.exp(np.array(fused.logits, dtype=np.float32)), 0.75 * p[0] + 0.25 * p[1], rtol=1e-2)
    np.testing.assert_array_equal(fused.hidden, parts[0].hidden)
    student = item_model(language_model(layers=2), seed=1)
    trainer = DistillationTrainer(fused, student, strategy="uniform")
    assert np.isfinite(trainer.compute_loss(student, next(iter(ordered(small)))).item())


class Counting:
    """Scores an item by how often it stands in the history, and 10 for the newest."""

    def scores(self, histories):
        return np.array([[h.count(item) + 10.0 * (h[-1:] == [item]) for item in range(len(TITLES))] for h in histories])


def test_a_recommender_speaks_at_the_targets_of_the_windows_from_the_items_they_show(tmp_path):
    """Two users by hand; the second's first title is a target too, with nothing before it."""
    lm = language_model()
    encoded = Encoded([1, 2], [lm.tokenizer(title + "\n")["input_ids"] for title in TITLES], {})
    data = [encoded.window("u", [4, 2, 4, 7, 1], 3, last_text=False), encoded.window("v", [3, 5], 0, last_text=False)]
    assert [window.histories() for window in data] == [[[4, 2, 4], [4, 2, 4, 7]], [[], [3]]]
    like = TeacherSignals.compute(item_model(lm), ordered(lm, data), [2, 4], tmp_path / "like", bf16=False)
    got = recommender_signals(Counting(), data, like, tmp_path / "said", scale=0.5)
    want = np.zeros((4, len(TITLES)))
    want[0, [4, 2]], want[1, [4, 2, 7]], want[3, 3] = [6, 0.5], [1, 0.5, 5.5], 5.5
    np.testing.assert_array_equal(got.logits, want)
    np.testing.assert_array_equal(got.hidden, like.hidden)
    both = fuse([like, got], [1, 1], tmp_path / "both")
    assert both.logits.shape == like.logits.shape
    with pytest.raises(ValueError, match="names 0 items"):
        windows(lm)[0].histories()
    with pytest.raises(LwaError, match="have 2 targets, the signals 4"):
        recommender_signals(Counting(), data[:1], like, tmp_path / "few")
    cut = TeacherSignals.compute(item_model(lm), ordered(lm, data), [2, 4], tmp_path / "cut", bf16=False, top_k=2)
    with pytest.raises(LwaError, match="top_k=None"):
        recommender_signals(Counting(), data, cut, tmp_path / "other")


def test_signals_that_cannot_be_fused_are_named(tmp_path):
    lm = language_model()
    teacher = item_model(lm)
    a = TeacherSignals.compute(teacher, ordered(lm), [4], tmp_path / "a", bf16=False)
    fewer = TeacherSignals.compute(teacher, ordered(lm, windows(lm)[:2]), [4], tmp_path / "b", bf16=False)
    cut = TeacherSignals.compute(teacher, ordered(lm), [4], tmp_path / "c", bf16=False, top_k=2)
    for parts, weights, message in (
        ([a, fewer], [1, 1], "same windows"), ([a, cut], [1, 1], "top_k=None"), ([a, a], [1], "2 finite numbers"),
        ([], [], "0 finite numbers"), ([a, a], [0, 0], "not all zero"), ([a, a], [1, -1], ">= 0"),
    ):
        with pytest.raises(LwaError, match=message):
            fuse(parts, weights, tmp_path / "fused")
