"""Entmax attention of short sequences: a tile of queries against all keys at once.

Where all scores of a query fit into a program there is nothing to leave out. Forward, it solves for the threshold by
Newton's method on what it holds, and writes the output, in place of three passes. Backward, a program takes all queries
of a key/value head, tile by tile, and keeps the gradients of its keys and values, in place of a pass for those of the
queries and one for the keys'. What the one leaves for the other is as for long sequences, but that every visible tile
of keys is marked. The same inputs give the same bits. The laws: ``triton_common.py`` and ``triton_backward.py``.

Source: arXiv 2506.16640.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import (
    HIDDEN,
    NOTHING,
    alpha_slopes,
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
from .triton_launch import SIZES, Config, Problem, kind, launch, padded

# Keys, by the constant ALPHA: what was measured to be faster than three passes. More would spill registers.
LONGEST = {0: 128, 1: 256, 2: 128, 3: 128, 4: 256}
WIDEST = 1 << 14  # keys times head dim: 96 KiB of shared memory
RESIDUAL = tl.constexpr(1e-2)  # how far from 1 a mass may be before the last step, which squares it
_ATTEND = (Config(4, 1),)
_ATTEND_NARROW = (Config(4, 1, {}, 128),)  # 128 keys, head dim to 32: another program at once is worth some spills
# Backward: what a program can keep of the keys' gradients and be faster than two kernels.
LONGEST_BACKWARD = 128
WIDEST_BACKWARD = 1 << 12
_GRADIENTS = (Config(4, 1, {"QUERIES": 32}, 168),)


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


@triton.jit(do_not_specialize=SIZES)
def _gradients_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, mean_ptr, first_ptr, last_ptr, scale_ptr, slopes_ptr, alpha_ptr, state_ptr,
    dq_ptr, dk_ptr, dv_ptr, dr_ptr, dalpha_ptr,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sgb, sgh, sgt, sdb, sdh, sdt, sdkb, sdkh, sdkt, sdvb, sdvh, sdvt,
    interval_stride, alpha_stride,
    T, N, H, GROUP, scaling, alpha_value,
    ALPHA: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr, EXACT: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    SLOPES: tl.constexpr = slopes_ptr is not None
    heads_kv = H // GROUP
    bh_kv = tl.program_id(1).to(tl.int64)
    b, h_kv = bh_kv // heads_kv, bh_kv % heads_kv
    k = load_tile(k_ptr + b * skb + h_kv * skh, 0, skt, N, DIM, BLOCK_DIM, KEYS)
    v = load_tile(v_ptr + b * svb + h_kv * svh, 0, svt, N, DIM_V, BLOCK_DIM_V, KEYS)
    keys = tl.arange(0, KEYS)
    first_ptr += b * interval_stride
    last_ptr += b * interval_stride
    dk = tl.zeros((KEYS, BLOCK_DIM), tl.float32)
    dv = tl.zeros((KEYS, BLOCK_DIM_V), tl.float32)
    for h in range(h_kv * GROUP, (h_kv + 1) * GROUP):
        offset = (b * H + h) * T
        e = load_exponent(alpha_ptr, h, alpha_stride, alpha_value, ALPHA)
        for start in range(0, T, QUERIES):
            rows = start + tl.arange(0, QUERIES)
            inside = rows < T
            q = load_tile(q_ptr + b * sqb + h * sqh, start, sqt, T, DIM, BLOCK_DIM, QUERIES)
            grad = load_tile(grad_ptr + b * sgb + h * sgh, start, sgt, T, DIM_V, BLOCK_DIM_V, QUERIES)
            mean = load_tile(mean_ptr + offset * DIM_V, start, DIM_V, T, DIM_V, BLOCK_DIM_V, QUERIES)
            threshold = tl.load(state_ptr + (offset + rows) * 2, mask=inside, other=1.0)
            norm = tl.load(state_ptr + (offset + rows) * 2 + 1, mask=inside, other=0.0)
            c = load_row_scale(scale_ptr, offset, rows, T, scaling, QUERIES)
            first = tl.load(first_ptr + rows, mask=inside, other=0)
            count = tl.maximum(tl.load(last_ptr + rows, mask=inside, other=0) - first, 0)
            slope, origin = load_bias(slopes_ptr, last_ptr, h, e, start // TILE, TILE, SLOPES)
            # Keys by queries: so the weights are in the layout in which the next products take them.
            y = tl.dot(k, tl.trans(q), input_precision="ieee")
            if SLOPES:
                y = (y * (c * e)[None, :] + (slope * (keys - origin).to(tl.float32))[:, None]) * norm[None, :]
            else:
                y = y * (c * e * norm)[None, :]
            seen = (keys[:, None] - first[None, :]).to(tl.uint32) < count.to(tl.uint32)[None, :]
            y = tl.where(seen, y - threshold[None, :], HIDDEN)
            p, g = weights(y, e, ALPHA, EXACT)
            dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
            delta = tl.sum(grad.to(tl.float32) * mean.to(tl.float32), 1)
            dp = tl.dot(v, tl.trans(grad), input_precision="ieee") - delta[None, :]
            if dalpha_ptr is not None:
                dalpha = tl.sum(alpha_slopes(y, p, g, e, EXACT) * dp, 0)
                tl.store(dalpha_ptr + offset + rows, dalpha, mask=inside)
            ds = g * dp
            dk = tl.dot((ds * c[None, :]).to(q.dtype), q, dk, input_precision="ieee")
            dq = tl.dot(tl.trans(ds.to(k.dtype)), k, input_precision="ieee")
            if dr_ptr is not None:
                tl.store(dr_ptr + offset + rows, scaling * tl.sum(q.to(tl.float32) * dq, 1), mask=inside)
            store_tile(dq_ptr + b * sdb + h * sdh, dq * c[:, None], start, sdt, T, DIM, BLOCK_DIM, QUERIES)
    store_tile(dk_ptr + b * sdkb + h_kv * sdkh, dk, 0, sdkt, N, DIM, BLOCK_DIM, KEYS)
    store_tile(dv_ptr + b * sdvb + h_kv * sdvh, dv, 0, sdvt, N, DIM_V, BLOCK_DIM_V, KEYS)


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
    keys = _keys(x)
    constants = x.constants(value=True) | {"KEYS": keys}
    del constants["LANES"]
    launch(
        _attend_kernel,
        (x.n_row_tiles, x.query.shape[0] * H),
        _ATTEND_NARROW if keys == 128 and padded(x.widest) <= 32 else _ATTEND,
        constants,
        (mean is not None, x.variant),
        x.query, x.key, x.value, out, mean, x.first, x.last, x.query_scale, x.slopes, x.alpha, state, tiles,
        *x.query.stride()[:3], *x.key.stride()[:3], *x.value.stride()[:3], x.interval_stride, x.alpha_stride,
        T, x.key.shape[2], H, x.group, x.scaling, x.alpha_value,
    )  # fmt: skip


def serves_short_backward(problem: Problem) -> bool:
    """Whether a program holds the gradients of all keys too."""
    keys = _keys(problem)
    return serves_short(problem) and keys <= LONGEST_BACKWARD and keys * padded(problem.widest) <= WIDEST_BACKWARD


def gradients_short(
    problem: Problem, grad: Tensor, state: Tensor, mean: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, dr: Tensor | None, dalpha: Tensor | None,
) -> None:  # fmt: skip
    """Write what ``kernel_backward`` returns, of a problem that :func:`serves_short_backward`; dalpha by query."""
    x = problem
    B, H, T = x.query.shape[:3]
    constants = x.constants(value=True) | {"KEYS": _keys(x)}
    del constants["LANES"]
    strides = [s for t in (x.query, x.key, x.value, grad, dq, dk, dv) for s in t.stride()[:3]]
    launch(
        _gradients_kernel,
        (1, B * H // x.group),
        _GRADIENTS,
        constants,
        (kind(grad, dq, dk, dv, dalpha), x.variant),
        x.query, x.key, x.value, grad, mean, x.first, x.last, x.query_scale, x.slopes, x.alpha, state,
        dq, dk, dv, dr, dalpha,
        *strides, x.interval_stride, x.alpha_stride,
        T, x.key.shape[2], H, x.group, x.scaling, x.alpha_value,
    )  # fmt: skip


def _keys(problem: Problem) -> int:
    return max(problem.tile, padded(problem.key.shape[2]))
