"""What a Fisher pass does to the model (nothing), and what it refuses."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from fisher_models import FAMILIES, batch, build, layers_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from lwa_helpers.errors import LwaError
from lwa_helpers.fisher.calculator import FisherInformationCalculator
from lwa_helpers.fisher.losses import next_token_nll
from lwa_helpers.fisher.sites import find_sites
from lwa_helpers.models.layers import decoder_layers


def sites_of(model):
    return find_sites(model, decoder_layers(model))


def traces(model, rows, **options):
    return FisherInformationCalculator(**options).calculate(model, [rows]).per_example


def brute(model, rows):
    """Per-example traces by one backward pass per row of the batch."""
    parameters = [list(layer.parameters()) for layer in layers_of(model)]
    found = []
    for loss in next_token_nll(model.eval(), rows):
        gradients = torch.autograd.grad(
            loss, [p for layer in parameters for p in layer], retain_graph=True, allow_unused=True
        )
        squares = iter([0.0 if g is None else g.double().square().sum().item() for g in gradients])
        found.append([sum(next(squares) for _ in layer) for layer in parameters])
    return np.array(found)


def state(model):
    return (
        {name: module.training for name, module in model.named_modules()},
        {name: (p.requires_grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()},
        {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for name, m in model.named_modules()
        },
        {name: value.clone() for name, value in model.state_dict().items()},
    )


def assert_same(before, after):
    assert before[0] == after[0] and before[2] == after[2]
    for name, (flag, grad) in before[1].items():
        assert flag == after[1][name][0]
        assert grad is after[1][name][1] is None or torch.equal(grad, after[1][name][1])
    assert all(torch.equal(value, after[3][name]) for name, value in before[3].items())


def mixed_state(family):
    """Partly frozen, partly in evaluation mode, with gradients here and there and a hook of its own."""
    model = build(family).double().train()
    next_token_nll(model, batch(lengths=(4,))).sum().backward()
    layers = layers_of(model)
    layers[0].requires_grad_(False).zero_grad(set_to_none=True)
    layers[1].eval()
    layers[2].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", ["layer", "parameter"])
def test_model_comes_back_as_it_was(family, granularity):
    model = mixed_state(family)
    before = state(model)
    traces(model, batch(lengths=(5, 3)), granularity=granularity)
    assert_same(before, state(model))


@pytest.mark.parametrize("moment", ["loss", "shape", "nan", "backward", "batch"])
def test_model_comes_back_as_it_was_after_an_exception(moment):
    model = mixed_state("qwen3")
    before = state(model)

    def loss(model, rows):
        nll = next_token_nll(model, rows)
        if moment == "loss":
            raise RuntimeError("in the loss")
        if moment == "backward":
            nll.register_hook(lambda _: (_ for _ in ()).throw(RuntimeError("in the backward pass")))
        return {"shape": nll.mean(), "nan": nll / 0 * 0}.get(moment, nll)

    def dataset():
        yield batch(lengths=(5, 3))
        if moment == "batch":
            raise RuntimeError("in the dataset")

    with pytest.raises((RuntimeError, LwaError)):
        FisherInformationCalculator().calculate(model, dataset(), loss=loss)
    assert_same(before, state(model))


def test_dropout_is_off_and_the_surrounding_grad_mode_does_not_matter():
    model = build("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5).double().train()
    rows = batch(lengths=(6, 8))
    expected = brute(copy.deepcopy(model), rows)
    np.testing.assert_allclose(traces(model, rows), expected, rtol=1e-9)
    with torch.no_grad():
        np.testing.assert_allclose(traces(model, rows), expected, rtol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_as_transformers_does_it(family, reentrant):
    model = build(family).double().train()
    rows = batch(lengths=(6, 8))
    expected = brute(copy.deepcopy(model), rows)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    np.testing.assert_allclose(traces(model, rows), expected, rtol=1e-9)
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("granularity", ["layer", "parameter"])
def test_layers_that_really_recompute_in_the_backward_pass(reentrant, granularity):
    model = build("qwen3").double()
    rows = batch(lengths=(6, 8))
    expected = brute(copy.deepcopy(model), rows)
    computed = []
    for layer in layers_of(model):
        plain = layer.forward

        def forward(hidden, plain=plain, **kwargs):
            return checkpoint(lambda x: computed.append(1) or plain(x, **kwargs), hidden, use_reentrant=reentrant)

        layer.forward = forward
    np.testing.assert_allclose(traces(model, rows, granularity=granularity), expected, rtol=1e-9)
    assert len(computed) == 2 * len(layers_of(model))


@pytest.mark.parametrize("granularity", ["layer", "head", "parameter"])
def test_a_module_used_twice_in_one_pass_counts_its_whole_gradient(granularity):
    model = build("llama").double()
    for layer in layers_of(model)[:2]:
        once = layer.mlp.forward
        layer.mlp.forward = functools.partial(lambda once, x: once(once(x)) + once(x), once)
    rows = batch(lengths=(6, 8), side="left")
    np.testing.assert_allclose(traces(model, rows, granularity=granularity), brute(model, rows), rtol=1e-9)


def test_a_layer_that_does_not_reach_the_loss_has_zero_trace():
    model = build("llama").double()
    top = layers_of(model)[2]
    inner = top.forward
    top.forward = lambda hidden, **kwargs: hidden + 0 * inner(hidden, **kwargs).detach()
    rows = batch(lengths=(6, 8))
    np.testing.assert_allclose(traces(model, rows), brute(model, rows), rtol=1e-9, atol=0)
    assert (traces(model, rows)[:, 2] == 0).all()


class Scaled(nn.Module):
    """Neither linear nor elementwise: its weight enters squared."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x * self.weight**2


@pytest.mark.parametrize("replacement", [Scaled(32), nn.Conv1d(9, 9, 1), nn.Bilinear(2, 2, 2), nn.Embedding(3, 32)])
def test_an_unsupported_module_is_named(replacement):
    model = build("llama")
    layers_of(model)[1].mlp.extra = replacement
    with pytest.raises(LwaError, match=rf"layer 1: mlp\.extra \({type(replacement).__name__}\)"):
        traces(model, batch(lengths=(4,)))


def test_a_parameter_of_the_layer_itself_is_named():
    model = build("llama")
    layers_of(model)[2].gate = nn.Parameter(torch.ones(3))
    with pytest.raises(LwaError, match="layer 2: the layer itself"):
        traces(model, batch(lengths=(4,)))


def test_a_linear_subclass_with_its_own_forward_is_refused():
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(2 * x)

    model = build("llama")
    layers_of(model)[0].mlp.up_proj = Doubled(32, 40)
    with pytest.raises(LwaError, match=r"mlp\.up_proj \(Doubled\)"):
        traces(model, batch(lengths=(4,)))


def test_shared_parameters_are_refused():
    rows = batch(lengths=(4,))
    model = build("llama")
    layers_of(model)[1].mlp.up_proj.weight = layers_of(model)[0].mlp.up_proj.weight
    with pytest.raises(LwaError, match="layer 1: mlp.up_proj .* shares a parameter with layer 0"):
        traces(model, rows)
    model = build("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(LwaError, match="shares a parameter"):
        traces(model, rows)
    model = build("llama")
    model.model.norm.weight = layers_of(model)[0].input_layernorm.weight
    with pytest.raises(LwaError, match="outside the decoder layers"):
        traces(model, rows)


def test_a_weight_used_without_its_module_is_refused():
    model = build("llama")
    mlp = layers_of(model)[0].mlp
    mlp.forward = lambda x: nn.functional.linear(nn.functional.linear(x, mlp.up_proj.weight), mlp.down_proj.weight)
    with pytest.raises(LwaError, match="took no part in the forward pass"):
        traces(model, batch(lengths=(4,)))


def test_activations_without_a_row_axis_count_as_if_they_had_one():
    model, rows = build("llama"), batch(lengths=(4, 4))
    expected = traces(model, rows)
    mlp = layers_of(model)[0].mlp
    whole = mlp.forward
    mlp.forward = lambda x: whole(x.flatten(0, 1)).view_as(x)
    np.testing.assert_allclose(traces(model, rows), expected, rtol=1e-5)


def test_norms_are_recognised_by_what_they_compute():
    units = {"llama": 1.0, "qwen3": 1.0, "gemma3": 0.0, "gpt2": 1.0}
    for family, unit in units.items():
        scales = [site for site in sites_of(build(family)) if site.kind == "scale"]
        assert len(scales) == 3 * {"qwen3": 4, "gemma3": 6}.get(family, 2)
        assert {site.unit for site in scales} == {unit}


@pytest.mark.parametrize(("family", "zero"), [("llama", 0.0), ("qwen3", 1e-9), ("gemma3", -1.0)])
def test_a_norm_that_multiplies_by_zero_is_computed_from_its_input(family, zero):
    model = build(family).double()
    norm, other = (layer.input_layernorm for layer in layers_of(model)[:2])
    with torch.no_grad():
        norm.weight[3] = zero
    divisible = {site.module: site.divisible for site in sites_of(model) if site.kind == "scale"}
    assert not divisible[norm] and divisible[other]
    rows = batch(lengths=(6, 4))
    np.testing.assert_allclose(traces(model, rows), brute(model, rows), rtol=1e-6)


def test_a_norm_with_a_bias_is_computed_from_its_input():
    assert not any(site.divisible for site in sites_of(build("gpt2")))


def test_bad_input_is_named():
    model, calculator = build("llama"), FisherInformationCalculator()
    rows = batch(lengths=(4, 3))
    with pytest.raises(LwaError, match="no batch"):
        calculator.calculate(model, iter(()))
    with pytest.raises(LwaError, match="labels"):
        calculator.calculate(model, [{"input_ids": rows["input_ids"]}])
    with pytest.raises(LwaError, match="not a dict"):
        calculator.calculate(model, [rows["input_ids"]])
    with pytest.raises(LwaError, match="labels have shape"):
        calculator.calculate(model, [rows | {"labels": rows["labels"][:, 1:]}])
    with pytest.raises(LwaError, match=r"shape \(\) for batch 0"):
        calculator.calculate(model, [rows], loss=lambda model, rows: next_token_nll(model, rows).mean())
    with pytest.raises(LwaError, match="not finite in row 1"):
        calculator.calculate(
            model, [rows], loss=lambda model, rows: next_token_nll(model, rows) / torch.tensor([1.0, 0.0])
        )
    with pytest.raises(LwaError, match="pass .model"):
        calculator.calculate(object(), [rows])
    for wrong in ({"estimator": "true"}, {"granularity": "block"}):
        with pytest.raises(LwaError, match="use one of"):
            FisherInformationCalculator(**wrong)
