"""The Triton kernels against per-row gradients formed in float64; on the CPU in Triton's interpreter (see conftest)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from fisher_models import batch, build

from lwa_helpers.fisher import triton_kernels
from lwa_helpers.fisher.calculator import FisherInformationCalculator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1, 1, 1), (2, 7, 5, 3), (3, 64, 64, 64), (2, 130, 48, 96), (1, 65, 129, 33)]  # rows, tokens, p, q


def inputs(rows, tokens, p, q, dtype):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, tokens, p, generator=generator).to(DEVICE, dtype)
    b = torch.randn(rows, q, tokens, generator=generator).to(DEVICE, dtype).mT  # not contiguous
    b[0, tokens // 2 :] = 0  # padding
    return a, b, b.double().mT @ a.double()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-4)])
@pytest.mark.parametrize("shape", SHAPES)
def test_ghost_traces(shape, dtype, tolerance):
    a, b, gradient = inputs(*shape, dtype)
    traces = triton_kernels.ghost_traces(a, b)
    assert traces.dtype == torch.float64
    torch.testing.assert_close(traces[:, 0], gradient.square().sum((1, 2)), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("n_parts", [1, 3])
def test_ghost_traces_of_slices(n_parts):
    a, b, gradient = inputs(2, 70, 20, 36, torch.float32)
    expected = gradient.unflatten(1, (n_parts, -1)).square().sum((2, 3))
    torch.testing.assert_close(triton_kernels.ghost_traces(a, b, n_parts), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-4)])
@pytest.mark.parametrize("shape", SHAPES)
def test_square_sums_and_their_traces(shape, dtype, tolerance):
    a, b, gradient = inputs(*shape, dtype)
    sums = torch.ones(shape[3], shape[2], device=DEVICE)
    traces = triton_kernels.square_sums(b, a, sums)
    torch.testing.assert_close(traces, gradient.square().sum((1, 2)), rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(sums.double(), 1 + gradient.square().sum(0), rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("granularity", ["layer", "head", "parameter"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_whole_calculation_with_the_kernels_equals_one_without(monkeypatch, granularity, family):
    model, rows = build(family, num_hidden_layers=1).to(DEVICE), batch(lengths=(9, 4))
    calculator = FisherInformationCalculator(granularity=granularity)
    plain = calculator.calculate(model.cpu(), [rows])
    monkeypatch.setattr("lwa_helpers.fisher.kernels.by_triton", lambda x: x.dtype != torch.float64)
    kernels = calculator.calculate(model.to(DEVICE), [rows])
    np.testing.assert_allclose(kernels.traces, plain.traces, rtol=1e-4)
    for name, value in plain.diagonal.items():
        torch.testing.assert_close(kernels.diagonal[name].cpu(), value, rtol=1e-4, atol=1e-9)
