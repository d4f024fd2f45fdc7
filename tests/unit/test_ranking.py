"""The item head against a plain forward pass per case."""

import json

import numpy as np
import pytest
import torch
from tiny_lm import TITLES, begin_with_a_token, language_model

from lwa_helpers.data.windows import Window, collate, encode
from lwa_helpers.errors import LwaError
from lwa_helpers.ranking import (
    ItemHead,
    ItemRanker,
    ItemRankingModel,
    future_nll,
    item_row_nll,
    load_item_ranker,
    rank_catalogue,
    sampled_nll,
    title_vectors,
)
from lwa_helpers.signals import signals
from lwa_helpers.title_ranker import TitleRanker

HEADER = "Seen:\n"


@pytest.fixture(scope="module")
def lm():
    return language_model()


@pytest.fixture(scope="module")
def ranker(lm):
    vectors = title_vectors(lm.model, lm.tokenizer, HEADER, TITLES)
    return ItemRankingModel(lm.model, ItemHead(vectors * 20, torch.randn(len(TITLES)))).eval()


def window(lm, items, labels):
    ids, out = lm.tokenizer(HEADER)["input_ids"], []
    out = [-100] * len(ids)
    for item, label in zip(items, labels, strict=True):
        tokens = lm.tokenizer(TITLES[item] + "\n")["input_ids"]
        ids, out = ids + tokens, out + [-100] * (len(tokens) - 1) + [label]
    return Window("u", ids, out)


def test_catalogue_scores_do_not_depend_on_batching(lm, ranker):
    windows = [window(lm, [0, 1, 2], [-100, -100, 3]), window(lm, [4], [5]), window(lm, [7, 6], [-100, 1])]
    together = rank_catalogue(ranker, windows, batch_size=3)
    alone = np.concatenate([rank_catalogue(ranker, [w], batch_size=1) for w in windows])
    np.testing.assert_allclose(together, alone, atol=1e-4)
    with torch.no_grad():
        hidden = lm.model.model(input_ids=torch.tensor([windows[1].input_ids])).last_hidden_state[0, -1]
        by_hand = ranker.head.table @ (ranker.head.project.weight @ hidden) + ranker.head.bias
    np.testing.assert_allclose(together[1], by_hand.numpy(), atol=1e-4)


def test_row_nll_sums_each_row_and_is_zero_without_a_label(lm, ranker):
    windows = [window(lm, [0, 1], [2, 3]), window(lm, [4, 5], [-100, -100]), window(lm, [6], [0])]
    got = item_row_nll(ranker, collate(windows, 0))
    for row, w in enumerate(windows):
        want = 0.0
        for place, label in enumerate(w.item_labels):
            if label != -100:
                scores = rank_catalogue(ranker, [Window("u", w.input_ids[: place + 1], w.item_labels[: place + 1])], 1)[0]
                want += float(np.log(np.exp(scores - scores[label]).sum()))
        assert got[row].item() == pytest.approx(want, abs=1e-3)


def test_sampled_labels_follow_the_model(lm, ranker):
    batch = collate([window(lm, [0], [1])] * 4000, 0)
    drawn = item_row_nll.sample(ranker, batch, torch.Generator().manual_seed(0))["item_labels"]
    counts = torch.bincount(drawn[drawn != -100], minlength=len(TITLES)) / 4000
    with torch.no_grad():
        p = ranker(**{k: batch[k][:1] for k in ("input_ids", "attention_mask", "item_labels")}).logits.softmax(-1)[0]
    assert (drawn != -100).sum() == 4000 and (counts - p).abs().max() < 0.03


def test_title_vectors_are_means_of_the_titles_own_states(lm):
    vectors = title_vectors(lm.model, lm.tokenizer, HEADER, TITLES, batch_size=3)
    means = []
    for title in TITLES:
        prefix, own = lm.tokenizer(HEADER)["input_ids"], lm.tokenizer(title + "\n")["input_ids"]
        with torch.no_grad():
            means.append(lm.model.model(input_ids=torch.tensor([prefix + own])).last_hidden_state[0, len(prefix) :].mean(0))
    means = torch.stack(means)
    torch.testing.assert_close(vectors, 0.02 * (means - means.mean(0)) / means.std(0), rtol=1e-3, atol=1e-5)


def test_a_catalogue_of_one_item_is_ranked(lm):
    vectors = title_vectors(lm.model, lm.tokenizer, HEADER, ["Heat"])
    assert torch.equal(vectors, torch.zeros(1, lm.model.config.hidden_size))
    alone = ItemRankingModel(lm.model, ItemHead(vectors, torch.tensor([-1.5])))
    assert ItemRanker(alone, lm.tokenizer, HEADER, ["Heat"]).scores([[0], []]).tolist() == [[-1.5], [-1.5]]


def test_save_and_load(tmp_path, lm, ranker):
    ranker.save(tmp_path / "model", lm.tokenizer, [f"i{n}" for n in range(len(TITLES))])
    again, checkpoint = load_item_ranker(tmp_path / "model")
    w = [window(lm, [0, 1], [-100, 2])]
    np.testing.assert_allclose(rank_catalogue(again, w, 1), rank_catalogue(ranker, w, 1), atol=1e-5)
    assert json.loads((tmp_path / "model" / "items.json").read_text())[1] == "i1"
    assert checkpoint.tokenizer(TITLES[0])["input_ids"] == lm.tokenizer(TITLES[0])["input_ids"]
    with pytest.raises(LwaError, match="no item head"):
        load_item_ranker(tmp_path)


def test_histories_are_asked_as_windows_are(lm, ranker):
    histories = [[0, 1, 2], [4], []]
    windows = [window(lm, history, [-100] * len(history)) for history in histories]
    got = ItemRanker(ranker, lm.tokenizer, HEADER, TITLES, batch_size=2).scores(histories)
    np.testing.assert_allclose(got, rank_catalogue(ranker, windows, 3), atol=1e-4)


def test_every_reader_begins_with_the_token_that_the_tokenizer_begins_with():
    """Once, before the header; without it Llama 3 and Gemma read the first token as they never do."""
    lm = begin_with_a_token(language_model())
    history, begin = [2, 0], lm.tokenizer.bos_token_id
    want = lm.tokenizer(HEADER + "".join(TITLES[item] + "\n" for item in history))["input_ids"]
    assert want[0] == begin and want.count(begin) == 1
    header, rows = encode(lm.tokenizer, HEADER, [title + "\n" for title in TITLES])
    assert header + rows[2] + rows[0] == want == TitleRanker(lm.model, lm.tokenizer, HEADER, TITLES).prompt(history)
    vectors = title_vectors(lm.model, lm.tokenizer, HEADER, TITLES)
    ranker = ItemRankingModel(lm.model, ItemHead(vectors * 20, torch.zeros(len(TITLES)))).eval()
    got = ItemRanker(ranker, lm.tokenizer, HEADER, TITLES).scores([history])
    np.testing.assert_allclose(got, rank_catalogue(ranker, [Window("u", want, [-100] * len(want))], 1), atol=1e-5)


@pytest.mark.parametrize("wrong", [-1, len(TITLES)])
def test_an_item_outside_the_catalogue_is_refused(lm, ranker, wrong):
    with pytest.raises(ValueError, match=f"item {wrong} is outside"):
        ItemRanker(ranker, lm.tokenizer, HEADER, TITLES).scores([[0], [1, wrong]])


@pytest.mark.parametrize("newest", [0, 1, 2, 9])
def test_a_long_history_is_read_from_its_newest_titles(lm, ranker, newest):
    history = [0, 1, 2, 3]
    got = ItemRanker(ranker, lm.tokenizer, HEADER, TITLES, max_titles=newest).scores([history])
    read = [item for place, item in enumerate(history) if place >= len(history) - newest]
    np.testing.assert_allclose(got, ItemRanker(ranker, lm.tokenizer, HEADER, TITLES).scores([read]), atol=1e-5)


def sampling_case(n_items=300, places=5):
    torch.manual_seed(0)
    head = ItemHead(torch.randn(n_items, 8), torch.randn(n_items))
    future = torch.randint(n_items, (places, 3))
    future[1, 2] = future[1, 0]  # an item that comes twice
    future[2, 1:] = -100
    return head, torch.randn(places, 8), future


def test_the_sampled_denominator_is_unbiased():
    head, hidden, future = sampling_case()
    own = head(hidden).gather(1, future.clamp_min(0))
    for row in range(3):
        one = future[row : row + 1]
        mean_own = own[row][one[0] != -100].mean()
        with torch.no_grad():
            z = torch.stack([(sampled_nll(head, hidden[row : row + 1], one, 40) + mean_own).exp() for _ in range(600)])
        want = head(hidden[row]).exp().sum()
        assert abs(z.mean() - want) < 4 * z.std() / 600**0.5 and z.std() > 0


def test_sampled_loss_and_gradient_approach_the_full_ones():
    head, hidden, future = sampling_case()
    hidden.requires_grad_()
    losses = [sampled_nll(head, hidden, future, 20_000), future_nll(head(hidden), future)]
    sampled, full = (torch.autograd.grad(loss, [hidden, head.table, head.bias]) for loss in losses)
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=0)
    for got, want in zip(sampled, full):
        assert (got - want).norm() < 0.05 * want.norm()


def test_only_training_on_labels_in_a_large_catalogue_draws_items(lm, ranker):
    batch = collate([window(lm, [0, 1], [2, 3])], 0)
    small, large = (ItemRankingModel(lm.model, ranker.head, 1, limit) for limit in (len(TITLES), len(TITLES) - 1))
    full = small.train()(**batch)
    assert full.logits is not None and large.train()(**batch).logits is None
    torch.testing.assert_close(large.eval()(**batch).loss, full.loss)
    torch.testing.assert_close(signals(large.train(), batch).logits, full.logits)  # distillation needs all
    lm.model.eval()
