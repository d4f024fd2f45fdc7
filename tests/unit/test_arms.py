"""Students from start to finish: schedules of several depths on one budget, and how alike two models rank."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from test_distillation import item_model, windows
from test_weighting import result
from tiny_lm import TITLES, language_model

from lwa_helpers import arms, paths
from lwa_helpers.arms import agreement, distilled_student, frontier, fused_student, teacher_signals
from lwa_helpers.config import load_config
from lwa_helpers.data.windows import Encoded
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation import Cases
from lwa_helpers.models import decoder_layers
from lwa_helpers.signals import TeacherSignals

CONFIG = load_config("smoke")


def section(**changes):
    own = {"n_layers": 2, "tokens_per_batch": 60, "bf16": False, "strategy": "fisher"}
    return CONFIG.distillation.model_copy(update=own | changes)


@pytest.fixture
def taught(monkeypatch, tmp_path):
    """(student's layers, teacher's layers, windows, epochs) of every distillation."""
    seen, distil = [], arms.distil

    def recording(start, signals, data, fisher, strategy, own, *args):
        seen.append((len(decoder_layers(start)), signals.n_layers, data, own.epochs))
        return distil(start, signals, data, fisher, strategy, own, *args)

    monkeypatch.setattr(arms, "distil", recording)
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    return seen


def made(steps, epochs):
    lm = language_model()
    data = windows(lm) * 2
    student, trainer = distilled_student(
        item_model(lm), lm, section(steps=steps, epochs=epochs), CONFIG.teacher, data, result([4.0, 3, 2, 1]), seed=0
    )
    return student, trainer, data


def test_one_step_has_the_whole_budget(taught):
    student, trainer, data = made([], 0.5)
    assert taught == [(2, 4, data, 0.5)] and trainer.model is student
    assert trainer.state.global_step == len(trainer.loader)


def test_a_short_budget_is_shared_by_windows(taught):
    student, _, data = made([3, 2], 1.0)
    (first, second) = taught
    assert first[:2] == (3, 4) and second[:2] == (2, 3) and len(decoder_layers(student)) == 2
    assert first[2] == data[::2] and second[2] == data[1::2] and first[3] == second[3] == 1.0


def test_a_long_budget_is_shared_by_epochs(taught):
    data = made([3, 2], 4.0)[2]
    assert [step[2:] for step in taught] == [(data, 2.0)] * 2


def test_a_selection_by_fisher_takes_the_scores(taught):
    lm = language_model()
    teacher, fisher = item_model(lm), result([1.0, 9, 2, 8])
    own = section(selection="top_fisher", epochs=1.0)
    student, _ = distilled_student(teacher, lm, own, CONFIG.teacher, windows(lm), fisher, seed=0)
    start = arms.student_ranker(teacher, lm, own, fisher)
    assert len(decoder_layers(student)) == len(decoder_layers(start)) == 2
    for place, layer in enumerate((1, 3)):
        kept, theirs = (decoder_layers(m)[i].state_dict() for m, i in ((start, place), (teacher, layer)))
        assert all((kept[name] == theirs[name]).all() for name in kept)
    with pytest.raises(LwaError, match="needs scores"):
        arms.student_ranker(teacher, lm, own)


def test_signals_of_a_section_are_cut_as_its_loss_says(taught):
    lm = language_model()
    loss = CONFIG.distillation.loss.model_copy(update={"top_k": 3, "temperature": 2.0})
    signals = teacher_signals(item_model(lm), windows(lm), section(loss=loss), lm, 0)
    assert signals.logits.shape[1] == 4 and signals.temperature == 2.0 and signals.hidden.shape[1] == 2


def test_students_of_several_depths_share_what_the_teacher_says_once(taught, monkeypatch):
    """The one of the section's own depth among them: whatever the others are, it is the student that it would be alone."""
    lm, asked, compute = language_model(), [], TeacherSignals.compute
    monkeypatch.setattr(TeacherSignals, "compute", lambda *args: asked.append(args[2]) or compute(*args))
    teacher, data, fisher = item_model(lm), windows(lm), result([4.0, 3, 2, 1])
    alone, _ = distilled_student(teacher, lm, section(epochs=1.0), CONFIG.teacher, data, fisher, seed=0)
    own = section(epochs=1.0, frontier=[9, 3, 2, 1], steps=[3, 2])
    students = frontier(teacher, lm, own, CONFIG.teacher, data, fisher, seed=0)
    assert {depth: len(decoder_layers(student)) for depth, student in students.items()} == {3: 3, 1: 1}
    again, _ = distilled_student(teacher, lm, own.model_copy(update={"steps": []}), CONFIG.teacher, data, fisher, seed=0)
    assert asked == [[2, 4], [1, 2, 3, 4]]  # layer_map of 9 layers names no others
    assert all((value == again.state_dict()[name]).all() for name, value in alone.state_dict().items())


class Nearby:
    """Scores an item by how near the newest one it stands in the catalogue, the next ones best."""

    def scores(self, histories):
        return np.array([[-((item - history[-1]) % len(TITLES)) for item in range(len(TITLES))] for history in histories], float)


class Valid:
    """The validation part of a task: three cases, of which the teacher ranks one first, one third, and one last."""

    asked = Cases(["a", "b", "c"], [[0], [3], [5]], np.array([1, 4, 0]))

    def ranks(self, model):
        return np.array([1, 3, 8])


def test_a_student_of_several_teachers_hears_each_by_its_validation_part(taught, monkeypatch):
    """Weights by hand: the teacher 1, 1/2 and 1/log2(9) of NDCG; the other ranks them 1, 1 and 3, seen items left out."""
    lm, said = language_model(), []
    teacher, distil = item_model(lm), arms.distil
    monkeypatch.setattr(arms, "distil", lambda start, signals, *args: said.append(signals) or distil(start, signals, *args))
    encoded = Encoded([1, 2], [lm.tokenizer(title + "\n")["input_ids"] for title in TITLES], {})
    data = [encoded.window("u", [4, 2, 7, 1], 1, last_text=False), encoded.window("v", [3, 5, 6], 1, last_text=False)]
    own = section(strategy="uniform", epochs=1.0)
    student, heard = fused_student(
        teacher, lm, own, CONFIG.teacher, data, {"nearby": Nearby()}, Valid(), result([1.0] * 4), seed=0
    )
    assert len(decoder_layers(student)) == 2 and list(heard) == ["teacher", "nearby"]
    scale, quality = heard["nearby"]
    assert heard["teacher"] == (1.0, pytest.approx((1 + 0.5 + 1 / np.log2(9)) / 3)) and quality == pytest.approx((2 + 0.5) / 3)
    scores, rows = Nearby().scores([[0], [3], [5]]), np.arange(3)

    def likelihood(s):
        return log_softmax(s * scores, axis=1)[rows, [1, 4, 0]].sum()

    assert likelihood(scale) > max(likelihood(0.9 * scale), likelihood(1.1 * scale))
    theirs = softmax(np.array(teacher_signals(teacher, data, own, lm, 0).logits, float), axis=1)
    others = softmax(scale * Nearby().scores([[4], [4, 2], [4, 2, 7], [3], [3, 5]]), axis=1)
    share = np.array([heard["teacher"][1], quality]) / (heard["teacher"][1] + quality)
    np.testing.assert_allclose(np.exp(np.array(said[0].logits, float)), share[0] * theirs + share[1] * others, rtol=2e-2, atol=1e-4)
    with pytest.raises(LwaError, match="one step"):
        fused_student(teacher, lm, section(steps=[3, 2]), CONFIG.teacher, data, {}, Valid(), result([1.0] * 4), seed=0)


def test_agreement_by_hand():
    teacher = np.array([[4.0, 3, 2, 1], [4, 3, 2, 1], [4, 3, 2, 1]])
    student = np.array([[4.0, 3, 1, 2], [1, 2, 3, 4], [1, 4, 3, 2]])
    alike = agreement(student, teacher, [[], [], [0]], k=2)
    np.testing.assert_allclose(alike.overlap, [1, 0, 1])
    np.testing.assert_allclose(alike.tau, [4 / 6, -1, 0])


def test_each_step_of_a_schedule_by_fisher_goes_by_the_scores_of_the_layers_it_has(taught, monkeypatch):
    """Of scores 1, 8, 2, 9 the first step keeps 8, 2, 9, its student's layers; the second 8 and 9, which are layers 0 and 2."""
    lm, layers, build = language_model(), [], arms.build_student

    def recording(teacher, *args, **kwargs):
        student = build(teacher, *args, **kwargs)
        theirs, its = (
            [layer.self_attn.q_proj.weight.tolist() for layer in decoder_layers(part.model)] for part in (teacher, student)
        )
        layers.append([theirs.index(weight) for weight in its])
        return student

    monkeypatch.setattr(arms, "build_student", recording)
    own = section(selection="top_fisher", steps=[3, 2], epochs=1.0)
    distilled_student(item_model(lm), lm, own, CONFIG.teacher, windows(lm), result([1.0, 8, 2, 9]), seed=0)
    assert layers == [[1, 2, 3], [0, 2]]
