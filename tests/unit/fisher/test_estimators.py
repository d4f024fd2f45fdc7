"""Three quantities that are easily confused, told apart; the sampled estimator against the exact sum over labels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fisher_models import batch, build, layers_of

from lwa_helpers.errors import LwaError
from lwa_helpers.fisher.baseline import squared_batch_gradient
from lwa_helpers.fisher.calculator import FisherInformationCalculator
from lwa_helpers.fisher.losses import next_token_nll


def layer_norms(model, loss):
    parameters = [list(layer.parameters()) for layer in layers_of(model)]
    gradients = torch.autograd.grad(loss, [p for layer in parameters for p in layer], retain_graph=True)
    sizes, squares = [len(layer) for layer in parameters], [g.double().square().sum().item() for g in gradients]
    return np.array([sum(part) for part in np.split(np.array(squares), np.cumsum(sizes)[:-1])])


def exact_fisher(model, ids, positions, vocabulary):
    """Sum over every joint labelling y of p(y) || grad log p(y) ||^2; tokens before each position are the data's."""
    log_p = model(input_ids=ids).logits[0, [p - 1 for p in positions]].log_softmax(-1)
    total = 0.0
    for labels in itertools.product(range(vocabulary), repeat=len(positions)):
        joint = sum(log_p[i, y] for i, y in enumerate(labels))
        total = total + joint.exp().item() * layer_norms(model, joint)
    return total


@pytest.fixture
def tiny():
    return build(
        "llama", vocab_size=5, num_hidden_layers=2, hidden_size=8, intermediate_size=8, pad_token_id=None
    ).double()


def test_sampled_converges_to_the_exact_sum_over_labels(tiny):
    ids = torch.tensor([[1, 3, 2, 4, 1]])
    labels = torch.tensor([[-100, -100, 2, -100, 1]])
    exact = exact_fisher(tiny, ids, [2, 4], vocabulary=5)
    rows = {"input_ids": ids.repeat(500, 1), "labels": labels.repeat(500, 1)}
    result = FisherInformationCalculator(estimator="sampled", seed=3).calculate(tiny, [rows] * 6)
    assert (np.abs(result.per_layer - exact) < 4 * result.standard_error).all()
    assert (result.standard_error < 0.05 * exact).all()
    empirical = FisherInformationCalculator().calculate(tiny, [{name: value[:1] for name, value in rows.items()}])
    assert (np.abs(empirical.per_layer - exact) > 8 * result.standard_error).all()


def test_the_three_differ_on_one_model():
    model = build("qwen2").double()
    rows = batch(lengths=(9, 7, 8, 9))
    empirical = FisherInformationCalculator().calculate(model, [rows]).per_layer
    sampled = FisherInformationCalculator(estimator="sampled").calculate(model, [rows]).per_layer
    neither = squared_batch_gradient(model, [rows])
    for a, b in itertools.combinations((empirical, sampled, neither), 2):
        assert (np.abs(a - b) > 0.02 * np.maximum(a, b)).all()


def test_squared_batch_gradient_is_the_square_of_the_mean_and_the_same_for_single_rows():
    model = build("llama").double()
    rows = batch(lengths=(6, 8, 7))
    mean = next_token_nll(model.eval(), rows).mean()
    np.testing.assert_allclose(squared_batch_gradient(model, [rows]), layer_norms(model, mean), rtol=1e-6)
    singles = [{name: value[i : i + 1] for name, value in rows.items()} for i in range(3)]
    np.testing.assert_allclose(
        squared_batch_gradient(model, singles),
        FisherInformationCalculator().calculate(model, singles).per_layer,
        rtol=1e-6,
    )


def test_sampled_is_fixed_by_its_seed_and_keeps_ignored_positions():
    model = build("gpt2").double()
    rows = batch(lengths=(9, 5), side="left", masked=True)
    first, again, other = (
        FisherInformationCalculator(estimator="sampled", seed=seed).calculate(model, [rows, rows]).per_example
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and (first[:2] != first[2:]).any()
    drawn = next_token_nll.sample(model, rows, torch.Generator().manual_seed(0))["labels"]
    kept = rows["labels"] != -100
    kept[:, 0] = False
    before = torch.cat([torch.zeros(2, 1), rows["attention_mask"][:, :-1]], 1).bool()
    np.testing.assert_array_equal(drawn[~(kept & before)], rows["labels"][~(kept & before)])
    assert (drawn[kept & before] != rows["labels"][kept & before]).any()


def test_a_custom_loss_is_used_and_needs_sample_for_the_sampled_estimator():
    model = build("llama").double()
    rows = batch(lengths=(6, 8)) | {"weight": torch.tensor([2.0, 3.0])}

    def weighted(model, rows):
        return rows["weight"] * next_token_nll(model, rows)

    plain = FisherInformationCalculator().calculate(model, [rows]).per_example
    result = FisherInformationCalculator().calculate(model, [rows], loss=weighted).per_example
    np.testing.assert_allclose(result, plain * np.array([[4.0], [9.0]]), rtol=1e-6)
    with pytest.raises(LwaError, match="loss.sample"):
        FisherInformationCalculator(estimator="sampled").calculate(model, [rows], loss=weighted)
    weighted.sample = lambda model, rows, generator: rows | {"labels": rows["input_ids"].roll(1, 1)}
    rolled = FisherInformationCalculator(estimator="sampled").calculate(model, [rows], loss=weighted).per_example
    direct = FisherInformationCalculator().calculate(
        model, [rows | {"labels": rows["input_ids"].roll(1, 1)}], loss=weighted
    )
    np.testing.assert_allclose(rolled, direct.per_example, rtol=1e-9)


def test_default_loss_is_the_models_own_loss_where_nothing_is_padded():
    for family in ("llama", "gemma3", "gpt2"):
        model = build(family, **({"final_logit_softcapping": 3.0} if family == "gemma3" else {})).double().eval()
        rows = batch(lengths=(7, 7), masked=True)
        n_labels = int((rows["labels"][:, 1:] != -100).sum())
        own = model(input_ids=rows["input_ids"], labels=rows["labels"]).loss * n_labels
        torch.testing.assert_close(next_token_nll(model, rows).sum().float(), own.float(), rtol=1e-5, atol=0)
        logits = model(input_ids=rows["input_ids"]).logits[:, :-1]
        rowwise = F.cross_entropy(
            logits.transpose(1, 2), rows["labels"][:, 1:], reduction="none", ignore_index=-100
        ).sum(1)
        torch.testing.assert_close(next_token_nll(model, rows), rowwise)
