"""Tokens that a tokenizer names and the model has no row for: padding never matters, and no text is read as one."""

import json

import pytest
import torch
from tiny_lm import TITLES, begin_with_a_token, item_lm, language_model, tokenizer
from tokenizers import AddedToken
from transformers import ByT5Tokenizer

from lwa_helpers import FisherInformationCalculator, build_student, load_teacher
from lwa_helpers.data.windows import Window, collate
from lwa_helpers.errors import LwaError
from lwa_helpers.models.item_tokens import title_rows
from lwa_helpers.models.vocabulary import trim_vocabulary

ROWS = len(tokenizer())
WINDOWS = [Window("u", [5, 6, 7], [-100, 1, 2]), Window("v", [5, 6], [-100, 1])]
SPECIAL = {"pad_token": "[PAD]", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}


def with_special(lm, *kinds):
    """The model, whose tokenizer has these special tokens after the last row."""
    lm.tokenizer.add_special_tokens({kind: SPECIAL[kind] for kind in kinds})
    assert len(lm.tokenizer) == ROWS + len(kinds)
    return lm


def saved(lm, folder, **settings):
    """The model after a round by way of a folder, whose config.json has these settings."""
    lm.save(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return load_teacher(folder)


@pytest.mark.parametrize("kinds", [["pad_token"], ["pad_token", "eos_token"], [*SPECIAL]])
@pytest.mark.parametrize("way", ["as made", "loaded", "cut", "student", "items"])
def test_a_special_token_without_a_row_never_matters(kinds, way, tmp_path):
    lm = with_special(language_model(), *kinds)
    texts = [f"{title}\n" for title in TITLES]
    made = {
        "as made": lambda: lm,
        "loaded": lambda: saved(lm, tmp_path),
        "cut": lambda: trim_vocabulary(lm, texts),
        "student": lambda: build_student(lm, 4, "first", texts),
        "items": lambda: item_lm("titles", lm),
    }[way]()
    rows = len(made.model.get_input_embeddings().weight)
    assert 0 <= made.pad_id < rows
    if way in ("cut", "student", "items"):
        assert len(made.tokenizer) == rows == made.model.config.vocab_size
    plain = language_model().tokenizer
    for text in TITLES:
        ids = made.tokenizer(text)["input_ids"]
        assert max(ids) < rows and made.tokenizer.decode(ids) == text
        assert made.tokenizer.convert_ids_to_tokens(ids) == plain.tokenize(text)


def test_what_pads_changes_no_trace():
    lm = with_special(language_model(2, 16), "pad_token")
    traces = []
    for pad in (lm.pad_id, 9):
        batch = collate(WINDOWS, pad)
        assert batch["input_ids"][1, 2] == pad
        batch = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
        traces.append(FisherInformationCalculator().calculate(lm.model, [batch]).per_layer.tolist())
    assert traces[0] == traces[1] and min(traces[0]) > 0


@pytest.mark.parametrize("pad", [ROWS, ROWS + 70, -ROWS - 1, -1])
def test_a_padding_token_of_the_config_without_a_row(pad, tmp_path):
    """torch refuses an embedding whose padding row is none of its rows."""
    lm = language_model()
    again = saved(lm, tmp_path, pad_token_id=pad)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, lm.model(ids).logits)
    again.save(tmp_path / "twice")
    load_teacher(tmp_path / "twice")


def test_the_tokens_that_pad_are_the_tokenizers_first():
    lm = language_model()
    assert lm.pad_id == lm.tokenizer.pad_token_id == 0
    lm.tokenizer.pad_token = lm.tokenizer.convert_ids_to_tokens(7)
    assert lm.pad_id == 7
    with_special(lm, "pad_token").tokenizer.eos_token = lm.tokenizer.convert_ids_to_tokens(8)
    assert lm.pad_id == 8


def test_an_added_token_without_a_row_is_read_as_the_text_that_it_is(tmp_path):
    full = language_model()
    lm = language_model()
    lm.tokenizer.add_tokens(["GoldenEye", AddedToken("Toy\n", normalized=False)])
    texts = ["GoldenEye", "Toy\n", "a GoldenEye Toy\n"]
    assert any(max(ids) >= ROWS for ids in lm.tokenizer(texts)["input_ids"])
    again = saved(lm, tmp_path)
    assert again.tokenizer(texts)["input_ids"] == full.tokenizer(texts)["input_ids"]
    assert again.tokenizer.eos_token_id == 0 and len(again.tokenizer) == ROWS
    torch.testing.assert_close(title_rows(lm, texts), title_rows(full, texts), rtol=0, atol=0)
    names = [trim_vocabulary(each, texts) for each in (full, lm)]
    assert names[0].tokenizer(texts)["input_ids"] == names[1].tokenizer(texts)["input_ids"]


def test_a_tokenizer_of_more_words_than_rows_is_another_models(tmp_path):
    small = language_model(vocabulary=300)
    small.tokenizer = tokenizer()
    small.save(tmp_path)
    with pytest.raises(LwaError, match=f"has 300 rows.*its tokenizer has {ROWS} tokens.*was trained with"):
        load_teacher(tmp_path)


def test_a_tokenizer_of_fewer_words_than_rows_will_do(tmp_path):
    wide = language_model()
    wide.tokenizer = tokenizer(300)
    wide.save(tmp_path)
    assert len(load_teacher(tmp_path).tokenizer) == 300
    cut = trim_vocabulary(load_teacher(tmp_path), ["Toy\n"])
    assert len(cut.tokenizer) == cut.model.config.vocab_size


def test_a_token_that_begins_every_text_needs_a_row(tmp_path):
    lm = begin_with_a_token(language_model())
    lm.model.resize_token_embeddings(ROWS)
    lm.save(tmp_path)
    with pytest.raises(LwaError, match=f"has {ROWS} rows.*writes '<begin>', token {ROWS}, into texts"):
        load_teacher(tmp_path)
    with pytest.raises(LwaError, match="writes '<begin>' into every text, and the model has no row for it"):
        trim_vocabulary(lm, ["Toy\n"])


def test_a_tokenizer_written_in_python_is_loaded_and_not_cut(tmp_path):
    lm = language_model(vocabulary=400)
    lm.model.resize_token_embeddings(400)
    lm.tokenizer = ByT5Tokenizer()
    lm.save(tmp_path)
    again = load_teacher(tmp_path)
    assert again.tokenizer("Toy")["input_ids"] == ByT5Tokenizer()("Toy")["input_ids"]
    with pytest.raises(LwaError, match="needs a BPE tokenizer, this one is ByT5Tokenizer"):
        trim_vocabulary(again, ["Toy\n"])
