"""The next-items loss by hand, and a head fitted on standardised states that reads raw ones."""

import math

import pytest
import torch
from test_ranking import window
from tiny_lm import TITLES, language_model

from lwa_helpers.config import load_config
from lwa_helpers.data.windows import collate
from lwa_helpers.ranking import ItemHead, ItemRankingModel, future_targets, next_items_loss
from lwa_helpers.warmup import StandardisedHead, fit_head, title_end_states

LABELS = torch.tensor([[-100, 3, -100, 1, 2], [4, -100, -100, -100, -100], [-100] * 5, [0, 0, -100, 5, -100]])


def test_future_targets_stay_in_their_row():
    expected = [[3, 1, 2], [1, 2, -100], [2, -100, -100], [4, -100, -100], [0, 0, 5], [0, 5, -100], [5, -100, -100]]
    assert future_targets(LABELS, 3).tolist() == expected
    assert future_targets(LABELS, 1)[:, 0].tolist() == [3, 1, 2, 4, 0, 0, 5]
    assert future_targets(torch.full((2, 3), -100), 2).shape == (0, 2)


def test_next_items_loss_by_hand():
    torch.manual_seed(0)
    logits = torch.randn(7, 6)
    p = logits.softmax(-1)
    plain = -sum(math.log(p[i, t]) for i, t in enumerate([3, 1, 2, 4, 0, 0, 5])) / 7
    assert next_items_loss(logits, LABELS, 1).item() == pytest.approx(plain, rel=1e-5)
    two = [[3, 1], [1, 2], [2], [4], [0, 0], [0, 5], [5]]
    want = sum(-sum(math.log(p[i, t]) for t in row) / len(row) for i, row in enumerate(two)) / 7
    assert next_items_loss(logits, LABELS, 2).item() == pytest.approx(want, rel=1e-5)


@pytest.fixture
def model():
    lm = language_model()
    torch.manual_seed(0)
    return lm, ItemRankingModel(lm.model, ItemHead(torch.randn(len(TITLES), 32), torch.zeros(len(TITLES))), 2)


def test_a_folded_head_scores_raw_states_alike(model):
    states = torch.randn(50, 32) * 3 + 5
    probe = StandardisedHead(model[1].head, states).eval()
    with torch.no_grad():
        before = probe.head((states - states.mean(0)) / states.std(0))
        probe.fold()
        torch.testing.assert_close(model[1].head(states), before, rtol=1e-4, atol=1e-3)


def test_only_the_head_moves_and_the_loss_falls(model):
    lm, ranker = model
    batches = [collate([window(lm, [0, 1, 2], [1, 2, 3]), window(lm, [4, 5], [5, 6])], 0)] * 8
    section = load_config("smoke").teacher.model_copy(update={"head_epochs": 30, "head_only_learning_rate": 1e-2})
    body = {name: p.clone() for name, p in ranker.causal_lm.named_parameters()}

    def loss():
        with torch.no_grad():
            return ranker(**{k: batches[0][k] for k in ("input_ids", "attention_mask", "item_labels")}).loss.item()

    states, future = title_end_states(ranker, batches, bf16=False)
    assert states.shape == (40, 32) and future.shape == (40, 2)
    before = loss()
    fit_head(ranker, batches, section, seed=0)
    assert loss() < 0.7 * before
    assert all(torch.equal(p, body[name]) for name, p in ranker.causal_lm.named_parameters())
