"""Squared norms of per-row weight gradients of a linear map, from its inputs a (B, T, d_in) and output gradients b (B, T, d_out).

Row r's gradient is sum_t b_rt a_rt^T. Two ways to its squared norm, both exact:
  token Gram  sum_{t,t'} (a_t . a_t') (b_t . b_t'),      B T^2 (d_in + d_out) multiplications, never forms the gradient;
  direct      form the gradient block by block, square,  B T d_in d_out multiplications.
Products of bfloat16 factors are accumulated in float32 inside the matrix product and stored in bfloat16 before the sums,
which are float32; sums over blocks are float64. What that adds to the error of the factors themselves stays below 0.2 % of a
trace (tested). On a GPU with Triton installed nothing is stored: see triton_kernels.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

BLOCK_ELEMENTS = {
    "cpu": 1 << 17,
    "cuda": 1 << 26,
}  # one gradient block: half a MiB stays in a core's cache; 256 MiB on a GPU
BAND = 32  # tokens whose products with all tokens up to them are taken at once, where half of a Gram is enough
SQUARING_COST = (
    16  # squaring one gradient entry costs about as much as this many multiplications inside a matrix product
)


def by_triton(x: Tensor) -> bool:
    """Whether the Triton kernels take this: on a CUDA device, up to float32, where Triton is installed."""
    return x.is_cuda and x.dtype != torch.float64 and find_spec("triton") is not None


def triton_kernels() -> ModuleType:
    """The Triton kernels' module, imported only where it is used."""
    return import_module("lwa_helpers.fisher.triton_kernels")


def wide(x: Tensor) -> Tensor:
    """Half-precision tensors as float32, others as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def token_gram(x: Tensor) -> list[Tensor]:
    """Inner products of all pairs of tokens, (..., T, d) -> bands (..., t - s, t) of the lower triangle, float32 or better.

    Bands of BAND tokens cost little more than half of the whole. In half precision and off the CPU there is one, the whole: a
    call costs more there than what it saves.
    """
    tokens = x.shape[-2]
    height = BAND if x.device.type == "cpu" and wide(x) is x else tokens
    ends = [(start, min(start + height, tokens)) for start in range(0, tokens, height)]
    return [wide(x[..., s:t, :] @ x[..., :t, :].mT) for s, t in ends]


def pair_gram(x: Tensor) -> list[Tensor]:
    """token_gram in which a product that stands for two pairs, (t, u) and (u, t), is counted twice."""
    bands = token_gram(x)
    for band in bands[1:]:
        band[..., : band.shape[-1] - band.shape[-2]] *= 2
    return bands


def gram_is_cheaper(tokens: int, d_in: int, d_out: int, have_input_gram: bool) -> bool:
    """Compare multiplications of the two forms for rows of `tokens` tokens."""
    gram = tokens * (d_out if have_input_gram else d_in + d_out)
    return gram < (tokens + SQUARING_COST) * d_in * d_out / tokens


def part_traces(pairs: list[Tensor], sliced: Tensor, n_parts: int) -> Tensor:
    """Squared gradient norm of each of n_parts equal slices of one side: (B, n_parts) float64.

    pairs: pair_gram of the side that stays whole; sliced (B, T, n_parts * q).
    """
    split = sliced.unflatten(-1, (n_parts, -1)).transpose(1, 2) if n_parts > 1 else sliced.unsqueeze(1)
    bands = zip(pairs, token_gram(split))
    return sum(torch.linalg.vecdot(whole.unsqueeze(1).flatten(-2), part.flatten(-2)).double() for whole, part in bands)


def direct_traces(left: Tensor, right: Tensor, square_sum: Tensor | None = None) -> Tensor:
    """Squared norm of each row's left^T right, (B, T, m), (B, T, n) -> (B,) float64.

    square_sum (m, n), when given, receives the sum over rows of the squared entries: the Fisher diagonal.
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
