"""The rivals of Fisher information against hand-worked values and surgery on the model itself."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lwa_helpers.errors import LwaError
from lwa_helpers.fisher import importance
from lwa_helpers.fisher.losses import next_token_nll


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).double()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, n_positions=32)).double()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 40, (5, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[3, -2:] = 0
    parts = [slice(0, 3), slice(3, 5)]
    return [{"input_ids": ids[p], "attention_mask": mask[p], "labels": ids[p]} for p in parts]


def alone(batches):
    """Every row by itself, padding cut off."""
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool()):
            yield ids[mask][None]


@pytest.mark.parametrize("make", [llama, gpt2])
def test_block_influence_and_angle_from_hidden_states_of_single_rows(make, batches):
    model = make().eval()
    layers, block, angle = importance.decoder_layers(model), [], []
    for ids in alone(batches):
        states = []
        handles = [
            layer.register_forward_hook(lambda _m, a, out, states=states: states.append((a[0], out)))
            for layer in layers
        ]
        with torch.no_grad():
            model(input_ids=ids)
        [handle.remove() for handle in handles]
        cos = [
            [float(x @ y / (x.norm() * y.norm())) for x, y in zip(a[0], (out[0] if isinstance(out, tuple) else out)[0])]
            for a, out in states
        ]
        block.append(np.array(cos).T)
        angle.append(np.arccos(np.array(cos)[:, -1]) / np.pi)
    np.testing.assert_allclose(importance.block_influence(model, batches), 1 - np.concatenate(block).mean(0), rtol=1e-6)
    np.testing.assert_allclose(importance.angular_distance(model, batches), np.mean(angle, 0), rtol=1e-6)


def test_magnitude_by_hand():
    model = llama()
    for index, layer in enumerate(model.model.layers):
        for parameter in layer.parameters():
            torch.nn.init.constant_(parameter, -(index + 1.0))
    size = sum(p.numel() for p in model.model.layers[0].parameters())
    np.testing.assert_array_equal(importance.weight_magnitude(model), size * np.array([1.0, 2.0, 3.0]))


def test_taylor_is_the_sum_of_absolute_weight_times_gradient(batches):
    model = llama()
    torch.stack([row for batch in batches for row in next_token_nll(model, batch)]).mean().backward()
    expected = [sum((p * p.grad).abs().sum().item() for p in layer.parameters()) for layer in model.model.layers]
    kept = {name: p.grad.clone() for name, p in model.named_parameters()}
    np.testing.assert_allclose(importance.taylor(model, iter(batches)), expected, rtol=1e-6)  # RMSNorm works in float32
    assert all(torch.equal(p.grad, kept[name]) for name, p in model.named_parameters())


def test_leave_one_layer_out_equals_a_model_without_the_layer(batches):
    model = llama()
    rows = importance.leave_one_layer_out_rows(model, iter(batches))
    assert rows.shape == (5, 3)
    whole = torch.cat([next_token_nll(model, batch) for batch in batches])
    for index in range(3):
        cut = copy.deepcopy(model)
        cut.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(cut.model.layers) if i != index)
        cut.config.num_hidden_layers = 2
        without = torch.cat([next_token_nll(cut, batch) for batch in batches])
        np.testing.assert_allclose(rows[:, index], (without - whole).detach().numpy(), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(importance.leave_one_layer_out(model, batches), rows.mean(0))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_layer_that_does_nothing_scores_zero(make, batches):
    model = make()
    layer = importance.decoder_layers(model)[1]
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if any(part in name for part in ("o_proj", "down_proj", "c_proj")):
                parameter.zero_()
    for score in (importance.block_influence, importance.angular_distance, importance.leave_one_layer_out):
        values = np.abs(score(model, batches))
        assert values[1] < 1e-7 and values[0] > 1e-4 and values[2] > 1e-4, score.__name__


@pytest.mark.parametrize(
    "score",
    [importance.block_influence, importance.angular_distance, importance.taylor, importance.leave_one_layer_out],
)
def test_model_comes_back_as_it_was_and_no_batch_is_an_error(score, batches):
    model = llama().train()
    model.model.embed_tokens.weight.requires_grad_(False)

    def failing(model, batch):
        next_token_nll(model, batch)
        raise RuntimeError("loss failed")

    score(model, batches)
    with pytest.raises(RuntimeError, match="loss failed"):
        score(model, batches, failing)
    with pytest.raises(LwaError, match="no batch"):
        score(model, iter(()))
    assert model.training and not model.model.embed_tokens.weight.requires_grad and model.lm_head.weight.requires_grad
    assert all("forward" not in layer.__dict__ and not layer._forward_hooks for layer in model.model.layers)
    assert all(p.grad is None for p in model.parameters())
