"""A cut vocabulary changes neither tokens nor logits of what is kept, and refuses what it was not made for."""

import json

import pytest
import torch
from tiny_lm import READINGS, TITLES, begin_with_a_token, item_lm, language_model
from transformers import PhiConfig

from lwa_helpers import build_student
from lwa_helpers.data.history_tokens import Reading
from lwa_helpers.data.prompts import Prompt
from lwa_helpers.errors import LwaError
from lwa_helpers.models.loading import load_teacher
from lwa_helpers.models.vocabulary import check_covered, kept_tokens, trim_vocabulary
from lwa_helpers.ranking.title_head import TitleRanker

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
            Reading.of(TITLES, lm, Prompt("\n"))
        Reading.of(TITLES[:5], lm, Prompt("\n"))
    check_covered(full.tokenizer, ["Zorblax"])


def test_words_that_are_covered_have_the_tokens_of_the_full_vocabulary():
    """Known words in a new order are inside: every token is the teacher's."""
    full = language_model()
    cut = trim_vocabulary(full, TEXTS)
    old = kept_tokens(full.tokenizer, json.loads(full.tokenizer.backend_tokenizer.to_str()), TEXTS)
    text = "Toy Soldiers à Paris\n"
    check_covered(cut.tokenizer, [text])
    assert [old[i] for i in cut.tokenizer(text)["input_ids"]] == full.tokenizer(text)["input_ids"]


def same_tokens(full, cut, texts, **options):
    """Whether a cut model's tokenizer gives the texts the tokens they had, by name, each within the model's rows."""
    pairs = [
        (full.tokenizer(text, **options)["input_ids"], cut.tokenizer(text, **options)["input_ids"]) for text in texts
    ]
    rows = cut.model.get_input_embeddings().weight.shape[0]
    names = [(full.tokenizer.convert_ids_to_tokens(a), cut.tokenizer.convert_ids_to_tokens(b)) for a, b in pairs]
    return all(a == b for a, b in names) and all(index < rows for _, b in pairs for index in b)


@pytest.mark.parametrize("spelt", [True, False])
def test_the_name_of_a_special_token_in_a_title_is_kept_both_as_a_token_and_spelt_out(spelt):
    """Windows spell it out, and "en" is a token that no other word here has."""
    full = language_model()
    assert "en" in full.tokenizer.tokenize("Toy <end>", split_special_tokens=True)
    cut = trim_vocabulary(full, ["Toy <end>"])
    assert same_tokens(full, cut, ["Toy <end>"], split_special_tokens=spelt)


def test_added_tokens_in_a_title_are_kept():
    full = language_model()
    full.tokenizer.add_tokens(["NEW", "OTHER"])
    full.model.resize_token_embeddings(len(full.tokenizer))
    cut = trim_vocabulary(full, ["a NEW Toy"])
    assert same_tokens(full, cut, ["a NEW Toy"]) and "OTHER" not in cut.tokenizer.get_vocab()


def test_a_special_token_that_the_model_has_no_row_for_is_left_out():
    full = language_model()
    full.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    cut = trim_vocabulary(full, TEXTS)
    assert same_tokens(full, cut, TEXTS) and len(cut.tokenizer) == cut.model.config.vocab_size


@pytest.mark.parametrize("reading", READINGS)
def test_item_tokens_stay_at_the_end_of_a_cut_vocabulary_and_what_is_left_of_text_is_read_alike(reading):
    full = item_lm(reading)
    cut = trim_vocabulary(full, ["Toy\n"])
    assert cut.items.tokens.stop == len(cut.tokenizer) == cut.model.config.vocab_size
    assert cut.items.first == full.items.first if reading == "items" else cut.items.first < full.items.first
    texts = ["Toy", "Heat\n", "".join(title + "\n" for title in TITLES), "Toy <end>"]
    assert same_tokens(full, cut, texts) and same_tokens(full, cut, texts[:1], split_special_tokens=True)
    for lm in (full, cut, trim_vocabulary(cut, [])):
        ids = range(lm.items.first, lm.items.tokens.stop)
        assert lm.tokenizer.convert_ids_to_tokens(ids) == [title + "\n" for title in TITLES]


def test_one_text_is_not_taken_for_a_list_of_letters():
    with pytest.raises(LwaError, match="list of texts, not the one text 'Heat"):
        build_student(language_model(), 2, "first", texts="Heat\n")


def test_a_first_token_is_renumbered():
    full = begin_with_a_token(language_model())
    cut = trim_vocabulary(full, TEXTS[:1])
    assert same_tokens(full, cut, TEXTS[:1]) and cut.tokenizer("Toy")["input_ids"][0] == cut.tokenizer.bos_token_id


def test_the_tokens_that_the_config_names_are_renumbered_once():
    full = begin_with_a_token(language_model())
    full.model.config.bos_token_id = full.model.generation_config.bos_token_id = full.tokenizer.bos_token_id
    full.model.config.eos_token_id = [0, full.tokenizer("Toy")["input_ids"][1]]
    cut = trim_vocabulary(full, TEXTS[:1])
    toy = cut.tokenizer("Toy")["input_ids"][1]
    assert toy < full.model.config.eos_token_id[1] and cut.tokenizer.bos_token_id < full.tokenizer.bos_token_id
    config = cut.model.config
    assert config.bos_token_id == cut.model.generation_config.bos_token_id == cut.tokenizer.bos_token_id
    assert config.eos_token_id == [0, toy] and config.pad_token_id == 0


def test_a_cut_tokenizer_pads_and_truncates_where_the_full_one_does():
    full = language_model()
    full.tokenizer.padding_side = full.tokenizer.truncation_side = "left"
    cut = trim_vocabulary(full, TEXTS)
    assert same_tokens(full, cut, TEXTS, truncation=True, max_length=1)
    assert same_tokens(full, cut, TEXTS, padding="max_length", max_length=9)


def test_no_texts_leave_the_alphabet():
    cut = trim_vocabulary(language_model(), [])
    assert cut.model.config.vocab_size == 257 and cut.tokenizer.decode(cut.tokenizer("Toy ☃")["input_ids"]) == "Toy ☃"


def test_a_head_with_a_bias_is_cut_whole():
    config = PhiConfig(vocab_size=340, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    full = language_model(config=config)
    torch.nn.init.normal_(full.model.lm_head.bias)
    cut = trim_vocabulary(full, TEXTS[:1])
    before, after = (torch.tensor([lm.tokenizer(TEXTS[0])["input_ids"]]) for lm in (full, cut))
    old = kept_tokens(full.tokenizer, json.loads(full.tokenizer.backend_tokenizer.to_str()), TEXTS[:1])
    with torch.no_grad():
        torch.testing.assert_close(full.model(before).logits[..., old], cut.model(after).logits, rtol=0, atol=1e-6)
