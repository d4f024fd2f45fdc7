"""Students from start to finish: one budget, in steps or not, one teacher or several, and arms that share all else."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from tiny_lm import CUT, TITLES, distillation, item_lm, office_task, section, windows
from trained_students import same_weights, watch_training, weights

from lwa_helpers.config import load_config
from lwa_helpers.distillation import recipes
from lwa_helpers.distillation.recipes import Distillation, agreement, budget, co_taught_student, in_steps
from lwa_helpers.distillation.teacher_cache import TeacherOutputs
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.cross_fit import CrossFitted
from lwa_helpers.models.layers import decoder_layers
from lwa_helpers.ranking.head_transfer import carry_head, label_states

pytestmark = pytest.mark.usefixtures("cache")


def depth(lm):
    return len(decoder_layers(lm.model))


@pytest.fixture
def taught(monkeypatch):
    """(student's layers, teacher's layers, windows, epochs, outputs) of every distillation."""
    seen, train = [], Distillation.train

    def recording(self, student, strategy, outputs=None, **more):
        seen.append((depth(student), self.n_layers, list(self.windows), self.section.epochs, outputs))
        return train(self, student, strategy, outputs, **more)

    monkeypatch.setattr(Distillation, "train", recording)
    return seen


@pytest.fixture
def trained(monkeypatch):
    return watch_training(monkeypatch)


# The start


@pytest.mark.parametrize("selection", ["first", "uniform", "top_fisher"])
def test_a_student_starts_from_the_teachers_layers_and_its_head_carried_over(selection):
    teacher = item_lm()
    before, own = weights(teacher), distillation(teacher, selection=selection, per_layer=(1.0, 9, 2, 8))
    student = own.start(2)
    kept = {"first": (0, 1), "uniform": (0, 3), "top_fisher": (1, 3)}[selection]
    for mine, layer in zip(decoder_layers(student.model), kept, strict=True):
        theirs = decoder_layers(teacher.model)[layer].state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in mine.state_dict().items())
    assert torch.equal(student.model.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    want = item_lm(layers=2).model
    source, states = (label_states(lm.model, own.ordered, False) for lm in (teacher, student))
    carry_head(before["lm_head.weight"], source, want, states)
    torch.testing.assert_close(student.model.lm_head.weight, want.lm_head.weight, rtol=1e-2, atol=1e-2)
    assert not torch.equal(student.model.lm_head.weight, before["lm_head.weight"])
    assert same_weights(weights(teacher), before) and student.items == teacher.items


def test_a_student_of_all_layers_is_the_teacher_itself_at_first():
    teacher = item_lm()
    student = distillation(teacher).start(4)
    assert same_weights(weights(student), weights(teacher)) and student.model is not teacher.model


def test_a_selection_by_score_takes_other_scores_than_fisher_where_they_are_given():
    own = distillation(selection="top_fisher", per_layer=(9.0, 8, 1, 1))
    theirs, its = (decoder_layers(lm.model) for lm in (own.teacher, own.start(2, [0, 1, 2, 3])))
    for mine, layer in zip(its, theirs[2:], strict=True):
        assert torch.equal(mine.self_attn.q_proj.weight, layer.self_attn.q_proj.weight)


def test_without_fisher_information_only_what_needs_it_is_refused():
    own = replace(distillation(strategy="none"), fisher=None)
    student, trainer = own.student(2)
    assert depth(student) == 2 and trainer.weights is None
    with pytest.raises(LwaError, match="needs scores"):
        replace(distillation(selection="top_fisher"), fisher=None).start(2)
    with pytest.raises(LwaError, match="needs Fisher scores"):
        own.train(own.start(2), "fisher")


# The budget


def test_a_share_of_an_epoch_is_a_drawn_share_of_the_windows():
    data = windows(item_lm(), [(f"u{n}", [n % 8, (n + 1) % 8], 1) for n in range(60)])
    part, again, other = (budget(data, section(epochs=0.1), seed) for seed in (0, 0, 1))
    assert len(part) == 6 == len({window.user_id for window in part}) and part == again != other
    assert [data.index(window) for window in part] == sorted(data.index(window) for window in part)
    assert budget(data, section(epochs=3.0), 0) == budget(data, section(epochs=1.0), 0) == data
    assert len(budget(data, section(epochs=0.001), 0)) == 1


@pytest.mark.parametrize("epochs", [0.25, 1.0, 2.0])
def test_a_share_of_the_windows_is_passed_over_once(trained, epochs):
    own = distillation(cut=CUT * 6, tokens_per_batch=10, epochs=epochs)
    student, trainer = own.student(2)
    rows = [row for batch in trained[id(trainer)].batches for row in batch]
    assert sorted(rows) == sorted(list(range(18)) * round(max(1, epochs))) and depth(student) == 2


def stepwise(own):
    return in_steps(own, own.section.steps, own.section.selection, own.section.strategy)


def test_one_student_has_the_whole_budget(taught):
    own = distillation(epochs=1.0)
    student, trainer = own.student(2)
    assert [step[:4] for step in taught] == [(2, 4, own.windows, 1.0)] and trainer.model is student.model


def test_a_short_budget_is_shared_by_windows(taught):
    own = distillation(cut=CUT * 2, steps=[3, 2], epochs=1.0)
    student, _ = stepwise(own)
    first, second = taught
    assert first[:2] == (3, 4) and second[:2] == (2, 3) and depth(student) == 2
    assert first[2] == own.windows[::2] and second[2] == own.windows[1::2] and first[3] == second[3] == 1.0


def test_a_long_budget_is_shared_by_epochs(taught):
    own = distillation(steps=[3, 2], epochs=4.0)
    stepwise(own)
    assert [step[2:4] for step in taught] == [(own.windows, 2.0)] * 2


@pytest.mark.parametrize("epochs", [1.0, 1.5, 2.0, 3.0])
def test_steps_take_together_as_many_windows_as_one_student_alone(taught, epochs):
    own = distillation(cut=CUT * 4, steps=[4, 3, 2], epochs=epochs)
    stepwise(own)
    assert sum(len(step[2]) * step[3] for step in taught) == pytest.approx(epochs * len(own.windows))
    assert len(taught) == 3


def test_each_step_of_a_schedule_by_fisher_goes_by_the_scores_of_the_layers_it_has(taught, monkeypatch):
    """Of scores 1, 8, 2, 9 the first step keeps 8, 2, 9, its student's layers; the second 8 and 9: layers 0 and 2."""
    layers, build = [], recipes.build_student

    def recording(teacher, *args, **kwargs):
        student = build(teacher, *args, **kwargs)
        theirs, its = (
            [layer.self_attn.q_proj.weight.tolist() for layer in decoder_layers(lm.model)] for lm in (teacher, student)
        )
        layers.append([theirs.index(weight) for weight in its])
        return student

    monkeypatch.setattr(recipes, "build_student", recording)
    stepwise(distillation(selection="top_fisher", steps=[3, 2], per_layer=(1.0, 8, 2, 9)))
    assert layers == [[1, 2, 3], [0, 2]]


# The best weights


def test_a_student_keeps_its_best_weights_on_the_validation_part_and_stops_where_they_are_past():
    heads, scores = [], iter([0.1, 0.3, 0.2, 0.1, 0.9])

    def valid(model):
        heads.append(model.get_output_embeddings().weight.detach().clone())
        return next(scores)

    own = distillation(cut=CUT * 6, tokens_per_batch=10, epochs=8.0, evaluate_every=0.5, patience=2)
    student, _ = replace(own, valid=valid).student(2)
    assert len(heads) == 4  # two evaluations without a new best one end it
    torch.testing.assert_close(student.model.get_output_embeddings().weight, heads[1])
    assert not torch.equal(heads[1], heads[3])
    with pytest.raises(LwaError, match="evaluate_every of students needs a metric"):
        own.student(2)


# What the teacher says


def test_signals_of_a_section_are_cut_as_its_loss_says():
    loss = load_config("smoke").distillation.loss.model_copy(update={"top_k": 3, "temperature": 2.0})
    said = distillation(loss=loss, strategy="fisher").teacher_outputs
    assert said.logits.shape == (5, 4) and said.temperature == 2.0 and said.layers == [2, 4]


def test_students_of_several_depths_share_what_the_teacher_says_once(monkeypatch):
    """That of the section's own depth is what it would be alone; without states to match, the last layer's do."""
    asked, compute = [], TeacherOutputs.compute
    monkeypatch.setattr(TeacherOutputs, "compute", lambda *args: asked.append(args[2]) or compute(*args))
    alone, _ = distillation(strategy="fisher").student(2)
    shared = distillation(strategy="fisher", frontier=[9, 3, 2, 1])
    assert shared.section.depths == [9, 3, 2, 1]
    students = {n: shared.student(n)[0] for n in (3, 2, 1)}
    assert {n: depth(student) for n, student in students.items()} == {3: 3, 2: 2, 1: 1}
    assert asked == [[2, 4], [1, 2, 3, 4]]  # layer_map of 9 layers names no others
    assert same_weights(weights(alone), weights(students[2]))
    distillation(strategy="none", frontier=[3, 1]).student(2)
    assert asked[2:] == [[4]]


def test_the_order_of_the_same_windows_follows_the_seed(trained):
    for seed in (0, 1, 0):
        own = distillation(cut=CUT * 6, tokens_per_batch=10, seed=seed)
        own.train(own.start(2), "none")
    first, other, again = (found.batches for found in trained.values())
    assert first == again != other and len(first) == len(other)


# Several teachers


class Nearby:
    """Scores an item by how near the newest one it stands in the catalogue, the next ones best."""

    def __init__(self, sign=-1):
        self.sign = sign

    def scores(self, histories):
        away = np.arange(len(TITLES)) - np.array([[history[-1]] for history in histories])
        return self.sign * (away % len(TITLES)).astype(float)


def test_a_student_of_several_teachers_hears_each_by_its_validation_part(taught, tmp_path):
    """Probabilities by hand, on item columns alone: the teacher's, and the other's, each user's by its fit."""
    valid = office_task(tmp_path / "office", part="valid")
    asked = valid.eval_cases
    system = CrossFitted([Nearby(), Nearby(1)], {"u": 0, "v": 1, "w": 0} | dict.fromkeys(asked.user_ids, 0))
    own = distillation(valid.lm, strategy="uniform")
    student, heard = co_taught_student(own, {"nearby": system}, valid)
    assert depth(student) == 2 and list(heard) == ["teacher", "nearby"]

    def ndcg(scores):
        """From the order in which each user's unseen items are ranked."""
        found = []
        for row, (history, target) in enumerate(zip(asked.histories, asked.targets)):
            unseen = [item for item in np.argsort(-scores[row]) if item not in history]
            found.append(1 / np.log2(unseen.index(target) + 2))
        return np.mean(found)

    scores, rows = Nearby().scores(asked.histories), np.arange(len(asked.targets))
    assert heard["teacher"] == (1.0, pytest.approx(ndcg(valid.scores(valid.lm.model))))
    scale, quality = heard["nearby"]
    assert quality == pytest.approx(ndcg(scores)) == 1

    def likelihood(s):
        return log_softmax(s * scores, axis=1)[rows, asked.targets].sum()

    assert likelihood(scale) > max(likelihood(0.9 * scale), likelihood(1.1 * scale))
    items = own.teacher.items.tokens
    theirs = softmax(np.array(own.teacher_outputs.logits[:, items], float), axis=1)
    shown = [[0, 1, 2], [0, 1, 2, 3], [4], [7], [7, 6]]  # before the five targets
    scores = np.concatenate([Nearby().scores(shown[:2]), Nearby(1).scores(shown[2:3]), Nearby().scores(shown[3:])])
    others = softmax(scale * scores, axis=1)
    share = np.array([heard["teacher"][1], quality]) / (heard["teacher"][1] + quality)
    said = softmax(np.array(taught[0][4].logits, float), axis=1)
    np.testing.assert_allclose(said[:, items], share[0] * theirs + share[1] * others, rtol=2e-2, atol=1e-4)
    assert not said[:, : items.start].any() and said.shape == own.teacher_outputs.logits.shape


def test_several_teachers_need_all_that_the_teacher_says(tmp_path):
    loss = section().loss.model_copy(update={"top_k": 3})
    valid = office_task(tmp_path / "office", part="valid")
    with pytest.raises(LwaError, match="top_k=None"):
        co_taught_student(distillation(valid.lm, loss=loss), {"nearby": CrossFitted([Nearby()], {})}, valid)


def test_agreement_by_hand():
    teacher = np.array([[4.0, 3, 2, 1], [4, 3, 2, 1], [4, 3, 2, 1]])
    student = np.array([[4.0, 3, 1, 2], [1, 2, 3, 4], [1, 4, 3, 2]])
    alike = agreement(student, teacher, [[], [], [0]], k=2)
    np.testing.assert_allclose(alike.overlap, [1, 0, 1])
    np.testing.assert_allclose(alike.tau, [4 / 6, -1, 0])
