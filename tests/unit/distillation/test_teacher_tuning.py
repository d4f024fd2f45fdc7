"""A model given items and tuned on a shop whose users go round the catalogue: each step by hand or brute force."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cold_rows_oracle import brute_force, with_popularity
from tiny_lm import READINGS, TITLES, language_model, office_config

from lwa_helpers import build_student
from lwa_helpers.data.interactions import Interactions
from lwa_helpers.data.loading import load_data
from lwa_helpers.data.windows import collate
from lwa_helpers.distillation import teacher_tuning
from lwa_helpers.distillation.recipes import calibrations
from lwa_helpers.distillation.teacher_tuning import (
    item_model,
    proposal,
    reinitialised,
    shallow_model,
    start_from_shallow,
    train,
    tune,
    write_cold_rows,
)
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.cross_fit import CrossFitted
from lwa_helpers.evaluation.metrics import ndcg_at_k
from lwa_helpers.models.item_tokens import title_rows
from lwa_helpers.models.layers import decoder_layers
from lwa_helpers.ranking.head_transfer import carry_head, label_states
from lwa_helpers.ranking.item_head import sampled_nll
from lwa_helpers.ranking.task import RankingTask

pytestmark = pytest.mark.usefixtures("cache")
COLD = "i5"
OWN = {
    "windows_per_user": None,
    "epochs": 3.0,
    "tokens_per_batch": 60,
    "learning_rate": 5e-3,
    "head_learning_rate": 2e-2,
    "rank": 8,
    "dropout": 0.0,
    "bf16": False,
    "first_layers": 0,
    "first_epochs": 6.0,
    "first_learning_rate": 5e-3,
    "first_dropout": 0.0,
}


def vectors_of(n, width=6):
    return np.random.default_rng(0).normal(size=(n, width))


def without(data: Interactions) -> Interactions:
    """The dataset with an item that nobody has chosen in the train part, and others of different popularity."""
    train = data.train[data.train.parent_asin != COLD]
    place, age = train.parent_asin.str[1:].astype(int), train.groupby("parent_asin").cumcount()
    return replace(data, train=train[age >= place].reset_index(drop=True))


def task_and_section(folder, reading="items", cold=False, **changes):
    """The task of a model that is not tuned yet, and a section for one so small."""
    config = office_config(folder, data__reading=reading, data__text_items=2, evaluation__bf16=False)
    data = load_data(config.data)
    data = without(data) if cold else data
    lm = item_model(language_model(layers=3), data, vectors_of(8), config.data, config.evaluation, 0)
    section = config.teacher.model_copy(update=OWN | changes)
    return RankingTask(data, lm, config.data, config.evaluation, 0), section


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model, before):
    """Names of the parameters that are no longer what they were."""
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def ndcg(task):
    return ndcg_at_k(task.ranks(task.lm.model), 10).mean()


ENDS = {"model.embed_tokens.weight", "lm_head.weight"}


# The rows that items begin with


@pytest.mark.parametrize("reading", READINGS)
def test_rows_of_an_untuned_model_by_least_squares(tmp_path, reading):
    task, _ = task_and_section(tmp_path / "office", reading, cold=True)
    lm, full = task.lm, language_model(layers=3)
    assert lm.items.ids == task.data.item_ids and lm.items.reading == reading and task.data.titles == TITLES
    assert lm.items.text_items == (2 if reading == "hybrid" else 0)
    assert lm.items.history_items == task.evaluation.history_items
    titles, vectors, counts = title_rows(full, TITLES).numpy(), vectors_of(8), task.data.counts
    known, cold = counts > 0, task.data.item_ids.index(COLD)
    assert counts[cold] == 0 and known.sum() == 7
    vectors, _ = brute_force(vectors, counts, with_popularity(titles, counts))
    outputs = lm.model.get_output_embeddings().weight.detach().numpy()[lm.items.tokens]
    mapped = np.linalg.lstsq(vectors[known], outputs[known], rcond=None)[0]
    np.testing.assert_allclose(outputs, vectors @ mapped, atol=1e-5)  # the cold item's too, by the same map
    assert mapped.std() == pytest.approx(teacher_tuning.HEAD_SCALE, rel=0.2)
    shrink = np.sqrt(teacher_tuning.RIDGE * (vectors**2).sum(0).mean()) * np.eye(6)
    to_titles = np.linalg.lstsq(np.vstack([vectors, shrink]), np.vstack([titles, np.zeros((6, 32))]), rcond=None)[0]
    inputs = lm.model.get_input_embeddings().weight.detach().numpy()[lm.items.tokens]
    np.testing.assert_allclose(inputs, titles + vectors @ to_titles, atol=1e-4)


def test_the_seed_draws_the_head_alone(tmp_path):
    config = office_config(tmp_path / "office")
    data, full = load_data(config.data), language_model(layers=3)
    first, again, other = (
        weights(item_model(full, data, vectors_of(8), config.data, config.evaluation, seed).model) for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert {name for name in first if not torch.equal(first[name], other[name])} == {"lm_head.weight"}


@pytest.mark.parametrize("reading", READINGS)
def test_the_vocabulary_holds_what_is_read_and_no_more(tmp_path, reading):
    task, _ = task_and_section(tmp_path / "office", reading)
    alphabet, full = 257, len(language_model().tokenizer)
    first = task.lm.items.first
    assert first == alphabet if reading == "items" else alphabet < first <= full + alphabet
    text = task.lm.tokenizer.decode([token for token in task.reading.prompt([3, 1]) if token < first])
    assert text == ("" if reading == "items" else "Products this person bought, in order:\nÉté à Paris\nGoldenEye\n")


def test_a_model_of_other_weights_is_drawn_anew_in_all_of_them():
    full = language_model(tie_word_embeddings=True)
    first, again, other = (reinitialised(full, seed) for seed in (7, 7, 8))
    old, new = weights(full.model), weights(first.model)
    drawn = {name for name in new if "norm" not in name}
    assert changed(first.model, old) == changed(other.model, new) == drawn and not changed(again.model, new)
    assert first.model.get_output_embeddings().weight is first.model.get_input_embeddings().weight
    assert first.tokenizer is full.tokenizer and first.model.dtype == full.model.dtype and not first.model.training
    for name in drawn:
        assert new[name].std().item() == pytest.approx(old[name].std().item(), rel=0.3)


# Tuning


@pytest.mark.parametrize("first_layers", [0, 2, 3])
@pytest.mark.parametrize("reading", READINGS)
def test_a_tuned_model_knows_the_catalogue_and_of_items_the_way_round_it(tmp_path, reading, first_layers):
    task, section = task_and_section(tmp_path / "office", reading, first_layers=first_layers)
    before, windows = ndcg(task), collate(task.train_windows(section), 0)

    def loss():
        with torch.no_grad():
            return task.lm.model.eval()(**windows).loss.item()

    assert loss() == pytest.approx(np.log(task.lm.model.config.vocab_size), abs=0.2)  # it knows nothing at first
    trainer = tune(task, section, seed=0)
    assert loss() < 3 and (reading != "items" or ndcg(task) > before + 0.2)
    assert trainer.model is task.lm.model and trainer.state.global_step == round(3 * len(task.train_loader(section, 0)))
    assert set(task.lm.model.state_dict()) == set(weights(language_model(layers=3).model))


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path):
    found = []
    for seed in (0, 0, 1):
        task, section = task_and_section(tmp_path / "office", first_layers=1, dropout=0.2, epochs=1.0, first_epochs=1.0)
        tune(task, section, seed)
        found.append(weights(task.lm.model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not torch.equal(found[0]["lm_head.weight"], found[2]["lm_head.weight"])


def test_what_is_fitted_behind_the_first_layers_is_carried_to_all(tmp_path):
    """Oracle: the same model of two layers trained by itself, its parts put in by hand."""
    task, section = task_and_section(tmp_path / "office", first_layers=2, first_dropout=0.1)
    before = weights(task.lm.model)
    few = build_student(task.lm, 2, "first")
    short = section.model_copy(update={"epochs": 6.0, "learning_rate": section.first_learning_rate, "dropout": 0.1})
    train(task, few, short, 3)
    start_from_shallow(task, shallow_model(task, section, 3), section, 3)
    got, fitted = weights(task.lm.model), weights(few.model)
    third = {name for name in got if ".layers.2." in name}
    assert all(torch.equal(got[name], before[name]) for name in third | {"model.norm.weight"})
    for name in fitted.keys() - {"lm_head.weight", "model.norm.weight"}:
        assert torch.equal(got[name], fitted[name]) and (not torch.equal(got[name], before[name]))
    loader = list(task.train_loader(section, 0))
    source, states = (label_states(model, loader, False) for model in (few.model, task.lm.model))
    want = build_student(task.lm, 3, "first").model
    carry_head(fitted["lm_head.weight"], source, want, states)
    torch.testing.assert_close(got["lm_head.weight"], want.lm_head.weight.detach(), rtol=1e-3, atol=1e-3)
    assert ndcg(task) > 0.8  # before a single step of all layers


def test_the_best_weights_on_the_validation_part_are_kept(tmp_path, cache):
    """Looked at twice an epoch; the second look is said to be the best. Cold rows are written into these."""
    task, section = task_and_section(tmp_path / "office", epochs=2.0, evaluate_every=0.5, patience=9)
    seen, values = [], iter([0.1, 0.9, 0.3, 0.5])

    def valid(model):
        seen.append(model.get_output_embeddings().weight.detach().clone())
        return next(values)

    tune(task, section, seed=0, valid=valid)
    assert len(seen) == 4 and torch.equal(task.lm.model.lm_head.weight, seen[1]) and not torch.equal(seen[1], seen[3])
    assert not list((cache / "checkpoints").glob("*"))


# Co-teachers


class RoundTheCatalogue:
    """Knows the way: the next item scores 1, all others 0."""

    def scores(self, histories):
        return np.eye(len(TITLES))[[(history[-1] + 1) % len(TITLES) for history in histories]]


def test_co_teachers_and_the_first_layers_teach_as_one(tmp_path, monkeypatch):
    """Probabilities at every target by hand: the shallow model's by transformers, the other's by softmax."""
    task, section = task_and_section(tmp_path / "office", first_layers=1, first_epochs=1.0, epochs=1.0)
    validation = replace(task, part="valid")
    shallow, heard = shallow_model(task, section, 0), []
    monkeypatch.setattr(teacher_tuning, "shallow_model", lambda *_: shallow)
    whole = teacher_tuning.train
    monkeypatch.setattr(
        teacher_tuning, "train", lambda *args, **kwargs: heard.append(args[4]) or whole(*args, **kwargs)
    )
    system = CrossFitted([RoundTheCatalogue()], {})
    tune(task, section, 0, co_teachers={"round": system}, validation=validation)
    own, other = calibrations(shallow.model, {"round": system}, validation).values()
    share, items, place = own.weight / (own.weight + other.weight), task.lm.items.tokens, 0
    assert own.scale == 1 and other.weight == 1 and 0 < share < 1
    for window in task.train_windows(section):
        with torch.no_grad():
            logits = shallow.model(torch.tensor([window.input_ids])).logits[0].double()
        for position, label in enumerate(window.labels[1:]):
            if label < 0:
                continue
            says = torch.from_numpy(other.scale * system.scores([[window.input_ids[position] - items.start]], [""])[0])
            want = share * logits[position, items].softmax(-1) + (1 - share) * says.softmax(-1)
            got = torch.from_numpy(np.array(heard[0].logits[place])).double().softmax(-1)
            torch.testing.assert_close(got[items], want, rtol=1e-2, atol=1e-4)
            place += 1
    assert place == len(heard[0].logits)


def test_co_teachers_need_first_layers_to_teach_beside(tmp_path):
    task, section = task_and_section(tmp_path / "office", first_layers=0)
    with pytest.raises(LwaError, match="set teacher.first_layers"):
        tune(task, section, 0, co_teachers={"round": CrossFitted([RoundTheCatalogue()], {})}, validation=task)


def test_what_is_missing_or_of_other_items_is_said_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_tuning, "shallow_model", lambda *_: pytest.fail("it was trained first"))
    task, section = task_and_section(tmp_path / "office", first_layers=1)
    others = replace(task.data, items=task.data.items[::-1].reset_index(drop=True))
    elsewhere = replace(task, data=others, lm=language_model(), part="valid")
    for validation, message in ((None, "pass validation, a task on it"), (elsewhere, "or in another order")):
        with pytest.raises(LwaError, match=message):
            tune(task, section, 0, co_teachers={"round": CrossFitted([RoundTheCatalogue()], {})}, validation=validation)
    with pytest.raises(LwaError, match="evaluate_every needs a metric"):
        tune(task, section.model_copy(update={"evaluate_every": 0.5}), 0)


# Cold items


def test_a_cold_items_row_of_the_head_is_what_its_title_suggests(tmp_path):
    """By brute force from the rows of the other items in the embedding; nothing else is touched."""
    task, section = task_and_section(tmp_path / "office", cold=True)
    train(task, task.lm, section, 0)
    trained, cold = weights(task.lm.model), task.data.item_ids.index(COLD)
    items = task.lm.items.tokens
    head, titles = (trained[name][items].double().numpy() for name in ("lm_head.weight", "model.embed_tokens.weight"))
    want, _ = brute_force(head, task.data.counts, with_popularity(titles, task.data.counts))
    write_cold_rows(task.lm, task.data)
    got = task.lm.model.lm_head.weight.detach()
    np.testing.assert_allclose(got[items].numpy(), want, rtol=1e-3, atol=1e-4)
    assert changed(task.lm.model, trained) == {"lm_head.weight"}
    rows = (got != trained["lm_head.weight"]).any(1).nonzero().flatten().tolist()
    assert rows == [task.lm.items.first + cold]
    again, section = task_and_section(tmp_path / "office", cold=True)
    tune(again, section, 0)
    assert torch.equal(again.lm.model.lm_head.weight, got)


# Controls


@pytest.mark.parametrize("first_layers", [0, 2])
def test_frozen_layers_do_not_move_by_a_bit_and_item_rows_do(tmp_path, first_layers):
    task, section = task_and_section(tmp_path / "office", first_layers=first_layers, frozen_layers=True)
    before = weights(task.lm.model)
    tune(task, section, seed=0)
    assert changed(task.lm.model, before) == ENDS
    free, section = task_and_section(tmp_path / "office", first_layers=first_layers)
    tune(free, section, seed=0)
    assert changed(free.lm.model, before) == set(before)
    assert all(p.requires_grad for layer in decoder_layers(free.lm.model) for p in layer.parameters())


# A large catalogue


def test_a_catalogue_above_the_limit_is_drawn_from_by_popularity(tmp_path, monkeypatch):
    task, section = task_and_section(tmp_path / "office", cold=True, softmax_items=7)
    log_q, n = proposal(task, section)
    q, first = log_q.exp().numpy(), task.lm.items.first
    assert n == 7 and q.shape == (first + 8,) and not q[:first].any()
    np.testing.assert_allclose(q[first:], (task.data.counts + 1) / (task.data.counts + 1).sum(), rtol=1e-5)
    assert proposal(task, section.model_copy(update={"softmax_items": 8})) is None
    calls = []
    monkeypatch.setattr(
        "lwa_helpers.ranking.training.sampled_nll", lambda *args: calls.append(args[-1]) or sampled_nll(*args)
    )
    tune(task, section, seed=0)
    assert set(calls) == {7} and ndcg(task) > 0.7
