"""A cut vocabulary changes neither tokens nor logits of what is kept, and refuses what it was not made for."""

import json

import pytest
import torch
from tiny_lm import TITLES, language_model

from lwa_helpers import build_student
from lwa_helpers.errors import LwaError
from lwa_helpers.models import load_teacher
from lwa_helpers.ranking import ItemRanker
from lwa_helpers.title_ranker import TitleRanker
from lwa_helpers.vocabulary import check_covered, kept_tokens, trim_vocabulary

TEXTS = [f"{title}\n" for title in TITLES[:5]]


@pytest.mark.parametrize("tied", [True, False])
def test_a_cut_vocabulary_keeps_tokens_and_logits(tied):
    teacher = language_model(tie_word_embeddings=tied)
    cut = trim_vocabulary(teacher, iter(TEXTS))
    old = kept_tokens(teacher.tokenizer, json.loads(teacher.tokenizer.backend_tokenizer.to_str()), TEXTS)
    assert len(old) == cut.model.config.vocab_size < teacher.model.config.vocab_size
    for text in TEXTS:
        before, after = teacher.tokenizer(text)["input_ids"], cut.tokenizer(text)["input_ids"]
        assert [old[i] for i in after] == before and cut.tokenizer.decode(after) == text
        with torch.no_grad():
            full, small = teacher.model(torch.tensor([before])).logits, cut.model(torch.tensor([after])).logits
        torch.testing.assert_close(full[..., old], small, rtol=0, atol=1e-6)
    assert cut.tokenizer.eos_token == "<end>" and cut.model.config.eos_token_id == cut.tokenizer.eos_token_id


@pytest.mark.parametrize("text", ["Zorblax", "☃ in July", "  two  spaces", TITLES[-1], ""])
def test_any_text_comes_back_as_it_was(text):
    cut = trim_vocabulary(language_model(), TEXTS)
    assert cut.tokenizer.decode(cut.tokenizer(text)["input_ids"]) == text


def test_a_title_outside_raises_after_a_reload_too(tmp_path):
    full = language_model()
    build_student(full, 2, "first", TEXTS).save(tmp_path / "student")
    for lm in (build_student(full, 2, "first", TEXTS), load_teacher(tmp_path / "student")):
        check_covered(lm.tokenizer, TEXTS)
        with pytest.raises(LwaError, match="outside the model's cut vocabulary"):
            check_covered(lm.tokenizer, [*TEXTS, "Toy Soldiers of Zorblax\n"])
        with pytest.raises(LwaError, match="'Heat"):
            TitleRanker(lm.model, lm.tokenizer, "Seen:\n", TITLES)
        TitleRanker(lm.model, lm.tokenizer, "Seen:\n", TITLES[:5])
        with pytest.raises(LwaError, match="'Heat"):
            ItemRanker(None, lm.tokenizer, "", TITLES)
        ItemRanker(None, lm.tokenizer, "", TITLES[:5])
    check_covered(full.tokenizer, ["Zorblax"])


def test_words_that_are_covered_have_the_tokens_of_the_full_vocabulary():
    """Known words in a new order are inside: every token is the teacher's."""
    full = language_model()
    cut = trim_vocabulary(full, TEXTS)
    old = kept_tokens(full.tokenizer, json.loads(full.tokenizer.backend_tokenizer.to_str()), TEXTS)
    text = "Toy Soldiers à Paris\n"
    check_covered(cut.tokenizer, [text])
    assert [old[i] for i in cut.tokenizer(text)["input_ids"]] == full.tokenizer(text)["input_ids"]
