"""What the numbers of tokens and items mean: teachers and students that disagree are named before training."""

import copy
import json

import numpy as np
import pytest
import torch
from tiny_lm import TITLES, item_lm, language_model, tokenizer, windows
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from lwa_helpers import DistillationTrainer, build_student
from lwa_helpers.configs.students import LossConfig
from lwa_helpers.distillation.ensemble import average_outputs, recommender_outputs
from lwa_helpers.distillation.teacher_cache import TeacherOutputs
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.cross_fit import CrossFitted
from lwa_helpers.ranking.training import window_loader


def renumbered(change):
    """The tiny tokenizer with other numbers: `change` maps the list of all tokens in order to another order."""
    own = tokenizer()
    spec = json.loads(own.backend_tokenizer.to_str())
    names = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    spec["model"]["vocab"] = {name: index for index, name in enumerate(change(names))}
    spec["model"]["merges"] = []  # they may not name a token that is gone, and no number depends on them
    raw = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>")


def swapped(names):
    return [*names[:300], names[301], names[300], *names[302:]]


def outputs(lm, folder):
    ordered = window_loader(windows(lm), 60, 0, 0, shuffle=False)
    return TeacherOutputs.compute(lm, ordered, [2, 4], folder, bf16=False)


@pytest.mark.parametrize("change", [swapped, lambda names: names[:1] + names[:0:-1]], ids=["two swapped", "reversed"])
@pytest.mark.parametrize("stored", [True, False])
def test_two_tokenizers_of_one_size_are_named(tmp_path, change, stored):
    teacher, student = language_model(), language_model(layers=2)
    student.name, student.tokenizer = "pupil", renumbered(change)
    source = outputs(teacher, tmp_path / "outputs") if stored else teacher
    with pytest.raises(LwaError, match=r"teacher 'tiny' and student 'pupil' have different tokenizers: '.*' is token"):
        DistillationTrainer(source, student, strategy="uniform")
    DistillationTrainer(source, student, strategy="labels")  # which needs no teacher


def test_a_word_in_place_of_another_is_named():
    student = language_model(layers=2)
    student.tokenizer = renumbered(lambda names: [*names[:300], "Zebra", *names[301:]])
    with pytest.raises(LwaError, match="token 300 is '.*' to the teacher and 'Zebra' to the student"):
        DistillationTrainer(language_model(), student, strategy="none")


def other_side(lm):
    lm.tokenizer.padding_side, lm.tokenizer.chat_template = "left", "{{ messages }}"
    lm.tokenizer.name_or_path = "elsewhere"


def other_pad(lm):
    lm.tokenizer.add_special_tokens({"pad_token": "<pad>"})


def renamed_pad(lm):
    lm.tokenizer = renumbered(lambda names: [*names[:300], "<pad>", *names[301:]])
    lm.tokenizer.pad_token = "<pad>"


def other_roles(lm):
    lm.tokenizer.bos_token = "<end>"


@pytest.mark.parametrize("change", [other_side, other_pad, renamed_pad, other_roles])
def test_what_does_not_change_a_number_is_no_difference(tmp_path, change):
    teacher, student = language_model(), language_model(layers=2)
    change(student)
    for source in (teacher, outputs(teacher, tmp_path / "outputs")):
        DistillationTrainer(source, student, strategy="uniform").check_meaning()


def test_a_student_of_other_tokens_is_named_where_only_states_are_matched():
    """Another size of the vocabulary is no error of its own there, but the teacher would read other words."""
    teacher = language_model()
    student = build_student(teacher, 2, "first", texts=TITLES[:2])
    loss = LossConfig(alpha=0.0, temperature=1.0, beta=1.0)
    trainer = DistillationTrainer(teacher, student, strategy="uniform", loss=loss)
    ids = torch.tensor([student.tokenizer(TITLES[0])["input_ids"]])
    with pytest.raises(LwaError, match="have different tokenizers"):
        trainer.train([{"input_ids": ids, "labels": ids}], 1)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["i1", "i0", *(f"i{n}" for n in range(2, 8))], "item 0 is 'i0' to the one and 'i1' to the other"),
        ([f"x{n}" for n in range(8)], "item 0 is 'i0'"),
    ],
)
def test_catalogues_in_another_order_are_named(tmp_path, stored, ids, message):
    teacher, student = item_lm(), item_lm(layers=2, ids=ids)
    source = outputs(teacher, tmp_path / "outputs") if stored else teacher
    with pytest.raises(LwaError, match=f"rank different catalogues .*{message}"):
        DistillationTrainer(source, student, strategy="uniform")


def test_titles_in_another_order_are_named_too():
    with pytest.raises(LwaError, match="have different tokenizers"):
        DistillationTrainer(item_lm(), item_lm(titles=TITLES[::-1], layers=2), strategy="none")


def test_teachers_are_fused_only_over_one_order_of_items(tmp_path):
    one, other = item_lm(), item_lm(ids=[f"i{n}" for n in range(7, -1, -1)], seed=2)
    parts, items = [outputs(lm, tmp_path / str(n)) for n, lm in enumerate((one, other))], one.items.tokens
    with pytest.raises(LwaError, match="rank different catalogues"):
        average_outputs(parts, [1, 1], tmp_path / "fused", [items, items])
    fused = average_outputs([parts[1], parts[1]], [1, 1], tmp_path / "fused", [items, items])
    with pytest.raises(LwaError, match="rank different catalogues"):
        DistillationTrainer(fused, item_lm(layers=2), strategy="none")
    DistillationTrainer(fused, other, strategy="none").check_meaning()


class Few:
    """A recommender of one item, whose scores numpy would repeat for all."""

    def scores(self, histories):
        return np.ones((len(histories), 1))


def test_a_recommender_of_another_catalogue_is_named(tmp_path):
    lm = item_lm()
    with pytest.raises(LwaError, match="scores 1 items, the teacher has 8"):
        recommender_outputs(
            CrossFitted([Few()], {}), windows(lm), outputs(lm, tmp_path / "a"), tmp_path / "b", lm.items.tokens
        )


def test_outputs_are_computed_again_for_another_tokenizer(cache):
    lm = language_model()
    ordered = window_loader(windows(lm), 60, 0, 0, shuffle=False)
    other = copy.copy(lm)
    other.tokenizer = renumbered(swapped)
    found = [TeacherOutputs.cached(each, ordered, [4], bf16=False) for each in (lm, other, lm, lm.model)]
    assert found[0].directory == found[2].directory and len({each.directory for each in found}) == 3
    assert found[1].identity.tokens != found[0].identity.tokens and found[3].identity is None
