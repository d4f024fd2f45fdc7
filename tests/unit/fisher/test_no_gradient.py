"""Where no gradient arrives: a legitimate zero is zero, all else is an error and never reads as zero."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from fisher_models import batch, build, layers_of, row_traces, tiny
from torch import nn
from transformers import LlamaConfig

from lwa_helpers.errors import LwaError
from lwa_helpers.fisher.baseline import squared_batch_gradient
from lwa_helpers.fisher.calculator import FisherInformationCalculator
from lwa_helpers.fisher.importance import block_influence, leave_one_layer_out, taylor
from lwa_helpers.fisher.kfac import kfac_effective_ranks
from lwa_helpers.fisher.losses import next_token_nll

SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama():
    return tiny(LlamaConfig(**SMALL))


def traces(model, rows, loss=None, **options):
    return FisherInformationCalculator(**options).calculate(model, [rows], loss).per_example


@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("estimator", ["empirical", "sampled"])
def test_the_surrounding_mode_does_not_count(around, estimator):
    model, rows = llama(), batch(lengths=(7, 4), side="left")
    expected = traces(model, rows, estimator=estimator)
    with around():
        made_inside = {name: value.clone() for name, value in rows.items()}
        for given in (rows, made_inside):
            np.testing.assert_array_equal(traces(model, given, estimator=estimator), expected)
    assert all(parameter.requires_grad for parameter in model.parameters()) and (expected > 0).all()


def test_other_scores_inside_inference_mode():
    model, rows = llama(), [batch(lengths=(7, 4))]
    scores = (block_influence, leave_one_layer_out, taylor, squared_batch_gradient)
    expected = [score(model, rows) for score in scores]
    ranks = kfac_effective_ranks(model, rows)
    with torch.inference_mode():
        for score, values in zip(scores, expected):
            np.testing.assert_array_equal(score(model, rows), values)
        assert kfac_effective_ranks(model, rows).equals(ranks)


def test_a_model_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = llama()
        with pytest.raises(
            LwaError, match=r"LlamaForCausalLM: model.embed_tokens.weight was made inside .*inference_mode"
        ):
            traces(model, batch(lengths=(4, 3)))
    with pytest.raises(LwaError, match="make the model outside"):
        traces(model, batch(lengths=(4, 3)))


def in_no_grad(model, rows):
    with torch.no_grad():
        return next_token_nll(model, rows)


def in_inference_mode(model, rows):
    with torch.inference_mode():
        return next_token_nll(model, rows)


def of_a_head_alone(model, rows):
    """It has a gradient, but none that reaches a layer."""
    with torch.no_grad():
        hidden = model.model(rows["input_ids"]).last_hidden_state
    head = nn.Linear(16, 50, dtype=torch.float64)
    return head(hidden).sum((1, 2))


DETACHED = {
    "no_grad": in_no_grad,
    "inference_mode": in_inference_mode,
    "detached": lambda model, rows: next_token_nll(model, rows).detach(),
    "constant": lambda model, rows: torch.ones(len(rows["input_ids"])),
    "constant that requires a gradient": lambda model, rows: torch.ones(2, requires_grad=True) * 1,
    "a head of its own": of_a_head_alone,
}


@pytest.mark.parametrize("name", DETACHED)
def test_a_detached_loss_is_an_error_not_zero(name):
    model, loss, rows = llama(), DETACHED[name], batch(lengths=(5, 4))
    for call in (
        lambda: traces(model, rows, loss),
        lambda: squared_batch_gradient(model, [rows], loss),
        lambda: taylor(model, [rows], loss),
        lambda: kfac_effective_ranks(model, [rows], loss),
    ):
        with pytest.raises(LwaError, match="no gradient of the loss of batch 0 reaches a decoder layer"):
            call()
    later = [batch(lengths=(5, 4)), rows | {"detach": torch.ones(2)}]
    with pytest.raises(LwaError, match="batch 1"):
        FisherInformationCalculator().calculate(
            model, later, lambda model, rows: (loss if "detach" in rows else next_token_nll)(model, rows)
        )


def test_rows_without_a_label_have_no_fisher_information():
    model, rows = llama(), batch(lengths=(5, 4))
    rows["labels"] = torch.full_like(rows["labels"], -100)
    assert (traces(model, rows) == 0).all()
    assert (traces(model, rows, lambda model, rows: torch.zeros(2)) == 0).all()  # a loss may know that there is none
    assert (squared_batch_gradient(model, [rows]) == 0).all() and (taylor(model, [rows]) == 0).all()
    assert kfac_effective_ranks(model, [rows])["input_rank"].isna().all()
    one_token = {name: value[:, :1] for name, value in batch(lengths=(1, 1)).items()}
    assert (traces(model, one_token) == 0).all()


def test_frozen_embeddings_change_nothing():
    model, rows = build("gemma3").double(), batch(lengths=(5, 4))
    expected = traces(model, rows)
    model.get_input_embeddings().requires_grad_(False)
    np.testing.assert_array_equal(traces(model, rows), expected)


def test_a_gradient_that_starts_inside_the_layers_is_seen():
    """Between layers, and inside one, what comes before is cut off; parameters after the cut still have gradients."""
    model, rows = llama(), batch(lengths=(5, 4))
    first, second = layers_of(model)
    norm = first.input_layernorm.forward
    first.input_layernorm.forward = lambda x: norm(x).detach()
    attention = second.forward
    second.forward = lambda hidden, **kwargs: attention(hidden.detach(), **kwargs)
    expected = row_traces(model, rows)
    assert (expected[:, 0] == 0).all() and (expected[:, 1] > 0).all()
    np.testing.assert_allclose(traces(model, rows), expected, rtol=1e-9)
    second.forward = attention
    np.testing.assert_allclose(traces(model, rows), row_traces(model, rows), rtol=1e-9)


class Experts(nn.Module):
    """Sends every token to one of three experts by its own numbers, as mixtures do; the last is never used."""

    def __init__(self, size):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(size, size) for _ in range(3))

    def forward(self, x):
        tokens = x.flatten(0, 1)
        choice = (tokens[:, 0] > 0).long()
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            chosen = choice == index
            if chosen.any():
                out[chosen] = expert(tokens[chosen])
        return out.view_as(x)


@pytest.mark.parametrize("granularity", ["layer", "module", "parameter"])
def test_experts_get_the_gradients_of_their_own_tokens(granularity):
    model, rows = llama(), batch(lengths=(7, 4, 6), side="left")
    for layer in layers_of(model):
        layer.mlp = Experts(16).double()
    result = FisherInformationCalculator(granularity=granularity).calculate(
        model, [rows, batch(lengths=(3, 5), seed=2)]
    )
    expected = np.concatenate([row_traces(model, rows), row_traces(model, batch(lengths=(3, 5), seed=2))])
    np.testing.assert_allclose(result.per_example, expected, rtol=1e-9)
    if granularity == "module":
        frame = result.to_frame().set_index(["layer", "module"])["trace"]
        assert (frame.xs("mlp.experts.2", level=1) == 0).all() and (frame.xs("mlp.experts.0", level=1) > 0).all()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_layer_that_is_never_reached_is_zero_and_said_so(caplog):
    model, rows = llama(), batch(lengths=(5, 4))
    layers_of(model)[1].forward = lambda hidden, **kwargs: hidden
    with caplog.at_level(logging.WARNING):
        found = traces(model, rows)
    np.testing.assert_allclose(found, row_traces(model, rows), rtol=1e-9)
    assert (found[:, 1] == 0).all() and "no example's loss depends on decoder layer 1" in caplog.text
    caplog.clear()
    rows["labels"] = torch.full_like(rows["labels"], -100)
    traces(llama(), rows)
    assert not caplog.text


def test_gradients_that_a_model_has_stay_its_own_where_modules_are_not_called():
    model, rows = llama(), batch(lengths=(5, 4))
    next_token_nll(model, rows).sum().backward()
    kept = {name: p.grad.clone() for name, p in model.named_parameters()}
    layers_of(model)[1].forward = lambda hidden, **kwargs: hidden
    traces(model, rows)
    assert all(torch.equal(p.grad, kept[name]) for name, p in model.named_parameters())
