"""Items as tokens: a title with its line break is one; the rest of the model is as before and needs no code of ours."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_lm import READINGS, SMALL, TITLES, begin_with_a_token, item_lm, language_model
from tokenizers import AddedToken, Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from lwa_helpers import build_student
from lwa_helpers.errors import LwaError
from lwa_helpers.models.item_tokens import title_rows, with_item_tokens, with_tokens
from lwa_helpers.models.language_model import ItemTokens
from lwa_helpers.models.loading import load_teacher
from lwa_helpers.models.vocabulary import trim_vocabulary

ODD = [
    "Heat",
    "Dead Heat",
    "Heat <end>",
    "<end>",
    "Heat 2",
    "2",
    "A  B",
    "B",
    "\u00c9t\u00e9",
    "E\u0301te\u0301",
    "日本 Story",
    "Story",
    "Ġ",
    "Ċ",
    "\\n",
    "a" * 150,
    " ",
    "<unused0>",
    "🎬",
]  # inside another, special, composed in two ways, names of bytes, white space
CONFIGS = {
    "llama, tied": {"tie_word_embeddings": True},
    "llama, its own head": {"tie_word_embeddings": False},
    "qwen3": {"config": Qwen3Config(**SMALL)},
    "gemma3, whose embedding is scaled": {"config": Gemma3TextConfig(**SMALL)},
    "gpt2": {"config": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=340, n_positions=64)},
    "rows that no token names": {"config": Qwen3Config(**SMALL | {"vocab_size": 352})},
}


@cache
def odd_model(reading):
    return item_lm(reading, titles=ODD)


def item_ids(lm, titles):
    return lm.tokenizer("".join(f"{title}\n" for title in titles), add_special_tokens=False)["input_ids"]


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def test_a_list_of_two_titles_is_two_tokens():
    lm = item_lm()
    ids = lm.tokenizer("Toy Story\nHeat\n")["input_ids"]
    assert ids == [lm.items.first + TITLES.index("Toy Story"), lm.items.first + TITLES.index("Heat")]
    assert [lm.tokenizer.decode(i) for i in ids] == ["Toy Story\n", "Heat\n"]
    assert lm.model.config.vocab_size == len(lm.tokenizer) == lm.items.tokens.stop


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(READINGS), st.lists(st.sampled_from(range(len(ODD))), max_size=30))
def test_any_list_of_titles_is_a_token_each_and_comes_back(reading, items):
    lm = odd_model(reading)
    ids = item_ids(lm, [ODD[i] for i in items])
    assert ids == [lm.items.first + i for i in items]
    assert lm.tokenizer.decode(ids) == "".join(f"{ODD[i]}\n" for i in items)


@pytest.mark.parametrize("reading", ["hybrid", "titles"])
def test_a_title_without_its_line_break_and_any_other_text_stay_text(reading):
    lm = odd_model(reading)
    for text in (*ODD, "Heat, a film", "The Heat\tis on", "Heat\r\n"):
        ids = lm.tokenizer(text, split_special_tokens=True)["input_ids"]
        assert max(ids) < lm.items.first and lm.tokenizer.decode(ids) == text


@pytest.mark.parametrize("titles", [TITLES, ODD], ids=["plain", "odd"])
@pytest.mark.parametrize("reading", READINGS)
def test_a_saved_model_comes_back_whole_and_needs_no_code_of_ours(tmp_path, reading, titles):
    lm = item_lm(reading, titles=titles, text_items=3, history_items=7)
    lm.save(tmp_path)
    again, plain = load_teacher(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert (
        again.items
        == lm.items
        == ItemTokens(
            [f"i{n}" for n in range(len(titles))], lm.items.first, reading, 3 if reading == "hybrid" else 0, 7
        )
    )
    texts = ["".join(f"{title}\n" for title in titles), "Seen:\n" + titles[0], "Zorblax ☃ \n<end>"]
    for text in texts:
        ids = lm.tokenizer(text)["input_ids"]
        assert again.tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == ids
        want = logits(lm.model, ids)
        assert torch.equal(logits(again.model, ids), want) and torch.equal(logits(plain, ids), want)
    assert {"model.safetensors", "items.json", "tokenizer.json"} <= {path.name for path in tmp_path.iterdir()}
    again.save(tmp_path / "twice")
    assert load_teacher(tmp_path / "twice").items == lm.items


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("reading", ["items", "titles"])
def test_the_body_is_the_models_own_and_the_new_rows_are_those_given(kind, reading):
    """Independent oracle: the model as it was, fed with embeddings and read by a matrix."""
    full = language_model(**CONFIGS[kind])
    lm = item_lm(reading, full)
    first, n = lm.items.first, len(TITLES)
    ends = lm.model.get_input_embeddings(), lm.model.get_output_embeddings()
    inputs, outputs = (end.weight.detach() for end in ends)
    assert inputs.shape == outputs.shape == (first + n, 32) and inputs.data_ptr() != outputs.data_ptr()
    assert not outputs[:first].any() and outputs[first:].std() == pytest.approx(1, rel=0.2)
    text = [] if reading == "items" else lm.tokenizer("Seen:")["input_ids"]
    old = [] if reading == "items" else full.tokenizer("Seen:")["input_ids"]
    table = full.model.get_input_embeddings()
    assert torch.equal(inputs[text], table.weight[old])
    history = [5, 0, 3]
    rows = torch.cat([table.weight[old], inputs[first:][history]]) * float(getattr(table, "embed_scale", 1.0))
    with torch.no_grad():
        body = full.model.model if hasattr(full.model, "model") else full.model.transformer
        states = body(inputs_embeds=rows[None]).last_hidden_state[0]
    got = logits(lm.model, text + [first + i for i in history])
    torch.testing.assert_close(got[:, first:], states @ outputs[first:].T, rtol=1e-4, atol=1e-4)
    assert not got[:, :first].any()


def test_the_model_that_it_was_made_from_is_left_as_it_was():
    full = language_model(tie_word_embeddings=True)
    size = len(full.tokenizer)
    before = {name: value.clone() for name, value in full.model.state_dict().items()}
    lm = item_lm("hybrid", full)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in full.model.state_dict().items())
    assert full.items is None and len(full.tokenizer) == full.model.config.vocab_size == size
    assert full.model.get_output_embeddings().weight is full.model.get_input_embeddings().weight


@pytest.mark.parametrize("titles", [["Heat", "Toy", "Heat"], ["Toy", "NEW"]], ids=["twice", "an added token"])
def test_a_title_that_is_a_token_already_is_refused(titles):
    lm = language_model()
    lm.tokenizer.add_tokens([AddedToken("NEW\n", normalized=False)])
    lm.model.resize_token_embeddings(len(lm.tokenizer))
    with pytest.raises(LwaError, match="the title '(Heat|NEW)' cannot be a token of its own"):
        item_lm("hybrid", lm, titles)


def test_the_items_of_a_model_are_not_given_twice():
    with pytest.raises(LwaError, match="'Toy Story' cannot be a token of its own"):
        item_lm("hybrid", item_lm("hybrid"))


def test_items_follow_rows_of_the_embedding_that_no_token_names():
    tokenizer = language_model().tokenizer
    size = len(tokenizer)
    grown = with_tokens(tokenizer, ["Heat", "Toy"], size + 3)
    assert grown("Toy\nHeat\n")["input_ids"] == [size + 4, size + 3] and len(tokenizer) == size
    assert grown("To Toy")["input_ids"] == tokenizer("To Toy")["input_ids"]
    with pytest.raises(LwaError, match="'Heat' cannot be a token"):
        with_tokens(tokenizer, ["Heat", "Toy"], len(tokenizer) - 1)


def test_a_head_with_a_bias_and_another_kind_of_tokenizer_are_refused():
    phi = PhiConfig(vocab_size=340, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(LwaError, match="head with a bias"):
        item_lm(lm=language_model(config=phi))
    lm = language_model()
    words = Tokenizer(models.WordLevel({"Toy": 0, "<end>": 1}, "<end>"))
    lm.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(LwaError, match="needs a BPE tokenizer"):
        item_lm(lm=lm)


def test_title_rows_are_the_means_of_the_titles_tokens_by_hand():
    lm = begin_with_a_token(language_model())
    table = lm.model.get_input_embeddings().weight.detach()
    raw = lm.tokenizer.backend_tokenizer
    want = np.array([table[raw.encode(title, add_special_tokens=False).ids].numpy().mean(0) for title in TITLES])
    np.testing.assert_allclose(title_rows(lm, TITLES), want, rtol=1e-5, atol=1e-7)
    spelt = [i for part in ("<end", ">") for i in raw.encode(part, add_special_tokens=False).ids]
    torch.testing.assert_close(title_rows(lm, ["<end>"])[0], table[spelt].mean(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("cut", ["trimmed", "student", "trimmed student", "student of a loaded one"])
def test_cut_models_keep_their_items(tmp_path, reading, cut):
    """On tokens that are kept the logits are those of the whole model, without the layers that the student lacks."""
    lm = item_lm(reading)
    texts = ["Toy\n", "Heat"]
    if cut == "student of a loaded one":
        lm.save(tmp_path)
        lm = load_teacher(tmp_path)
    whole, small = lm, trim_vocabulary(lm, texts) if cut == "trimmed" else None
    if small is None:
        whole = build_student(lm, 4, "first")
        del whole.model.model.layers[1:3]
        whole.model.model.layers[1].self_attn.layer_idx = 1
        small = build_student(lm, 2, "first_last", texts if cut == "trimmed student" else None)
    assert (small.items.reading, small.items.ids) == (reading, lm.items.ids)
    assert small.items.tokens.stop == small.model.config.vocab_size == len(small.tokenizer)
    if "trimmed" in cut and reading != "items":
        assert small.items.first < lm.items.first
    items = [5, 0, 7, 3]
    ids, theirs = ([each.items.first + i for i in items] for each in (small, lm))
    assert item_ids(small, [TITLES[i] for i in items]) == ids
    for text in texts if reading != "items" else ():
        a, b = small.tokenizer(text.strip())["input_ids"], lm.tokenizer(text.strip())["input_ids"]
        assert small.tokenizer.decode(a) == text.strip()
        ids, theirs = ids + a, theirs + b
    got, want = logits(small.model, ids), logits(whole.model, theirs)
    torch.testing.assert_close(got[:, small.items.tokens], want[:, lm.items.tokens], rtol=1e-5, atol=1e-5)
    small.save(tmp_path / "small")
    assert load_teacher(tmp_path / "small").items == small.items


def test_a_file_that_is_no_list_of_item_tokens_is_named(tmp_path):
    assert ItemTokens.load(tmp_path) is None
    for text in ('["i0", "i1"]', "{", '{"ids": ["i0"], "colour": 3}', "7"):
        (tmp_path / "items.json").write_text(text)
        with pytest.raises(LwaError, match="items.json is not a list of item tokens.*tune the model again"):
            ItemTokens.load(tmp_path)
    ItemTokens(("a", "b"), 7, "hybrid", 2, 9).save(tmp_path)
    assert json.loads((tmp_path / "items.json").read_text())["ids"] == ["a", "b"]
    assert ItemTokens.load(tmp_path).tokens == slice(7, 9)


def test_rows_of_another_number_are_refused_and_types_follow_the_model():
    lm = language_model()
    lm.model.bfloat16()
    rows = torch.randn(len(TITLES), 32)
    made = with_item_tokens(lm, TITLES, rows, rows, ItemTokens(TITLES))
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}
    with pytest.raises(RuntimeError, match="size mismatch"):
        with_item_tokens(lm, TITLES, rows[:-1], rows, ItemTokens(TITLES))
