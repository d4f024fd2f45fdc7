"""User windows against a reading of their own text: every target once, context whole, nothing cut."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from lwa_helpers.data import Interactions, load_movielens
from lwa_helpers.data.prompts import Prompt, prompt_for
from lwa_helpers.data.windows import LengthBatches, Window, collate, evaluation_windows, user_windows
from lwa_helpers.errors import LwaError

PROMPT = Prompt("Seen:\n")
TITLES = [f"Film {n} " + "of the long night " * (n % 5) + "<|end|>" * (n == 3) for n in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    byte_level.train_from_iterator([title + "\n" for title in TITLES], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="<|end|>")


def interactions(**sequences: list[list[int]]) -> Interactions:
    """user=[train items, valid items, test items]"""
    parts = {}
    for place, part in enumerate(("train", "valid", "test")):
        rows = [(user, f"i{item}") for user, cut in sequences.items() for item in cut[place]]
        one = pd.DataFrame(rows, columns=["user_id", "parent_asin"], dtype=str)
        parts[part] = one.assign(rating=np.nan, timestamp=np.arange(len(one)))
    items = pd.DataFrame({"parent_asin": [f"i{n}" for n in range(len(TITLES))], "title": TITLES})
    return Interactions("toy", items=items, **parts)


def read(window: Window, data: Interactions, tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    """A window's titles as item indices, and its (titles before, target) pairs, from the text alone."""
    header, *lines, end = tokenizer.decode(window.input_ids).split("\n")
    assert header == "Seen:" and end == "" and len(window.input_ids) == len(window.item_labels)
    pairs = []
    for place, label in enumerate(window.item_labels):
        if label != -100:
            before = tokenizer.decode(window.input_ids[: place + 1])
            assert before.endswith("\n")
            pairs.append((before.count("\n") - 1, label))
    return [data.titles.index(line) for line in lines], pairs


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 39), min_size=1, max_size=30),
    st.integers(2, 9),
    st.integers(1, 8),
    st.sampled_from([None, 80, 150]),
    st.booleans(),
)
def test_every_title_after_the_first_is_a_target_once(tokenizer, items, max_titles, context, max_tokens, last_text):
    context = min(context, max_titles - 1)
    data = interactions(u=[items, [], []])
    cut = {"max_titles": max_titles, "context_titles": context, "max_tokens": max_tokens, "last_text": last_text}
    windows = user_windows(data, tokenizer, PROMPT, **cut)
    at = 1
    for number, window in enumerate(windows):
        shown, pairs = read(window, data, tokenizer)
        assert max_tokens is None or len(window.input_ids) <= max_tokens
        assert len(shown) + (not last_text) <= max_titles
        for before, target in pairs:
            assert target == items[at] and shown[:before] == items[at - before : at]
            if number == 0:
                assert before == at
            elif max_tokens is None:
                assert before >= context
            at += 1
        if last_text:
            assert shown[-1] == items[at - 1]
    assert at == len(items) or not windows and len(items) == 1


def test_windows_hand_worked(tokenizer):
    data = interactions(u=[[0, 1, 2, 3, 4, 5, 6], [7], [8]], v=[[9], [], []])
    shown = [read(w, data, tokenizer) for w in user_windows(data, tokenizer, PROMPT, max_titles=4, context_titles=2)]
    assert shown == [
        ([0, 1, 2], [(1, 1), (2, 2)]),
        ([1, 2, 3, 4], [(2, 3), (3, 4)]),
        ([3, 4, 5, 6], [(2, 5), (3, 6)]),
    ]
    pairs = user_windows(data, tokenizer, PROMPT, max_titles=3, context_titles=2, pairs=True)
    histories = [[0], [0, 1], [1, 2], [2, 3], [3, 4], [4, 5]]
    assert [read(w, data, tokenizer) for w in pairs] == [
        ([*history, target], [(len(history), target)]) for target, history in enumerate(histories, start=1)
    ]
    newest = user_windows(data, tokenizer, PROMPT, max_titles=4, context_titles=2, max_windows_per_user=1)
    assert [read(w, data, tokenizer) for w in newest] == shown[-1:]
    test = user_windows(data, tokenizer, PROMPT, max_titles=4, context_titles=2, part="test")
    assert [read(w, data, tokenizer) for w in test] == [([5, 6, 7, 8], [(3, 8)])]
    for context in (0, 4):
        with pytest.raises(LwaError, match="context_titles"):
            user_windows(data, tokenizer, PROMPT, max_titles=4, context_titles=context)


def test_ids_are_the_header_and_each_line_tokenised_alone(tokenizer):
    data = interactions(u=[[3, 1, 3], [], []])
    (window,) = user_windows(data, tokenizer, PROMPT)
    lines = [PROMPT.header, *(TITLES[n].strip() + "\n" for n in (3, 1, 3))]
    assert window.input_ids == [i for line in lines for i in tokenizer(line, split_special_tokens=True)["input_ids"]]
    assert tokenizer.decode(window.input_ids) == PROMPT.history_text(lines[k][:-1] for k in (1, 2, 3))
    assert tokenizer.eos_token_id not in window.input_ids  # title 3 holds its text


def test_a_budget_too_small_for_two_titles_is_an_error_that_names_the_right_one(tokenizer):
    data = interactions(u=[[0, 1], [], []])
    lengths = sorted(len(tokenizer(t + "\n", split_special_tokens=True)["input_ids"]) for t in data.titles)
    needed = len(tokenizer(PROMPT.header)["input_ids"]) + sum(lengths[-2:])
    with pytest.raises(LwaError, match=f"at least {needed}$"):
        user_windows(data, tokenizer, PROMPT, max_tokens=needed - 1)
    assert len(user_windows(data, tokenizer, PROMPT, max_tokens=needed)) == 1


def test_evaluation_windows(tokenizer):
    data = interactions(u=[[0, 1, 2], [3], [4, 5]], cold=[[], [], [6]])
    shown = [read(w, data, tokenizer) for w in evaluation_windows(data, tokenizer, PROMPT, max_titles=3)]
    assert shown == [([1, 2, 3], [(3, 4)]), ([], [(0, 6)])]
    every = evaluation_windows(data, tokenizer, PROMPT, max_titles=3, every_target=True)
    assert [read(w, data, tokenizer)[1] for w in every] == [[(3, 4)], [(3, 5)], [(0, 6)]]
    assert all(w.item_labels[-1] != -100 for w in every)
    valid = evaluation_windows(data, tokenizer, PROMPT, part="valid", max_titles=9)
    assert [read(w, data, tokenizer) for w in valid] == [([0, 1, 2], [(3, 3)])]


def test_collate_labels_are_the_tokens_of_target_titles(tokenizer):
    data = interactions(u=[[0, 1, 2, 3, 4, 5, 6], [], []], v=[[7, 8], [], []])
    windows = user_windows(data, tokenizer, PROMPT, max_titles=4, context_titles=2)
    batch = collate(windows, pad_id=9)
    longest = max(len(w.input_ids) for w in windows)
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(len(windows), longest)}
    targets = [tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert targets == ["".join(data.titles[n] + "\n" for n in part) for part in ((1, 2), (3, 4), (5, 6), (8,))]
    for row, window in enumerate(windows):
        n = len(window.input_ids)
        assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (len(batch["labels"][row]) - n)
        assert batch["input_ids"][row, :n].tolist() == window.input_ids and (batch["input_ids"][row, n:] == 9).all()
        assert batch["item_labels"][row, :n].tolist() == window.item_labels
        labelled = batch["labels"][row] != -100
        assert torch.equal(batch["labels"][row][labelled], batch["input_ids"][row][labelled])
        assert (batch["labels"][row, n:] == -100).all() and (batch["item_labels"][row, n:] == -100).all()


def of_length(n: int) -> Window:
    return Window("u", [1] * n, [-100] * n)


@settings(deadline=None)
@given(st.lists(st.integers(1, 300), max_size=200), st.integers(300, 3000), st.integers(0, 5))
def test_length_batches(lengths, tokens, seed):
    batches = LengthBatches([of_length(n) for n in lengths], tokens, seed)
    epochs = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        epochs.append(list(batches))
        assert len(batches) == len(epochs[-1])
        assert sorted(i for batch in epochs[-1] for i in batch) == list(range(len(lengths)))
        for batch in epochs[-1]:
            inside = [lengths[i] for i in batch]
            assert len(inside) * max(inside) <= tokens and sum(inside) >= 0.9 * len(inside) * max(inside)
    assert epochs[0] == epochs[2]


def test_length_batches_shuffle_by_seed_and_epoch_and_refuse_what_does_not_fit():
    windows = [of_length(50) for _ in range(64)]
    orders = set()
    for seed in (0, 1):
        batches = LengthBatches(windows, 200, seed)
        for epoch in (0, 1):
            batches.set_epoch(epoch)
            orders.add(str(list(batches)))
    assert len(orders) == 4
    with pytest.raises(LwaError, match="50 tokens"):
        LengthBatches(windows, 49)


def test_movielens_through_a_data_loader(tokenizer):
    data = load_movielens()
    windows = user_windows(data, tokenizer, prompt_for(data.name))
    batches = LengthBatches(windows, 4096, seed=0)
    pad = partial(collate, pad_id=0)
    labels = tokens = room = 0
    for batch in DataLoader(windows, batch_sampler=batches, collate_fn=pad):
        labels += int((batch["item_labels"] != -100).sum())
        tokens += int(batch["attention_mask"].sum())
        room += batch["input_ids"].numel()
    assert labels == len(data.train) - data.train.user_id.nunique() and tokens >= 0.9 * room
