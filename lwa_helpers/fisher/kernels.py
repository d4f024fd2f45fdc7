"""Squared norms of the per-row weight gradients of a linear map.

The map has inputs a (B, T, d_in) and output gradients b (B, T, d_out). Row r's gradient is sum_t b_rt a_rt^T. There are
two ways to compute its squared norm, both exact:
  token Gram  sum_{t,t'} (a_t . a_t') (b_t . b_t'),      B T^2 (d_in + d_out) multiplications, never forms the gradient;
  direct      form the gradient block by block, square,  B T d_in d_out multiplications.
Products of bfloat16 factors are accumulated in float32 inside the matrix product and stored in bfloat16 before the
sums, which are float32. Sums over blocks are float64. Together this adds less than 0.2 % of a trace to the error of the
factors themselves (tested). On a GPU with Triton installed no product is stored: see triton_kernels.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

# Float32 entries of one gradient block: half a MiB, which stays in a core's cache, and 256 MiB on a GPU.
BLOCK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 26}
# Tokens whose products with all tokens up to them are computed at once, where half of a Gram is enough.
BAND = 32
# Squaring one gradient entry costs about as much as this many multiplications inside a matrix product.
SQUARING_COST = 16


def by_triton(x: Tensor) -> bool:
    """Whether the Triton kernels take `x`: a tensor on a CUDA device, of float32 at most, where Triton is installed."""
    return x.is_cuda and x.dtype != torch.float64 and find_spec("triton") is not None


def triton_kernels() -> ModuleType:
    """Return the module of the Triton kernels, which is imported only where it is used."""
    return import_module("lwa_helpers.fisher.triton_kernels")


def wide(x: Tensor) -> Tensor:
    """Return a half-precision tensor as float32, any other as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def token_gram(x: Tensor) -> list[Tensor]:
    """Compute the inner products of all pairs of tokens.

    Bands of BAND tokens cost little more than half of the whole matrix. In half precision and off the CPU there is a
    single band, the whole, because more calls would cost more than they save.

    Args:
        x: The tokens, (..., T, d).

    Returns:
        Bands (..., t - s, t) of the lower triangle, float32 or better.
    """
    tokens = x.shape[-2]
    height = BAND if x.device.type == "cpu" and wide(x) is x else tokens
    ends = [(start, min(start + height, tokens)) for start in range(0, tokens, height)]
    return [wide(x[..., s:t, :] @ x[..., :t, :].mT) for s, t in ends]


def pair_gram(x: Tensor) -> list[Tensor]:
    """Return token_gram with each product that stands for two pairs, (t, u) and (u, t), counted twice."""
    bands = token_gram(x)
    for band in bands[1:]:
        band[..., : band.shape[-1] - band.shape[-2]] *= 2
    return bands


def gram_is_cheaper(tokens: int, d_in: int, d_out: int, have_input_gram: bool) -> bool:
    """Whether the token Gram costs fewer multiplications than the direct form, for rows of `tokens` tokens."""
    gram = tokens * (d_out if have_input_gram else d_in + d_out)
    return gram < (tokens + SQUARING_COST) * d_in * d_out / tokens


def part_traces(pairs: list[Tensor], sliced: Tensor, n_parts: int) -> Tensor:
    """Compute the squared gradient norm of each of n_parts equal slices of one side.

    Args:
        pairs: pair_gram of the side that stays whole.
        sliced: The other side, (B, T, n_parts * q).
        n_parts: Number of slices.

    Returns:
        Squared norms (B, n_parts), float64.
    """
    split = sliced.unflatten(-1, (n_parts, -1)).transpose(1, 2) if n_parts > 1 else sliced.unsqueeze(1)
    bands = zip(pairs, token_gram(split))
    return sum(torch.linalg.vecdot(whole.unsqueeze(1).flatten(-2), part.flatten(-2)).double() for whole, part in bands)


def direct_traces(left: Tensor, right: Tensor, square_sum: Tensor | None = None) -> Tensor:
    """Compute the squared norm of each row's left^T right.

    Args:
        left: (B, T, m).
        right: (B, T, n).
        square_sum: When given, (m, n); receives the sum over rows of the squared entries, which is the Fisher diagonal.

    Returns:
        Squared norms (B,), float64.
    """
    n_rows, n_cols = left.shape[-1], right.shape[-1]
    block = max(1, BLOCK_ELEMENTS.get(left.device.type, BLOCK_ELEMENTS["cpu"]) // n_cols)
    traces = torch.zeros(len(left), dtype=torch.float64, device=left.device)
    for start in range(0, n_rows, block):
        columns = left[..., start : start + block].mT
        for row in range(len(left)):
            gradient = wide(columns[row] @ right[row])
            traces[row] += torch.linalg.vecdot(gradient.flatten(), gradient.flatten())
            if square_sum is not None:
                square_sum[start : start + block].addcmul_(gradient, gradient)
    return traces
