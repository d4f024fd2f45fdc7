"""The title head against a forward pass per title, over several architectures; the search against a full ranking."""

import numpy as np
import pytest
import torch
from tiny_lm import TITLES, language_model
from transformers import (
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from lwa_helpers.errors import LwaError
from lwa_helpers.ranking.title_head import TitleRanker, TreeReader
from lwa_helpers.ranking.title_trie import TitleTrie, pieces

HEADER = "Seen:\n"
CATALOGUE = [
    *TITLES,
    "Toy",
    "Toy Story 2",
    "Heat",
    "Heat and Dust",
]  # a title inside others, and one that is there twice
HISTORIES = [[0, 3, 5, 1, 2], [5], [], [7, 7, 6]]
SIZES = {
    "vocab_size": 340,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "bos_token_id": 0,
}
KINDS = ["full_attention", "sliding_attention", "full_attention"]
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "mistral, window 7": MistralConfig(**SIZES, sliding_window=7),
    "gemma2, window 7, capped logits": Gemma2Config(
        **SIZES, sliding_window=7, final_logit_softcapping=2.0, layer_types=KINDS
    ),
    "gemma3, window 5": Gemma3TextConfig(**SIZES, sliding_window=5, layer_types=KINDS),
    "gpt2": GPT2Config(vocab_size=340, n_embd=32, n_layer=3, n_head=4, eos_token_id=0, bos_token_id=0),
    "neox": GPTNeoXConfig(**{k: SIZES[k] for k in SIZES if k != "head_dim"}),
}


def ranker_of(kind, **options):
    lm = language_model(config=CONFIGS[kind])
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)  # far from uniform, so that a wrong mask shows
    return TitleRanker(lm.model, lm.tokenizer, HEADER, CATALOGUE, **options)


def from_scratch(ranker, history, item):
    """log p of one title by one forward pass over the whole text."""
    tokenizer = ranker.tokenizer
    prompt = tokenizer(HEADER + "".join(CATALOGUE[i] + "\n" for i in history))["input_ids"]
    tokens = tokenizer(CATALOGUE[item] + "\n")["input_ids"]
    with torch.no_grad():
        log_p = ranker.model(torch.tensor([prompt + tokens]), use_cache=False).logits[0].log_softmax(-1)
    return sum(log_p[len(prompt) + place - 1, token].item() for place, token in enumerate(tokens))


@pytest.mark.parametrize("kind", CONFIGS)
def test_scores_equal_one_forward_pass_per_title(kind):
    ranker = ranker_of(kind, batch_size=3, tokens_per_batch=30)
    got = ranker.scores(HISTORIES)
    want = [[from_scratch(ranker, history, item) for item in range(len(CATALOGUE))] for history in HISTORIES]
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.std(want) > 1 and got[0, 5] == got[0, CATALOGUE.index("Heat", 6)]


@pytest.mark.parametrize(("batch_size", "tokens"), [(1, 1), (2, 16), (8, 4096)])
def test_candidates_of_each_history_however_they_are_cut(batch_size, tokens):
    ranker = ranker_of("gemma3, window 5", batch_size=batch_size, tokens_per_batch=tokens)
    candidates = [[1, 2, 7], [0, 4, 6], [2, 2, 3], [11, 5, 10]]
    everything = ranker.scores(HISTORIES)
    want = np.take_along_axis(everything, np.array(candidates), 1)
    np.testing.assert_allclose(ranker.score(HISTORIES, candidates), want, atol=1e-5)
    assert ranker.score([], []).shape == (0, 0)
    with pytest.raises(ValueError, match="rows of candidates"):
        ranker.score(HISTORIES, candidates[1:])


@pytest.mark.parametrize("kind", ["llama", "gemma3, window 5"])
def test_a_wide_search_ranks_as_scoring_everything_does(kind):
    ranker = ranker_of(kind, batch_size=3)
    every = ranker.scores(HISTORIES)
    for k in (1, 4, len(CATALOGUE)):
        found = ranker.search(HISTORIES, k, beam=max(k, 6))
        want = np.argsort(-every, axis=1, kind="stable")[:, :k]  # equal scores in catalogue order
        for row in np.flatnonzero(found.exact):
            assert found.items[row].tolist() == want[row].tolist()
        np.testing.assert_allclose(found.scores, np.take_along_axis(every, found.items, 1), atol=1e-4)
    assert found.exact.all()


def test_a_search_leaves_out_items_and_says_when_it_may_have_missed_one():
    ranker = ranker_of("llama")
    every = ranker.scores(HISTORIES)
    found = ranker.search(HISTORIES, 3, beam=12, exclude=HISTORIES)
    for row, seen in enumerate(HISTORIES):
        allowed = [item for item in np.argsort(-every[row], kind="stable") if item not in seen]
        assert found.items[row].tolist() == allowed[:3]
    narrow = [ranker.search(HISTORIES, 1, beam=1, exclude=[[]] * 4)]
    best = every.argmax(1)
    assert all(narrow[0].items[row, 0] == best[row] for row in np.flatnonzero(narrow[0].exact))
    for wrong in ({"k": 5, "beam": 4}, {"k": 0}, {"k": 12, "beam": 12, "exclude": HISTORIES}):
        with pytest.raises(ValueError, match="k = "):
            ranker.search(HISTORIES, **wrong)


def test_nothing_to_read_and_an_item_outside_the_catalogue_are_refused():
    lm = language_model()
    with pytest.raises(ValueError, match="needs a header"):
        TitleRanker(lm.model, lm.tokenizer, "", CATALOGUE).scores([[0], []])
    for wrong in (-1, len(CATALOGUE)):
        with pytest.raises(ValueError, match=f"item {wrong} is outside"):
            ranker_of("llama").scores([[wrong]])


def test_no_histories_give_no_rows_and_left_out_items_come_in_a_row_for_each():
    ranker, n = ranker_of("llama"), len(CATALOGUE)
    assert ranker.scores([]).shape == (0, n)
    assert [part.shape for part in ranker.search([], 3)] == [(0, 3), (0, 3), (0,)]
    for exclude in ([[0]], [[0], [1], [2]]):
        with pytest.raises(ValueError, match="rows of items left out"):
            ranker.search(HISTORIES[:2], 1, exclude=exclude)


def test_a_title_that_spells_a_special_token_stays_text():
    lm = language_model()
    ranker = TitleRanker(lm.model, lm.tokenizer, HEADER, ["Heat <end>"])
    assert lm.tokenizer.eos_token_id not in ranker.tokens[0]
    assert lm.tokenizer.decode(ranker.tokens[0]) == "Heat <end>\n"


def test_models_that_take_no_tree_are_refused():
    with pytest.raises(LwaError, match="cannot rank by title"):
        TreeReader(
            language_model(config=BloomConfig(vocab_size=340, hidden_size=32, n_layer=1, n_head=4)).model, [[1, 2]]
        )


def test_trie_by_hand():
    trie = TitleTrie([[1, 2, 3], [1, 2], [4], [1, 5], [4]])
    assert trie.tokens.tolist() == [-1, 1, 2, 3, 4, 5] and trie.parents.tolist() == [-1, 0, 1, 2, 0, 1]
    assert trie.depths.tolist() == [0, 1, 2, 3, 1, 2] and trie.ends.tolist() == [3, 2, 4, 5, 4]
    assert trie.below.tolist() == [5, 3, 2, 1, 2, 1] and trie.inner().tolist() == [0, 1, 2]
    assert trie.children(1).tolist() == [2, 5] and trie.rows_at(4).tolist() == [2, 4] and trie.path(3) == [3, 2, 1, 0]
    assert trie.ancestry(np.array([0, 1, 2])).tolist() == np.tri(3, dtype=bool).tolist()
    assert trie.totals(np.array([9.0, 1, 2, 4, 8, 16])).tolist() == [0, 1, 3, 7, 8, 17]


@pytest.mark.parametrize("limit", [1, 4, 7, 1000])
def test_pieces_hold_every_row_once_and_keep_to_the_limit(limit):
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, size=rng.integers(1, 7)).tolist() for _ in range(60)]
    parts = list(pieces(rows, limit))
    assert sorted(i for group, _ in parts for i in group) == list(range(60))
    for group, trie in parts:
        assert len(trie) - 1 <= limit or len(group) == 1
        assert len(trie) - 1 == len({tuple(rows[i][:n]) for i in group for n in range(1, len(rows[i]) + 1)})
    assert limit < 1000 or len(parts) == 1
