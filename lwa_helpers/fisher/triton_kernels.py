"""The two sums of squares on a GPU, without any T x T matrix or per-row gradient in memory. Needs Triton.

Inputs a (B, T, p) and output gradients b (B, T, q) may be of any floating type. Products are accumulated in float32,
partial sums of the traces in float64. Tiles are square with sides of TILE; what lies beyond an edge is read as zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64


def _readable(x: Tensor) -> Tensor:
    """Return x as float32 for Triton's interpreter, which has no bfloat16 products; float32 holds bfloat16 exactly."""
    return x.float() if triton.knobs.runtime.interpret else x


@triton.jit
def _tile(base, row, n_rows, column, n_columns, row_stride, column_stride):
    """Load rows x columns of a matrix; entries outside the matrix are zero."""
    inside = (row[:, None] < n_rows) & (column[None, :] < n_columns)
    return tl.load(
        base + row[:, None].to(tl.int64) * row_stride + column[None, :] * column_stride, mask=inside, other=0.0
    )


@triton.jit
def _gram(base, t, u, tokens, width, token_stride, column_stride, TILE: tl.constexpr):
    """Return the inner products of tokens t with tokens u, (TILE, TILE) float32."""
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, width, TILE):
        column = start + tl.arange(0, TILE)
        x = _tile(base, t, tokens, column, width, token_stride, column_stride)
        y = _tile(base, u, tokens, column, width, token_stride, column_stride)
        total += tl.dot(x, tl.trans(y), input_precision="ieee")
    return total


@triton.jit
def _ghost(
    a, b, out, tokens, p, q, a_row, a_token, a_column, b_row, b_token, b_column, n_tiles, n_parts, TILE: tl.constexpr
):
    """Add up one pair of token tiles (s, r <= s) of one row and part; a pair off the diagonal stands for two."""
    row, part, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    s, r = pair // n_tiles, pair % n_tiles
    if r <= s:
        t, u = s * TILE + tl.arange(0, TILE), r * TILE + tl.arange(0, TILE)
        gram_a = _gram(a + row.to(tl.int64) * a_row, t, u, tokens, p, a_token, a_column, TILE)
        gram_b = _gram(b + row.to(tl.int64) * b_row + part * q * b_column, t, u, tokens, q, b_token, b_column, TILE)
        twice = tl.where(r < s, 2.0, 1.0)
        total = tl.sum((gram_a * gram_b).to(tl.float64)) * twice
        tl.store(out + (row * n_parts + part) * n_tiles * n_tiles + pair, total)


def ghost_traces(a: Tensor, b: Tensor, n_parts: int = 1) -> Tensor:
    """Return || sum_t b_t a_t^T ||_F^2 of each row and each of n_parts equal slices of b, (B, n_parts) float64."""
    a, b = _readable(a), _readable(b)
    rows, tokens, p = a.shape
    n_tiles = triton.cdiv(tokens, TILE)
    out = torch.zeros(rows, n_parts, n_tiles**2, dtype=torch.float64, device=a.device)
    _ghost[(rows, n_parts, n_tiles**2)](
        a, b, out, tokens, p, b.shape[2] // n_parts, *a.stride(), *b.stride(), n_tiles, n_parts, TILE=TILE
    )
    return out.sum(2)


@triton.jit
def _squares(
    b,
    a,
    sums,
    traces,
    rows,
    tokens,
    q,
    p,
    b_row,
    b_token,
    b_column,
    a_row,
    a_token,
    a_column,
    n_tiles,
    TILE: tl.constexpr,
):
    """Compute one tile of the weight's gradient, sum_t b_t a_t^T, for each row in turn; square it and add it up."""
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)
    squares = tl.zeros((TILE, TILE), dtype=tl.float32)
    for row in range(rows):
        gradient = tl.zeros((TILE, TILE), dtype=tl.float32)
        for start in range(0, tokens, TILE):
            t = start + tl.arange(0, TILE)
            left = _tile(b, t, tokens, i, q, b_token, b_column)
            right = _tile(a, t, tokens, j, p, a_token, a_column)
            gradient += tl.dot(tl.trans(left), right, input_precision="ieee")
        square = gradient * gradient
        squares += square
        tl.store(
            traces + row * n_tiles + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1),
            tl.sum(square.to(tl.float64)),
        )
        a, b = a + a_row, b + b_row
    inside = (i[:, None] < q) & (j[None, :] < p)
    at = sums + i[:, None].to(tl.int64) * p + j[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + squares, mask=inside)


def square_sums(b: Tensor, a: Tensor, sums: Tensor) -> Tensor:
    """Square the entries of each row's sum_t b_t a_t^T and add them up.

    Args:
        b: Output gradients, (B, T, q).
        a: Inputs, (B, T, p).
        sums: The squared entries of all rows are added to it, (q, p), float32, contiguous.

    Returns:
        Traces (B,), float64: the sum of the squared entries of each row.
    """
    a, b = _readable(a), _readable(b)
    rows, tokens, q = b.shape
    p = a.shape[2]
    grid = (triton.cdiv(q, TILE), triton.cdiv(p, TILE))
    traces = torch.empty(rows, grid[0] * grid[1], dtype=torch.float64, device=b.device)
    _squares[grid](b, a, sums, traces, rows, tokens, q, p, *b.stride(), *a.stride(), grid[0] * grid[1], TILE=TILE)
    return traces.sum(1)
