"""Traces and diagonal against per-example autograd on rows without padding, for six model families."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fisher_models import FAMILIES, batch, build, layers_of
from torch.overrides import TorchFunctionMode
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from lwa_helpers.fisher import kernels
from lwa_helpers.fisher.calculator import FisherInformationCalculator
from lwa_helpers.fisher.hooks import Float32Attention


def per_example_gradients(model, rows):
    """For each row alone: gradient of the summed NLL by every parameter of the decoder layers, from autograd."""
    model = model.eval()
    flags = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(True)
    found = []
    for ids, mask, labels in zip(rows["input_ids"], rows["attention_mask"].bool(), rows["labels"]):
        model.zero_grad()
        logits = model(input_ids=ids[mask][None]).logits[0, :-1]
        F.cross_entropy(logits, labels[mask][1:], reduction="sum").backward()
        found.append(
            [
                {
                    name: p.grad.clone() if p.grad is not None else torch.zeros_like(p)
                    for name, p in layer.named_parameters()
                }
                for layer in layers_of(model)
            ]
        )
    model.zero_grad()
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    return found


def brute_traces(found):
    """(n, L) float64."""
    return np.array([[sum(g.double().square().sum().item() for g in layer.values()) for layer in row] for row in found])


def own_tolerance(module, tolerance):
    """Gemma3RMSNorm applies its weight in float32 whatever the model's type, so its own gradient is float32."""
    return max(tolerance, 1e-6) if isinstance(module, Gemma3RMSNorm) else tolerance


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_layer_module_and_diagonal_equal_brute_force(family, side, dtype, tolerance):
    model = build(family).to(dtype)
    rows = batch(lengths=(9, 4, 7), side=side, masked=True)
    found = per_example_gradients(model, rows)
    expected = brute_traces(found)
    assert (expected > 0).all()
    for granularity in ("layer", "module", "head", "parameter"):
        result = FisherInformationCalculator(granularity=granularity).calculate(model, [rows])
        np.testing.assert_allclose(result.per_example, expected, rtol=tolerance)
        np.testing.assert_allclose(result.per_layer, expected.mean(0), rtol=tolerance)
    sizes = dict.fromkeys(range(len(layers_of(model))), 0)
    for column, traces in zip(result.columns, result.traces.T):
        owner = layers_of(model)[column.layer].get_submodule(column.module)
        names = [f"{column.module}.{name}" for name, _ in owner.named_parameters(recurse=False)]
        module = [sum(row[column.layer][name].double().square().sum().item() for name in names) for row in found]
        np.testing.assert_allclose(traces, module, rtol=own_tolerance(owner, tolerance), atol=tolerance * 1e-6)
        sizes[column.layer] += column.n_parameters
    for index, layer in enumerate(layers_of(model)):
        assert sizes[index] == sum(p.numel() for p in layer.parameters())
        for name, _ in layer.named_parameters():
            mean = torch.stack([row[index][name].square() for row in found]).mean(0)
            near = own_tolerance(layer.get_submodule(name.rpartition(".")[0]), tolerance)
            torch.testing.assert_close(
                result.diagonal[f"{index}.{name}"], mean, rtol=near, atol=float(mean.max()) * near
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_equal_slices_of_the_brute_force_gradient(family):
    model = build(family).double()
    rows = batch(lengths=(8, 5))
    found = per_example_gradients(model, rows)
    result = FisherInformationCalculator(granularity="head").calculate(model, [rows])
    frame = result.to_frame()
    head_dim = next(m.head_dim for m in model.modules() if hasattr(m, "head_dim") and isinstance(m.head_dim, int))
    checked = set()
    for row in frame[frame["head"].notna()].itertuples():
        leaf = row.module.split(".")[-1]
        part = slice(row.head * head_dim, (row.head + 1) * head_dim)
        by_input = leaf in ("o_proj", "c_proj")
        axis = int(by_input) if family != "gpt2" else int(not by_input)
        total = 0.0
        for example in found:
            gradient = example[row.layer][f"{row.module}.weight"]
            total += (gradient[:, part] if axis else gradient[part]).square().sum().item()
            bias = example[row.layer].get(f"{row.module}.bias")
            total += 0.0 if bias is None or by_input else bias[part].square().sum().item()
        assert row.trace == pytest.approx(total / len(found), rel=1e-9)
        checked.add(leaf)
    assert checked == {"phi3": {"qkv_proj", "o_proj"}, "gpt2": {"c_attn", "c_proj"}}.get(
        family, {"q_proj", "k_proj", "v_proj", "o_proj"}
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_untied_and_tied_embeddings_give_what_autograd_gives(family):
    for tied in (True, False):
        model = build(family, tie_word_embeddings=tied).double()
        rows = batch(lengths=(6, 8))
        result = FisherInformationCalculator().calculate(model, [rows])
        np.testing.assert_allclose(result.per_example, brute_traces(per_example_gradients(model, rows)), rtol=1e-9)


def test_long_rows_take_the_direct_form_and_short_rows_the_gram(monkeypatch):
    from lwa_helpers.fisher import collect

    used = []
    for name in ("direct_traces", "part_traces"):
        real = getattr(collect, name)
        monkeypatch.setattr(collect, name, lambda *args, real=real, name=name: used.append(name) or real(*args))
    model = build("llama").double()
    for length, form in ((5, "part_traces"), (120, "direct_traces")):
        used.clear()
        rows = batch(lengths=(length,))
        result = FisherInformationCalculator().calculate(model, [rows])
        np.testing.assert_allclose(result.per_example, brute_traces(per_example_gradients(model, rows)), rtol=1e-9)
        assert form in used
    assert "part_traces" not in used


def test_row_without_label_counts_as_an_example_of_zero_gradient():
    model = build("qwen3").double()
    rows = batch(lengths=(6, 6, 5))
    rows["labels"][1] = -100
    result = FisherInformationCalculator().calculate(model, [rows])
    expected = brute_traces(per_example_gradients(model, rows))
    assert result.n_examples == 3 and (result.per_example[1] == 0).all() and (expected[1] == 0).all()
    np.testing.assert_allclose(result.per_layer, expected.mean(0), rtol=1e-9)
    rows["labels"][:] = -100
    assert (FisherInformationCalculator().calculate(model, [rows]).per_example == 0).all()


def test_labels_at_padding_do_not_count():
    model = build("llama").double()
    for side in ("left", "right"):
        rows = batch(lengths=(7, 3), side=side)
        clean = FisherInformationCalculator().calculate(model, [rows]).per_example
        rows["labels"] = rows["input_ids"].clone()
        np.testing.assert_allclose(
            FisherInformationCalculator().calculate(model, [rows]).per_example, clean, rtol=1e-12
        )


def test_a_generator_with_a_smaller_last_batch_equals_single_rows():
    model = build("gemma3").double()
    rows = batch(lengths=(9, 4, 7, 6, 8))
    whole = FisherInformationCalculator().calculate(model, [rows])
    parts = ({name: value[start : start + 2] for name, value in rows.items()} for start in range(0, 5, 2))
    result = FisherInformationCalculator().calculate(model, parts)
    assert result.n_examples == 5
    np.testing.assert_allclose(result.per_example, whole.per_example, rtol=1e-9)


def test_frozen_parameters_count():
    model = build("qwen2").double()
    rows = batch(lengths=(5, 6))
    expected = FisherInformationCalculator().calculate(model, [rows]).per_layer
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    np.testing.assert_array_equal(FisherInformationCalculator().calculate(model, [rows]).per_layer, expected)
    model.requires_grad_(False)
    np.testing.assert_array_equal(FisherInformationCalculator().calculate(model, [rows]).per_layer, expected)


def test_bfloat16_autocast_and_weights_stay_close_to_float32():
    model = build("llama", hidden_size=64, intermediate_size=96).float()
    rows = batch(lengths=(30, 22, 27, 30))
    exact = FisherInformationCalculator().calculate(model, [rows]).per_layer
    for granularity in ("layer", "parameter"):
        auto = (
            FisherInformationCalculator(granularity=granularity, autocast=torch.bfloat16)
            .calculate(model, [rows])
            .per_layer
        )
        np.testing.assert_allclose(auto, exact, rtol=0.03)
        with torch.autocast("cpu", torch.bfloat16):
            around = FisherInformationCalculator(granularity=granularity).calculate(model, [rows]).per_layer
        np.testing.assert_allclose(around, auto, rtol=1e-6)
    half = FisherInformationCalculator().calculate(model.bfloat16(), [rows])
    assert half.traces.dtype == np.float64
    np.testing.assert_allclose(half.per_layer, exact, rtol=0.05)


class SeenTypes(TorchFunctionMode):
    """Notes in what type each attention call that reaches torch will run."""

    def __init__(self):
        super().__init__()
        self.types = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.types.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else args[0].dtype)
        return func(*args, **kwargs or {})


def test_attention_under_bfloat16_autocast_runs_in_float32():
    model, rows = build("llama"), batch(lengths=(9, 6))
    with SeenTypes() as plain, torch.autocast("cpu", torch.bfloat16):
        model(rows["input_ids"])
    with SeenTypes() as ours:
        FisherInformationCalculator(autocast=torch.bfloat16).calculate(model, [rows])
    assert plain.types == {torch.bfloat16} and ours.types == {torch.float32}


def test_float32_attention_gives_bfloat16_and_leaves_other_types_alone():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 8, generator=generator) for _ in range(3))
    with Float32Attention():
        half = F.scaled_dot_product_attention(*(x.bfloat16() for x in (q, k, v)), is_causal=True)
        whole = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    later = torch.triu(torch.ones(7, 7, dtype=torch.bool), 1)
    expected = ((q @ k.mT / 8**0.5).masked_fill(later, -torch.inf)).softmax(-1) @ v
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, kernels.BAND - 1, kernels.BAND, kernels.BAND + 1, 70])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("n_parts", [1, 3])
def test_the_gram_form_in_bands_equals_the_gradient_formed(tokens, dtype, tolerance, n_parts):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, tokens, width, generator=generator, dtype=dtype) for width in (5, 12))
    gradient = b.double().mT @ a.double()
    expected = gradient.unflatten(1, (n_parts, -1)).square().sum((2, 3))
    torch.testing.assert_close(kernels.part_traces(kernels.pair_gram(a), b, n_parts), expected, rtol=tolerance, atol=0)


def test_sums_of_bfloat16_products_add_little_error():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 110, 96, generator=generator).bfloat16()
    b = torch.randn(4, 110, 48, generator=generator).mul(0.01).bfloat16()
    exact = (b.double().mT @ a.double()).square().sum((1, 2))
    torch.testing.assert_close(kernels.part_traces(kernels.pair_gram(a), b, 1)[:, 0], exact, rtol=2e-3, atol=0)
    torch.testing.assert_close(kernels.direct_traces(b, a), exact, rtol=2e-3, atol=0)
