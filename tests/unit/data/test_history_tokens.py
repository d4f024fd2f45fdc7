"""What a model is asked: the prompt of a history, by hand and against what it was trained on."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_lm import PROMPT, READINGS, TITLES, begin_with_a_token, item_lm, language_model, reading_of

from lwa_helpers.data.windows import window_of
from lwa_helpers.errors import LwaError
from lwa_helpers.models.vocabulary import trim_vocabulary

HISTORY = st.lists(st.integers(0, len(TITLES) - 1), max_size=12)


@cache
def model_of(kind):
    return language_model() if kind == "text" else item_lm(kind)


def reading(kind):
    return reading_of(model_of(kind))


def test_prompts_by_hand():
    """The text of each prompt, an item's own token in brackets."""
    for kind, text_items, want in (
        ("items", 0, "[Heat][Toy Story][GoldenEye]"),
        ("hybrid", 2, "Seen:\n[Heat][Toy Story]Toy Story\n[GoldenEye]GoldenEye\n"),
        ("hybrid", 9, "Seen:\n[Heat]Heat\n[Toy Story]Toy Story\n[GoldenEye]GoldenEye\n"),
        ("titles", 0, "Seen:\nHeat\nToy Story\nGoldenEye\n"),
        ("text", 0, "Seen:\nHeat\nToy Story\nGoldenEye\n"),
    ):
        lm = model_of(kind)
        found, text = replace(reading(kind), text_items=text_items).prompt([5, 0, 1]), ""
        for token in found:
            is_item = lm.items and token >= lm.items.first
            text += f"[{lm.tokenizer.decode(token)[:-1]}]" if is_item else lm.tokenizer.decode(token)
        assert text == want


@pytest.mark.parametrize("kind", [*READINGS, "text"])
def test_nothing_but_the_header_is_read_of_no_history(kind):
    tokenizer = model_of(kind).tokenizer
    header = [] if kind == "items" else [*tokenizer("Seen:")["input_ids"], *tokenizer("\n")["input_ids"]]
    assert reading(kind).prompt([]) == header


def test_a_list_of_titles_is_the_prompt_of_a_model_that_reads_items():
    history = [5, 0, 3, 7]
    text = "".join(TITLES[item] + "\n" for item in history)
    assert model_of("items").tokenizer(text)["input_ids"] == reading("items").prompt(history)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(READINGS), HISTORY.filter(lambda items: len(items) > 1), st.integers(1, 12), st.integers(1, 4))
def test_a_model_is_asked_what_a_training_window_shows_before_its_last_target(kind, items, max_items, text_items):
    how = replace(reading(kind), text_items=text_items) if kind == "hybrid" else reading(kind)
    shown = items[-max_items - 1 :]
    window = window_of(how, "u", shown, 1)
    assert how.prompt(items[:-1], max_items) == window.input_ids[:-1]
    assert window.labels[-1] == how.first + items[-1]


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([*READINGS, "text"]), HISTORY, st.integers(1, 12), st.integers(4, 60))
@example("hybrid", [4, 3, 0, 4, 4, 1, 1, 5], 12, 12)
def test_a_prompt_keeps_to_both_budgets_and_would_not_with_one_item_more(kind, history, max_items, max_tokens):
    how = reading(kind)
    found = how.prompt(history, max_items, max_tokens)
    longer = [how.prompt(history[-n:] if n else []) for n in range(len(history) + 1)]
    fits = [n for n, prompt in enumerate(longer) if len(prompt) <= max_tokens and n <= max_items]
    assert len(longer[0]) > max_tokens or found == longer[max(fits)]


@pytest.mark.parametrize("kind", ["hybrid", "titles", "text"])
def test_text_begins_with_the_token_that_the_tokenizer_begins_with(kind):
    """Once, before the header; without it Llama 3 and Gemma read the first token as they never do."""
    lm = begin_with_a_token(language_model())
    lm = lm if kind == "text" else item_lm(kind, lm)
    found, begin = reading_of(lm).prompt([2, 0]), lm.tokenizer.bos_token_id
    assert lm.tokenizer("")["input_ids"] == [begin]
    assert found[0] == begin and found.count(begin) == 1
    assert lm.tokenizer.decode(found[1:]).startswith(PROMPT.header)


@pytest.mark.parametrize("kind", ["hybrid", "titles", "text"])
def test_a_title_spells_no_token_of_the_tokenizer(kind):
    """Neither a special one nor the item token of a title that it holds."""
    titles = ["Heat <end>", "Heat", "Dead Heat"]
    lm = language_model() if kind == "text" else item_lm(kind, titles=titles)
    how, first = reading_of(lm, titles), lm.items.first if lm.items else len(lm.tokenizer)
    text = [token for token in how.prompt([0, 2]) if token < first]
    assert lm.tokenizer.eos_token_id not in text
    assert lm.tokenizer.decode(text) == "Seen:\nHeat <end>\nDead Heat\n"


@pytest.mark.parametrize("kind", [*READINGS, "text"])
@pytest.mark.parametrize("wrong", [-1, len(TITLES)])
def test_an_item_outside_the_catalogue_is_refused(kind, wrong):
    with pytest.raises(ValueError, match=f"item {wrong} is outside"):
        reading(kind).prompt([0, wrong, 1])


@pytest.mark.parametrize("kind", ["hybrid", "titles", "text"])
def test_titles_outside_a_cut_vocabulary_are_refused(kind):
    lm, other = model_of(kind), [*TITLES[:-1], "Zorblax"]
    if kind == "text":
        lm = trim_vocabulary(lm, [PROMPT.header, *(title + "\n" for title in TITLES)])
    reading_of(lm)
    with pytest.raises(LwaError, match="'Zorblax"):
        reading_of(lm, other)


def test_items_are_read_whatever_their_titles_say():
    """They are not read as text, so they need not be in the vocabulary."""
    how = reading_of(model_of("items"), ["Zorblax"] * len(TITLES))
    np.testing.assert_array_equal(how.prompt([3, 1]), np.array([3, 1]) + model_of("items").items.first)
