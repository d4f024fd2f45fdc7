"""The item head against a plain forward pass per prompt, and its loss on drawn items against the whole softmax."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_lm import CUT, READINGS, TITLES, item_lm, language_model, reading_of, windows
from torch import nn
from transformers import Gemma3TextConfig, Phi3Config, Qwen3Config

from lwa_helpers.data.windows import collate
from lwa_helpers.fisher.losses import next_token_nll
from lwa_helpers.ranking.item_head import ItemRanker, end_states, rank_catalogue, sampled_nll

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 340,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CONFIGS = {
    "llama": None,
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "gemma3, which sees four tokens": Gemma3TextConfig(
        **SMALL, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "phi3": Phi3Config(**SMALL),
}
HISTORIES = [[0, 1, 2], [4], [7, 6, 5, 3, 2, 1], [2, 2], [7, 6, 5, 3, 2, 0]]


@torch.no_grad()
def plain(lm, prompt):
    """transformers' own logits of the items after a prompt."""
    return lm.model(torch.tensor([prompt])).logits[0, -1, lm.items.first :].numpy()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("reading", READINGS)
def test_scores_equal_a_plain_forward_pass_per_prompt_however_they_are_batched(reading, kind):
    lm = item_lm(reading, language_model(config=CONFIGS[kind]))
    prompts = [reading_of(lm).prompt(history) for history in HISTORIES]
    want = np.array([plain(lm, prompt) for prompt in prompts])
    assert want.std(0).min() > 0.1  # histories matter
    for size in (1, 2, 5, 32):
        got = rank_catalogue(lm.model.train(), prompts, lm.items.tokens, size, progress=False)
        np.testing.assert_allclose(got, want, atol=1e-4)
        assert got.dtype == np.float32 and not lm.model.training
    np.testing.assert_allclose(ItemRanker(lm, reading_of(lm), batch_size=2).scores(HISTORIES), want, atol=1e-4)


@pytest.mark.parametrize("reading", ["items", "titles"])
def test_an_empty_prompt_is_refused_where_there_is_no_header(reading):
    lm = item_lm(reading)
    ranker = ItemRanker(lm, reading_of(lm))
    if reading == "items":
        with pytest.raises(ValueError, match="prompt 1 is empty"):
            ranker.scores([[0], []])
    else:
        np.testing.assert_allclose(ranker.scores([[0], []])[1], plain(lm, reading_of(lm).header), atol=1e-5)


def test_bfloat16_scores_are_close_to_those_in_float32():
    lm = item_lm()
    prompts = [reading_of(lm).prompt(history) for history in HISTORIES]
    items = lm.items.tokens
    exact, half = (rank_catalogue(lm.model, prompts, items, 3, bf16, progress=False) for bf16 in (False, True))
    assert 0 < np.abs(half - exact).max() < 0.1


def test_bfloat16_does_not_make_near_scores_equal():
    """Of a thousand items; on MovieLens SASRec's scores rounded like that lose 3 % of NDCG@10 to ties alone."""
    lm = item_lm(titles=[f"Film {n}" for n in range(1000)])
    (scores,) = rank_catalogue(lm.model, [[lm.items.first + 3]], lm.items.tokens, 1, bf16=True, progress=False)
    assert len(np.unique(scores)) > 990


def test_columns_are_those_that_are_asked_for():
    lm = item_lm("titles")
    prompts, first = [reading_of(lm).prompt([3])], lm.items.first
    whole = rank_catalogue(lm.model, prompts, slice(0, first + 3), 1, progress=False)
    assert whole.shape == (1, first + 3) and not whole[:, :first].any()
    np.testing.assert_allclose(whole[0, first:], plain(lm, prompts[0])[:3], atol=1e-5)


def test_states_at_the_ends_are_the_last_ones_of_each_row():
    lm = item_lm()
    ids, mask = torch.tensor([[260, 261, 262], [263, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    with torch.no_grad():
        want = [lm.model.model(torch.tensor([row])).last_hidden_state[0, -1] for row in ([260, 261, 262], [263])]
    torch.testing.assert_close(end_states(lm.model, ids, mask), torch.stack(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reading", ["items", "titles"])
def test_the_loss_of_a_window_asks_for_each_target_as_its_prompt_does(reading):
    """Over all tokens of the vocabulary; a row without a label counts for nothing."""
    lm = item_lm(reading)
    how, data = reading_of(lm), windows(lm, [*CUT, ("x", [3, 2, 1], 3)])
    got = next_token_nll(lm.model, collate(data, 0))
    for row, window in enumerate(data):
        want = 0.0
        for history, target in zip(window.histories(), window.items[-len(window.histories()) :]):
            with torch.no_grad():
                logits = lm.model(torch.tensor([how.prompt(history)])).logits[0, -1]
            want -= logits.log_softmax(-1)[lm.items.first + target].item()
        assert got[row].item() == pytest.approx(want, abs=1e-3) and (want > 0) == (row < len(CUT))


@pytest.mark.parametrize("reading", READINGS)
def test_the_loss_of_a_window_is_transformers_own(reading):
    """The model shifts the labels; the mean of its loss is over the five targets."""
    lm = item_lm(reading)
    batch = collate(windows(lm), 0)
    with torch.no_grad():
        want = 5 * lm.model(**batch).loss.item()
    assert next_token_nll(lm.model, batch).sum().item() == pytest.approx(want, rel=1e-5)


def test_drawn_labels_follow_the_model():
    lm = item_lm()
    batch = collate(windows(lm, [("u", [0, 1], 1)] * 4000), 0)
    labels = next_token_nll.sample(lm.model, batch, torch.Generator().manual_seed(0))["labels"]
    counts = torch.bincount(labels[labels != -100], minlength=lm.model.config.vocab_size) / 4000
    with torch.no_grad():
        p = lm.model(batch["input_ids"][:1, :1]).logits[0, -1].softmax(-1)
    assert (labels != -100).sum() == 4000 and (counts - p).abs().max() < 0.03


def test_a_ranking_inside_autocast_is_the_same_as_outside():
    """A trainer looks at the validation part inside autocast; the setting bf16 alone says what is computed how."""
    lm = item_lm()
    prompts = [reading_of(lm).prompt(history) for history in HISTORIES]
    want = rank_catalogue(lm.model, prompts, lm.items.tokens, 2)
    with torch.autocast("cpu", torch.bfloat16):
        got = rank_catalogue(lm.model, prompts, lm.items.tokens, 2)
    np.testing.assert_array_equal(got, want)


def test_a_catalogue_of_one_item_is_ranked():
    lm = item_lm(titles=["Heat"])
    got = ItemRanker(lm, reading_of(lm, ["Heat"])).scores([[0], [0, 0]])
    np.testing.assert_allclose(got, [plain(lm, [lm.items.first] * n) for n in (1, 2)], atol=1e-5)


@pytest.mark.parametrize("wrong", [-1, len(TITLES)])
def test_an_item_outside_the_catalogue_is_refused(wrong):
    lm = item_lm()
    with pytest.raises(ValueError, match=f"item {wrong} is outside"):
        ItemRanker(lm, reading_of(lm)).scores([[0], [1, wrong]])


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("newest", [1, 2, 9])
def test_a_long_history_is_read_from_its_newest_items(reading, newest):
    lm, history = item_lm(reading), [0, 1, 2, 3]
    got = ItemRanker(lm, reading_of(lm), max_items=newest).scores([history])
    read = [item for place, item in enumerate(history) if place >= len(history) - newest]
    np.testing.assert_allclose(got, ItemRanker(lm, reading_of(lm)).scores([read]), atol=1e-5)


N_TEXT, N_ITEMS = 50, 250


def sampling_case(places=5):
    """A head over text tokens, which are never drawn, and items, drawn by a popularity; and targets among these."""
    torch.manual_seed(0)
    head = nn.Linear(8, N_TEXT + N_ITEMS, bias=False)
    nn.init.normal_(head.weight, std=0.4)
    log_q = torch.full((N_TEXT + N_ITEMS,), -torch.inf)
    log_q[N_TEXT:] = (2 * torch.rand(N_ITEMS)).index_fill(0, torch.tensor([7]), 6.0).log_softmax(0)
    targets = torch.randint(N_TEXT, N_TEXT + N_ITEMS, (places,))
    targets[1] = N_TEXT + 7  # half of what is drawn, and then left out
    states = torch.randn(places, 8)
    with torch.no_grad():
        head.weight[N_TEXT + 7] = states[1] * 6 / states[1].square().sum()  # a score of 6: half of the denominator
    return head, states, targets, log_q


def test_the_sampled_denominator_is_unbiased():
    """Its mean is the sum over all items of e^score, the target's once, and no text token's."""
    head, states, targets, log_q = sampling_case()
    with torch.no_grad():
        scores = head(states)
        for row in range(3):
            one = slice(row, row + 1)
            own = scores[row, targets[row]]
            z = torch.stack([(sampled_nll(head, states[one], targets[one], log_q, 40) + own).exp() for _ in range(800)])
            want = scores[row, N_TEXT:].exp().sum()
            assert abs(z.mean() - want) < 4 * z.std() / 800**0.5 and z.std() > 0


def test_a_target_that_is_never_drawn_counts_once_all_the_same():
    head, states, targets, log_q = sampling_case()
    targets[:] = 3  # a text token
    with torch.no_grad():
        losses = torch.stack([sampled_nll(head, states, targets, log_q, 2000) for _ in range(50)])
        scores = head(states)
        want = F.cross_entropy(torch.cat([scores[:, 3:4], scores[:, N_TEXT:]], 1), torch.zeros_like(targets))
    assert losses.mean().item() == pytest.approx(want.item(), rel=5e-3)


def test_sampled_loss_and_gradient_approach_the_full_ones():
    head, states, targets, log_q = sampling_case()
    states.requires_grad_()
    full = F.cross_entropy((states @ head.weight.T)[:, N_TEXT:], targets - N_TEXT)
    losses = [sampled_nll(head, states, targets, log_q, 40_000), full]
    sampled, exact = (torch.autograd.grad(loss, [states, head.weight]) for loss in losses)
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=0)
    for got, want in zip(sampled, exact):
        assert (got - want).norm() < 0.05 * want.norm()
    assert not sampled[1][:N_TEXT].any()
