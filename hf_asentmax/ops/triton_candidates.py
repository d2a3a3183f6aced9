"""The dense pass of entmax attention: it finds the tiles that can have support, and a bound of each query's threshold.

It goes once over all of Q K^T. Beside the product it keeps, for every query, the largest score of each of 32 classes of
keys. These are scores of distinct keys, so that the threshold which solves for them alone is a lower bound of the
query's true one, and since a support is small and falls into different classes mostly, a close one. A key tile whose
scores all lie at or below the bound so far has no support: exactly, not approximately. The others are marked.

A head with a slope ends where no key can score above the bound any more: in O(N) for the whole head.

Source: the bound ``tau >= max - 1`` that starts it: arXiv 1905.05702.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import (
    HIDDEN,
    NOTHING,
    any_bit,
    below,
    depth,
    either,
    hide,
    key_tile_ranges,
    load_bias,
    load_exponent,
    load_intervals,
    load_row_scale,
    load_tile,
    newton_step,
    weights,
)
from .triton_launch import SIZES, Config, Problem, kind, launch

# Wide blocks of queries load each key tile least often; with a slope there are few tiles, and latency counts instead.
# A class is a part of what one thread holds (see ``partial_sum``): of a step in float32, one key.
_CANDIDATES = (
    Config(8, 2, {"ROWS": 2, "TILES": 2, "CLASSES": 32}, 128),
    Config(4, 1, {"ROWS": 1, "TILES": 1, "CLASSES": 16}),
)
_CANDIDATES_BIASED = (Config(4, 1, {"ROWS": 1, "TILES": 1, "CLASSES": 16}, 128), _CANDIDATES[1])
_CANDIDATES_FLOAT32 = (
    Config(8, 2, {"ROWS": 2, "TILES": 2, "CLASSES": 64}, 128),
    Config(4, 1, {"ROWS": 1, "TILES": 1, "CLASSES": 32}),
)
_NORMS = (Config(4, 1),)


@triton.jit(do_not_specialize=SIZES)
def _norms_kernel(k_ptr, norms_ptr, skb, skh, skt, N, HEADS_KV, TILE: tl.constexpr, DIM: tl.constexpr,
                  BLOCK_DIM: tl.constexpr):  # fmt: skip
    """The largest norm of the keys of each tile."""
    j, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    base = k_ptr + bh // HEADS_KV * skb + bh % HEADS_KV * skh
    k = load_tile(base, j * TILE, skt, N, DIM, BLOCK_DIM, TILE).to(tl.float32)
    tl.store(norms_ptr + bh * tl.num_programs(0) + j, tl.sqrt(tl.max(tl.sum(k * k, 1), 0)))


@triton.jit
def _raise_bound(best, kz, threshold, e, steps, ALPHA: tl.constexpr, EXACT: tl.constexpr):
    """Newton steps from below toward the threshold of the scores ``best`` alone, a lower bound of the row's; and the
    sum of g before the last of them."""
    slope = tl.zeros_like(threshold)
    for _ in range(steps):
        # No score exceeds the threshold by more than `below`, but where a row has seen no key yet both sides are about
        # HIDDEN, and the difference, rounded once, is anything up to 1e23.
        y = best * kz[:, None, None] - threshold[:, None, None]
        y = tl.minimum(y, below(ALPHA), propagate_nan=tl.PropagateNan.ALL)
        p, g = weights(y, e, ALPHA, EXACT)
        slope = tl.sum(tl.sum(g, 2), 1)
        step = newton_step(tl.sum(tl.sum(p, 2), 1), slope, e, ALPHA)
        threshold += tl.maximum(step, 0.0)
    return threshold, slope


@triton.jit
def _class_maxima(x, ROWS: tl.constexpr, TILES: tl.constexpr, CLASSES: tl.constexpr, LANES: tl.constexpr):
    """(ROWS, TILES * tile) -> (ROWS, TILES, CLASSES // TILES): a class is j mod LANES of a part of a tile."""
    PARTS: tl.constexpr = CLASSES // TILES // LANES
    x = tl.reshape(x, (ROWS, TILES, PARTS, x.shape[1] // (TILES * PARTS * LANES), LANES))
    return tl.reshape(tl.max(x, 3), (ROWS, TILES, PARTS * LANES))


@triton.jit(do_not_specialize=SIZES)
def _candidates_kernel(
    q_ptr, k_ptr, first_ptr, last_ptr, scale_ptr, slopes_ptr, norms_ptr, alpha_ptr, state_ptr, tiles_ptr,
    sqb, sqh, sqt, skb, skh, skt, interval_stride, alpha_stride,
    T, N, H, GROUP, n_row_tiles, n_key_tiles, n_words, scaling, alpha_value,
    ALPHA: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, LANES: tl.constexpr,
    EXACT: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = ROWS * TILE
    STEP: tl.constexpr = TILES * TILE
    STEPS: tl.constexpr = 32 // TILES  # of a word
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    has_slope = False
    if slopes_ptr is not None:
        has_slope = tl.load(slopes_ptr + h) != 0.0
    if has_slope != BIASED:
        return
    rows = block * BLOCK + tl.arange(0, BLOCK)
    first_ptr += b * interval_stride
    last_ptr += b * interval_stride
    first, last, visible = load_intervals(first_ptr, last_ptr, rows, T)
    begin, inner_begin, inner_end, end = key_tile_ranges(first, last, visible, STEP)

    e = load_exponent(alpha_ptr, h, alpha_stride, alpha_value, ALPHA)
    c = load_row_scale(scale_ptr, bh * T, rows, T, scaling, BLOCK)
    q = load_tile(q_ptr + b * sqb + h * sqh, block * BLOCK, sqt, T, DIM, BLOCK_DIM, BLOCK)
    if scale_ptr is not None:  # so that the largest product is the largest score
        q = (q.to(tl.float32) * tl.where(c < 0.0, -1.0, 1.0)[:, None]).to(q.dtype)
    ce = tl.abs(c) * e
    kz = tl.maximum(ce, 1.0e-20)  # a scale of 0 must not lift what is hidden
    slope, origin = load_bias(slopes_ptr, last_ptr, h, e, block, BLOCK, BIASED)
    reach = 0.0
    if BIASED:
        kz = tl.full((BLOCK,), 1.0, tl.float32)
        qf = q.to(tl.float32)
        reach = 1.001 * tl.max(tl.where(visible, ce * tl.sqrt(tl.sum(qf * qf, 1)), 0.0), 0)
    k_base = k_ptr + b * skb + h // GROUP * skh
    tile_rows = block * ROWS + tl.arange(0, ROWS)
    words = tiles_ptr + (bh * n_row_tiles + tile_rows) * (n_words + 2)
    norms = norms_ptr + (bh // H * (H // GROUP) + h // GROUP) * n_key_tiles if BIASED else None

    best = tl.full((BLOCK, TILES, CLASSES // TILES), HIDDEN, tl.float32)
    threshold = tl.where(visible, tl.full((BLOCK,), HIDDEN, tl.float32), NOTHING)
    # Away from the diagonal, where local attention has its largest scores: the last step alone, for a bound to start
    # from, then a word of 32 tiles at a time.
    stop = end
    while stop > begin:
        word = (stop - 1) // STEPS
        start = tl.maximum(begin, word * STEPS)
        if stop == end:
            start = tl.maximum(start, end - 1)
        next_stop = start
        if BIASED:
            # No key of step j or before it scores above reach * (largest norm up to j) + the bias at the step's end.
            steps = word * STEPS + tl.arange(0, STEPS)
            tiles = (steps + 1) * TILES - 1
            norm = tl.load(norms + tl.minimum(tiles, n_key_tiles - 1))
            bound = reach * norm + slope * (steps * STEP + STEP - 1 - origin).to(tl.float32)
            floor = tl.min(tl.where(visible, threshold, NOTHING), 0) - depth(ALPHA)
            out_of_reach = word * STEPS + tl.sum((bound <= floor).to(tl.int32), 0)
            if (out_of_reach > start) & (slope >= 0.0):  # the bounds rise with the key
                start = out_of_reach
                next_stop = begin
        bits = tl.zeros((BLOCK, TILES), tl.int32)
        for i in range(0, stop - start):
            j = stop - 1 - i
            k = load_tile(k_base, j * STEP, skt, N, DIM, BLOCK_DIM, STEP)
            x = tl.dot(q, tl.trans(k), input_precision="ieee")
            if BIASED:
                distance = (j * STEP + tl.arange(0, STEP) - origin).to(tl.float32)
                x = x * ce[:, None] + (slope * distance)[None, :]
            if (j < inner_begin) | (j >= inner_end):
                x = hide(x, HIDDEN, j, first_ptr, last_ptr, rows, T, STEP)
            maxima = _class_maxima(x, BLOCK, TILES, CLASSES, LANES)
            best = tl.maximum(best, maxima)
            top = tl.max(maxima, 2) * kz[:, None]
            threshold = tl.maximum(threshold, tl.max(top, 1) - below(ALPHA))
            place = (j % STEPS) * TILES + tl.arange(0, TILES)
            bits |= 1 - (top <= threshold[:, None] - depth(ALPHA)).to(tl.int32) << place[None, :]  # NaN is to be seen
        threshold, _ = _raise_bound(best, kz, threshold, e, 1, ALPHA, EXACT)
        tl.atomic_or(words + word, any_bit(tl.reduce(bits, 1, either), ROWS, TILE), mask=tile_rows < n_row_tiles)
        stop = next_stop

    threshold, slope_sum = _raise_bound(best, kz, threshold, e, 2, ALPHA, EXACT)
    if BIASED:  # from this block's origin of the bias to each query tile's own
        own = tl.load(last_ptr + rows // TILE * TILE, mask=rows < T, other=0) - 1
        threshold += slope * (origin - own).to(tl.float32)
    state = state_ptr + (bh * T + rows) * 2
    tl.store(state, tl.where(visible, threshold, NOTHING), mask=rows < T)
    tl.store(state + 1, slope_sum, mask=rows < T)


def mark_candidates(problem: Problem, state: Tensor, tiles: Tensor) -> None:
    """Write each query's bound, and about the sum of g there, to ``state``; set the bits of the tiles that can have
    support in ``tiles``, which is zero."""
    x = problem
    B, H, T = x.query.shape[:3]
    norms = _key_norms(x) if x.slopes is not None else None
    query = -x.query if x.query_scale is None and x.scaling < 0 else x.query  # the largest product: the largest score
    for biased in (False,) if x.slopes is None else (False, True):  # a launch each: they differ in all
        configs = _CANDIDATES_BIASED if biased else _CANDIDATES
        launch(
            _candidates_kernel,
            (x.n_row_tiles, B * H),
            _CANDIDATES_FLOAT32 if x.query.dtype == torch.float32 else configs,
            x.constants() | {"BIASED": biased},
            (kind(query), x.variant),
            query, x.key, x.first, x.last, x.query_scale, x.slopes, norms, x.alpha, state, tiles,
            *query.stride()[:3], *x.key.stride()[:3], x.interval_stride, x.alpha_stride,
            T, x.key.shape[2], H, x.group, x.n_row_tiles, x.n_key_tiles, x.n_words, x.scaling, x.alpha_value,
        )  # fmt: skip


def _key_norms(x: Problem) -> Tensor:
    """(B, H_kv, key tiles): the largest norm of the keys up to the end of each tile."""
    B, heads_kv = x.key.shape[:2]
    norms = torch.empty(B, heads_kv, x.n_key_tiles, dtype=torch.float32, device=x.key.device)
    constants = {k: v for k, v in x.constants().items() if k in ("TILE", "DIM", "BLOCK_DIM")}
    arguments = (x.key, norms, *x.key.stride()[:3], x.key.shape[2], heads_kv)
    launch(_norms_kernel, (x.n_key_tiles, B * heads_kv), _NORMS, constants, x.variant, *arguments)
    return norms.cummax(-1).values
