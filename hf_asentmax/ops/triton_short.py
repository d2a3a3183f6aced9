"""Entmax attention of short sequences, forward: a tile of queries against all keys at once.

Where all scores of a query fit into a program there is nothing to leave out: it solves for the threshold by Newton's
method on what it holds, and writes the output, in place of three passes. What the backward needs is as the forward of
long sequences leaves it, but that every visible tile of keys is marked. The same inputs give the same bits. The law and
what is held of it: ``triton_common.py``.

Source: arXiv 2506.16640.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import (
    NOTHING,
    below,
    excess,
    key_tile_ranges,
    load_bias,
    load_exponent,
    load_intervals,
    load_row_scale,
    load_tile,
    newton_step,
    normalized,
    store_tile,
    weights,
)
from .triton_launch import SIZES, Config, Problem, launch, padded

# Keys, by the constant ALPHA: what was measured to be faster than three passes. More would spill registers.
LONGEST = {0: 128, 1: 256, 2: 128, 3: 128}
WIDEST = 1 << 14  # keys times head dim: 96 KiB of shared memory
RESIDUAL = tl.constexpr(1e-2)  # how far from 1 a mass may be before the last step, which squares it
_ATTEND = (Config(4, 1),)


@triton.jit(do_not_specialize=SIZES)
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, mean_ptr, first_ptr, last_ptr, scale_ptr, slopes_ptr, alpha_ptr, state_ptr, tiles_ptr,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, interval_stride, alpha_stride,
    T, N, H, GROUP, scaling, alpha_value,
    ALPHA: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr, EXACT: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    SLOPES: tl.constexpr = slopes_ptr is not None
    tile_row, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    rows = tile_row * TILE + tl.arange(0, TILE)
    q = load_tile(q_ptr + b * sqb + h * sqh, tile_row * TILE, sqt, T, DIM, BLOCK_DIM, TILE)
    k = load_tile(k_ptr + b * skb + h // GROUP * skh, 0, skt, N, DIM, BLOCK_DIM, KEYS)
    v = load_tile(v_ptr + b * svb + h // GROUP * svh, 0, svt, N, DIM_V, BLOCK_DIM_V, KEYS)
    first_ptr += b * interval_stride
    last_ptr += b * interval_stride
    first, last, visible = load_intervals(first_ptr, last_ptr, rows, T)
    e = load_exponent(alpha_ptr, h, alpha_stride, alpha_value, ALPHA)
    ce = load_row_scale(scale_ptr, bh * T, rows, T, scaling, TILE) * e
    slope, origin = load_bias(slopes_ptr, last_ptr, h, e, tile_row, TILE, SLOPES)
    ones = tl.full((TILE,), 1.0, tl.float32)
    z = excess(q, k, 0, ce, ones, 0.0 * ones, slope, origin, True, first_ptr, last_ptr, rows, T, KEYS, SLOPES)

    threshold = tl.max(z, 1) - below(ALPHA)
    residual = RESIDUAL + 1.0
    passes = 0
    while (residual > RESIDUAL) & (passes < 32):
        p, g = weights(z - threshold[:, None], e, ALPHA, EXACT)
        mass = tl.sum(p, 1)
        threshold += tl.where(visible, newton_step(mass, tl.sum(g, 1), e, ALPHA), 0.0)
        residual = tl.max(tl.where(visible, tl.abs(mass - 1.0), 0.0), 0)
        passes += 1

    p, g = weights(z - tl.where(visible, threshold, NOTHING)[:, None], e, ALPHA, EXACT)
    mass = tl.sum(p, 1)
    mass = tl.where(visible, mass, 1.0)
    out = tl.dot(p.to(v.dtype), v, input_precision="ieee") / mass[:, None]
    store_tile(out_ptr + bh * T * DIM_V, out, tile_row * TILE, DIM_V, T, DIM_V, BLOCK_DIM_V, TILE)
    if mean_ptr is not None:
        if ALPHA != 3:
            slopes = tl.where(visible, tl.sum(g, 1), 1.0)
            out = tl.dot(g.to(v.dtype), v, input_precision="ieee") / slopes[:, None]
        store_tile(mean_ptr + bh * T * DIM_V, out, tile_row * TILE, DIM_V, T, DIM_V, BLOCK_DIM_V, TILE)
    threshold, norm = normalized(threshold, mass, e, ALPHA)
    tl.store(state_ptr + (bh * T + rows) * 2, tl.where(visible, threshold, NOTHING), mask=rows < T)
    tl.store(state_ptr + (bh * T + rows) * 2 + 1, tl.where(visible, norm, 0.0), mask=rows < T)
    begin, inner_begin, inner_end, end = key_tile_ranges(first, last, visible, TILE)
    begin = tl.minimum(begin, end)  # no key is seen
    words = tiles_ptr + (bh * tl.num_programs(0) + tile_row) * 3
    tl.store(words, (1 << end) - (1 << begin))
    tl.store(words + 1, inner_begin)
    tl.store(words + 2, inner_end)


def serves_short(problem: Problem) -> bool:
    """Whether a program holds all keys, in 16 bits: products of float32 are unrolled. Not for one query: a cache that
    grows by a token would compile anew."""
    x = problem
    few = x.query.shape[2] > 1 and 0 < x.key.shape[2] <= LONGEST[x.constants()["ALPHA"]]
    return few and _keys(x) * padded(x.widest) <= WIDEST and x.query.dtype != torch.float32


def attend_short(problem: Problem, out: Tensor, mean: Tensor | None, state: Tensor, tiles: Tensor) -> None:
    """Write what ``kernel_forward`` returns, of a problem that :func:`serves_short`."""
    x = problem
    H, T = x.query.shape[1:3]
    constants = x.constants(value=True) | {"KEYS": _keys(x)}
    del constants["LANES"]
    launch(
        _attend_kernel,
        (x.n_row_tiles, x.query.shape[0] * H),
        _ATTEND,
        constants,
        (mean is not None, x.variant),
        x.query, x.key, x.value, out, mean, x.first, x.last, x.query_scale, x.slopes, x.alpha, state, tiles,
        *x.query.stride()[:3], *x.key.stride()[:3], *x.value.stride()[:3], x.interval_stride, x.alpha_stride,
        T, x.key.shape[2], H, x.group, x.scaling, x.alpha_value,
    )  # fmt: skip


def _keys(problem: Problem) -> int:
    return max(problem.tile, padded(problem.key.shape[2]))
