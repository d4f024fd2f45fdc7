"""Cached teacher outputs: the teacher's own, cut to likely items, reused while nothing changed, fused over teachers."""

import itertools

import numpy as np
import pytest
import torch
from scipy.special import softmax
from tiny_lm import TITLES, item_lm, language_model, reading_of, windows

from lwa_helpers import DistillationTrainer
from lwa_helpers.configs.students import LossConfig
from lwa_helpers.data.windows import window_of
from lwa_helpers.distillation import teacher_cache
from lwa_helpers.distillation.ensemble import average_outputs, recommender_outputs
from lwa_helpers.distillation.losses import kl_divergence
from lwa_helpers.distillation.teacher_cache import KEPT, TeacherOutputs, TopLogits, in_half
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.cross_fit import CrossFitted
from lwa_helpers.ranking.training import window_loader


@pytest.fixture
def calls(monkeypatch):
    """How often a model has been asked for its outputs."""
    counted, asked = [], teacher_cache.label_outputs

    def counting(*args, **options):
        counted.append(1)
        return asked(*args, **options)

    monkeypatch.setattr(teacher_cache, "label_outputs", counting)
    return counted


def ordered(lm, data=None, tokens=60):
    return window_loader(data or windows(lm), tokens, 0, 0, shuffle=False)


def test_the_teacher_runs_again_only_when_something_changed(cache, calls):
    lm = item_lm()
    teacher, batches = lm.model, ordered(lm)

    def made(teacher=teacher, batches=batches, layers=(2, 4), **options):
        before = len(calls)
        TeacherOutputs.cached(teacher, batches, list(layers), **{"bf16": False} | options)
        return len(calls) > before

    assert made() and not made() and not made(ordered(lm) and teacher, ordered(lm))
    assert made(layers=(1, 4)) and made(top_k=3) and made(top_k=3, temperature=2.0) and made(bf16=True)
    assert not made(temperature=2.0)  # all logits are kept, whatever the temperature
    assert made(batches=ordered(lm, windows(lm)[:2])) and made(batches=ordered(lm, tokens=1))
    with torch.no_grad():
        teacher.lm_head.weight[3, 0] += 1e-6
    assert made() and not made()
    teacher.config.rms_norm_eps *= 2
    assert made()


def test_a_run_that_fails_leaves_nothing_and_old_signals_go(cache, monkeypatch):
    lm = item_lm()
    teacher, outputs = lm.model, cache / "teacher_outputs"
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            TeacherOutputs.cached(teacher, ordered(lm), [4], bf16=False)
    assert list(outputs.iterdir()) == []
    for layer in range(KEPT + 2):
        TeacherOutputs.cached(teacher, ordered(lm), [layer % 4 + 1] * (1 + layer), bf16=False)
    assert len(list(outputs.iterdir())) == KEPT


def test_signals_are_mapped_from_disk_in_half_precision(tmp_path):
    lm = item_lm()
    outputs = TeacherOutputs.compute(lm.model, ordered(lm), [2, 4], tmp_path / "s", bf16=False, top_k=3)
    expected = ((outputs.logits, (5, 4), "f2"), (outputs.hidden, (5, 2, 32), "f2"), (outputs.items, (5, 3), "i4"))
    for array, shape, kind in expected:
        assert isinstance(array, np.memmap) and array.shape == shape and array.dtype == kind
    with pytest.raises(LwaError, match="at least one window"):
        TeacherOutputs.compute(lm.model, [], [2], tmp_path / "t", bf16=False)
    with pytest.raises(LwaError, match="read only once"):
        TeacherOutputs.compute(lm.model, iter(list(ordered(lm))), [2], tmp_path / "u", bf16=False)
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
    lm = item_lm()
    teacher, student = lm.model, item_lm(layers=2, seed=1).model
    data, loss = windows(lm), LossConfig(alpha=1.0, temperature=2.0, beta=0.0)
    most, batches = teacher.config.vocab_size - 1, ordered(lm, data)
    outputs = TeacherOutputs.compute(teacher, batches, [2, 4], tmp_path / "s", False, top_k=most, temperature=2.0)
    live = DistillationTrainer(teacher, student, strategy="none", loss=loss)
    cached = DistillationTrainer(outputs, student, strategy="none", loss=loss)
    cut = loss.model_copy(update={"top_k": 2})
    few = TeacherOutputs.compute(teacher, batches, [2, 4], tmp_path / "f", False, top_k=2, temperature=2.0)
    lively = DistillationTrainer(teacher, student, strategy="none", loss=cut)
    stored = DistillationTrainer(few, student, strategy="none", loss=cut)
    for batch in window_loader(data, 60, 0, seed=3):
        for one, other in ((cached, live), (stored, lively)):
            want = other.compute_loss(student, batch).item()
            assert one.compute_loss(student, batch).item() == pytest.approx(want, rel=5e-3, abs=1e-6)
    whole = TeacherOutputs.compute(teacher, batches, [2, 4], tmp_path / "w", False, top_k=most + 1)
    assert whole.items is None and whole.logits.shape == (5, most + 1)
    with pytest.raises(LwaError, match=r"layers \[2, 4\]; a student of 3 is matched to \[1, 3, 4\]"):
        DistillationTrainer(whole, item_lm(layers=3), strategy="uniform", loss=loss)
    with pytest.raises(LwaError, match="at temperature 2.0, the loss has 1.0"):
        DistillationTrainer(outputs, student, strategy="none", loss=LossConfig(alpha=1.0, temperature=1.0, beta=0.0))


@pytest.mark.parametrize("top_k", [None, 20])
def test_a_model_of_text_alone_is_cached_as_it_speaks_at_its_labels(tmp_path, top_k):
    """The title head's loss: tokens of titles in place of items."""
    teacher, student = language_model(), language_model(layers=2, seed=1).model
    data, loss = windows(teacher), LossConfig(alpha=0.7, temperature=2.0, beta=0.5, top_k=top_k)
    batches = ordered(teacher, data)
    layers, folder = [2, 4], tmp_path / "s"
    outputs = TeacherOutputs.compute(teacher.model, batches, layers, folder, bf16=False, top_k=top_k, temperature=2.0)
    tokens = len(teacher.tokenizer("".join(TITLES[item] + "\n" for item in (3, 4, 5, 6, 1)))["input_ids"])
    assert outputs.logits.shape == (tokens, top_k + 1 if top_k else teacher.model.config.vocab_size)
    assert outputs.hidden.shape == (tokens, 2, 32)
    live = DistillationTrainer(teacher, student, strategy="uniform", loss=loss)
    cached = DistillationTrainer(outputs, student, strategy="uniform", loss=loss)
    for batch in window_loader(data, 60, 0, seed=3):
        want = live.compute_loss(student, batch).item()
        assert cached.compute_loss(student, batch).item() == pytest.approx(want, rel=5e-3)


def test_batches_that_do_not_say_which_windows_they_hold_are_named(tmp_path):
    lm = item_lm()
    batches = [{key: value for key, value in batch.items() if key != "window"} for batch in ordered(lm, windows(lm))]
    with pytest.raises(LwaError, match="window_loader"):
        TeacherOutputs.compute(lm.model, batches, [2, 4], tmp_path / "s", bf16=False)
    outputs = TeacherOutputs.compute(lm.model, ordered(lm, windows(lm)), [2, 4], tmp_path / "s", bf16=False)
    student = item_lm(layers=2).model
    with pytest.raises(LwaError, match="window_loader"):
        DistillationTrainer(outputs, student, strategy="none").compute_loss(student, batches[0])


def test_fused_teachers_are_the_weighted_mean_of_their_probabilities_of_items(tmp_path):
    """Two teachers of other widths, readings and vocabularies: a position is a target in both, and an item an item."""
    small, wide = item_lm(), item_lm("titles", hidden=48, seed=3)
    parts = [
        TeacherOutputs.compute(lm.model, ordered(lm), [2, 4], tmp_path / str(i), bf16=False)
        for i, lm in enumerate((small, wide))
    ]
    items = [lm.items.tokens for lm in (small, wide)]
    assert items[0] != items[1] and parts[0].logits.shape != parts[1].logits.shape
    fused = average_outputs(parts, [0.3, 0.1], tmp_path / "fused", items)
    p = [softmax(np.array(part.logits[:, own], dtype=float), axis=1) for part, own in zip(parts, items)]
    got = softmax(np.array(fused.logits, dtype=float), axis=1)
    np.testing.assert_allclose(got[:, items[0]], 0.75 * p[0] + 0.25 * p[1], rtol=1e-2, atol=1e-7)
    assert fused.logits.shape == parts[0].logits.shape and not got[:, : small.items.first].any()
    np.testing.assert_array_equal(fused.hidden, parts[0].hidden)
    student = item_lm(layers=2, seed=1).model
    trainer = DistillationTrainer(fused, student, strategy="uniform")
    assert np.isfinite(trainer.compute_loss(student, next(iter(ordered(small)))).item())


class Counting:
    """Scores an item by how often it stands in the history, and `newest` for the newest."""

    def __init__(self, newest):
        self.newest = newest

    def scores(self, histories):
        rows = [[h.count(item) + self.newest * (h[-1:] == [item]) for item in range(len(TITLES))] for h in histories]
        return np.array(rows, dtype=float)


def test_a_recommender_speaks_at_the_targets_of_the_windows_from_the_items_they_show(tmp_path):
    """Three users by hand, each answered by the fit that has not seen them; before the first title there is nothing."""
    lm = item_lm("titles")
    how, system = reading_of(lm), CrossFitted([Counting(10.0), Counting(20.0)], {"u": 0, "v": 1})
    cut = [("u", [4, 2, 4, 7, 1], 3), ("v", [3, 5], 0), ("w", [6, 0], 1)]
    data = [window_of(how, *row) for row in cut]
    assert [window.histories() for window in data] == [[[4, 2, 4], [4, 2, 4, 7]], [[], [3]], [[6]]]
    like = TeacherOutputs.compute(lm.model, ordered(lm, data), [2, 4], tmp_path / "like", bf16=False)
    got = recommender_outputs(system, data, like, tmp_path / "said", lm.items.tokens, scale=0.5)
    want = np.zeros((5, len(TITLES)))
    want[0, [4, 2]], want[1, [4, 2, 7]], want[3, 3], want[4, 6] = [6, 0.5], [1, 0.5, 5.5], 10.5, 5.5
    np.testing.assert_array_equal(got.logits[:, lm.items.tokens], want)
    p = torch.from_numpy(np.array(got.logits)).float().softmax(-1)
    assert not p[:, : lm.items.first].any() and (p[:, lm.items.tokens] > 0).all()
    np.testing.assert_array_equal(got.hidden, like.hidden)
    both = average_outputs([like, got], [1, 1], tmp_path / "both", [lm.items.tokens] * 2)
    assert both.logits.shape == like.logits.shape and np.isfinite(both.logits).all()
    with pytest.raises(LwaError, match="have 2 targets, the outputs 5"):
        recommender_outputs(system, data[:1], like, tmp_path / "few", lm.items.tokens)
    cut = TeacherOutputs.compute(lm.model, ordered(lm, data), [2, 4], tmp_path / "cut", bf16=False, top_k=2)
    with pytest.raises(LwaError, match="top_k=None"):
        recommender_outputs(system, data, cut, tmp_path / "other", lm.items.tokens)


def test_signals_that_cannot_be_fused_are_named(tmp_path):
    lm = item_lm()
    teacher = lm.model
    a = TeacherOutputs.compute(teacher, ordered(lm), [4], tmp_path / "a", bf16=False)
    fewer = TeacherOutputs.compute(teacher, ordered(lm, windows(lm)[:2]), [4], tmp_path / "b", bf16=False)
    cut = TeacherOutputs.compute(teacher, ordered(lm), [4], tmp_path / "c", bf16=False, top_k=2)
    for parts, weights, message in (
        ([a, fewer], [1, 1], "same windows"),
        ([a, cut], [1, 1], "top_k=None"),
        ([a, a], [1], "2 finite numbers"),
        ([], [], "0 finite numbers"),
        ([a, a], [0, 0], "not all zero"),
        ([a, a], [1, -1], ">= 0"),
    ):
        with pytest.raises(LwaError, match=message):
            average_outputs(parts, weights, tmp_path / "fused", [lm.items.tokens] * len(parts))
    with pytest.raises(LwaError, match="same catalogue"):
        fewer = slice(lm.items.first, lm.items.first + 7)
        average_outputs([a, a], [1, 1], tmp_path / "fused", [lm.items.tokens, fewer])
