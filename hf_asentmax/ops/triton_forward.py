"""Entmax attention, forward: one dense pass for the candidates, then only candidates.

1. ``_candidates_kernel`` goes once over all of Q K^T. Beside the product it keeps, for every query, the largest score
   of each of 32 classes of keys. These are scores of distinct keys, so that the threshold which solves for them alone
   is a lower bound of the query's true one, and since a support is small and falls into different classes mostly, a
   close one. A key tile whose scores all lie at or below the bound so far has no support: exactly, not approximately.
   The others are marked.
2. ``_attend_kernel`` visits the marked tiles: one pass at the bound gives mass, slope and size, and unmarks tiles that
   lie below it; one step from there is the threshold (further passes while a row's mass is far from 1). The last pass
   gives the output and ``mean_i = sum_j g_ij v_j / sum_j g_ij``, which the backward needs, and mends what the step
   left.

The law and what is held of it: ``triton_common.py``. Memory beside the output: a second tensor of its size, 8 bytes a
query, one bit a pair of tiles, and lists of tiles of at most 64 MiB. No atomics on floating point numbers: the same
inputs give the same bits.

Source: arXiv 2506.16640; the bound ``tau >= max - 1`` that starts the first pass: arXiv 1905.05702.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import (
    HIDDEN,
    NOTHING,
    Config,
    Problem,
    any_bit,
    either,
    excess,
    hide,
    key_tile_ranges,
    launch,
    list_tiles,
    load_exponent,
    load_intervals,
    load_row_scale,
    load_tile,
    newton_step,
    store_tile,
    weights,
)

# The dense pass is bound by the matrix units: wide query blocks load each key tile least often.
_CANDIDATES = (
    Config(8, 2, {"ROWS": 2, "TILES": 2, "CLASSES": 32}, 128),
    Config(4, 1, {"ROWS": 1, "TILES": 1, "CLASSES": 16}),
)
_ATTEND = (Config(4, 3, {}, 168), Config(4, 3), Config(4, 2), Config(4, 1))  # the first for narrow heads
_NORMS = (Config(4, 1),)


MENDABLE = tl.constexpr(9e-4)  # how far a threshold may be off, in units of z, to be mended by a step of first order


@triton.jit
def _norms_kernel(k_ptr, norms_ptr, skb, skh, skt, N, HEADS_KV, TILE: tl.constexpr, DIM: tl.constexpr,
                  BLOCK_DIM: tl.constexpr):  # fmt: skip
    """The largest norm of the keys of each tile."""
    j, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    base = k_ptr + bh // HEADS_KV * skb + bh % HEADS_KV * skh
    k = load_tile(base, j * TILE, skt, N, DIM, BLOCK_DIM, TILE).to(tl.float32)
    tl.store(norms_ptr + bh * tl.num_programs(0) + j, tl.sqrt(tl.max(tl.sum(k * k, 1), 0)))


@triton.jit
def _raise_bound(best, kz, threshold, e, steps, ALPHA: tl.constexpr, EXACT: tl.constexpr):
    """Newton steps from below toward the threshold of the scores ``best`` alone, a lower bound of the row's."""
    for _ in range(steps):
        p, g = weights(best * kz[:, None, None] - threshold[:, None, None], e, ALPHA, EXACT)
        step = newton_step(tl.sum(tl.sum(p, 2), 1), tl.sum(tl.sum(g, 2), 1), e, ALPHA)
        threshold += tl.maximum(step, 0.0)
    return threshold


@triton.jit
def _class_maxima(x, ROWS: tl.constexpr, TILES: tl.constexpr, CLASSES: tl.constexpr):
    """(ROWS, TILES * tile) -> (ROWS, TILES, CLASSES // TILES): key j of a tile is of class j mod 8 and of its part."""
    PARTS: tl.constexpr = CLASSES // TILES // 8
    x = tl.reshape(x, (ROWS, TILES, PARTS, x.shape[1] // (TILES * PARTS * 8), 8))
    return tl.reshape(tl.max(x, 3), (ROWS, TILES, PARTS * 8))


@triton.jit
def _candidates_kernel(
    q_ptr, k_ptr, first_ptr, last_ptr, scale_ptr, slopes_ptr, norms_ptr, alpha_ptr, state_ptr, tiles_ptr,
    sqb, sqh, sqt, skb, skh, skt, interval_stride, alpha_stride,
    T, N, H, GROUP, n_row_tiles, n_key_tiles, n_words, scaling, alpha_value,
    ALPHA: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, EXACT: tl.constexpr,
    BIASED: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    SHIFT: tl.constexpr = 1.0 if ALPHA == 0 else 0.0  # threshold - tau
    BLOCK: tl.constexpr = ROWS * TILE
    STEP: tl.constexpr = TILES * TILE
    STEPS: tl.constexpr = 32 // TILES  # of a word
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    slope = 0.0
    if slopes_ptr is not None:  # heads with a slope and heads without one have a launch each
        slope = tl.load(slopes_ptr + h)
        if (slope != 0.0) != BIASED:
            return
    rows = block * BLOCK + tl.arange(0, BLOCK)
    first, last, visible = load_intervals(first_ptr, last_ptr, b * interval_stride, rows, T)
    begin, inner_begin, inner_end, end = key_tile_ranges(first, last, visible, STEP)

    e = load_exponent(alpha_ptr, h, alpha_stride, alpha_value, ALPHA)
    c = load_row_scale(scale_ptr, bh * T, rows, T, scaling, BLOCK)
    q = load_tile(q_ptr + b * sqb + h * sqh, block * BLOCK, sqt, T, DIM, BLOCK_DIM, BLOCK)
    if scale_ptr is not None:  # so that the largest product is the largest score
        q = (q.to(tl.float32) * tl.where(c < 0.0, -1.0, 1.0)[:, None]).to(q.dtype)
    ce = tl.abs(c) * e
    kz = tl.maximum(ce, 1.0e-20)  # a scale of 0 must not lift what is hidden
    origin = 0
    reach = 0.0
    if BIASED:
        kz = tl.full((BLOCK,), 1.0, tl.float32)
        slope = e * slope
        origin = tl.load(last_ptr + b * interval_stride + block * BLOCK) - 1
        qf = q.to(tl.float32)
        reach = 1.001 * tl.max(tl.where(visible, ce * tl.sqrt(tl.sum(qf * qf, 1)), 0.0), 0)
    k_base = k_ptr + b * skb + h // GROUP * skh
    tile_rows = block * ROWS + tl.arange(0, ROWS)
    words = tiles_ptr + (bh * n_row_tiles + tile_rows) * n_words
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
            floor = tl.min(tl.where(visible, threshold, NOTHING), 0) - SHIFT
            out_of_reach = word * STEPS + tl.sum((bound <= floor).to(tl.int32), 0)
            if out_of_reach > start:
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
                offset = b * interval_stride
                x = hide(x, HIDDEN, j, first_ptr + offset, last_ptr + offset, rows, T, STEP)
            maxima = _class_maxima(x, BLOCK, TILES, CLASSES)
            best = tl.maximum(best, maxima)
            top = tl.max(maxima, 2) * kz[:, None]
            threshold = tl.maximum(threshold, tl.max(top, 1) - 1.0 + SHIFT)
            place = (j % STEPS) * TILES + tl.arange(0, TILES)
            bits |= (top > threshold[:, None] - SHIFT).to(tl.int32) << place[None, :]
        threshold = _raise_bound(best, kz, threshold, e, 1, ALPHA, EXACT)
        tl.atomic_or(words + word, any_bit(tl.reduce(bits, 1, either), ROWS, TILE), mask=tile_rows < n_row_tiles)
        stop = next_stop

    threshold = _raise_bound(best, kz, threshold, e, 4, ALPHA, EXACT)
    if BIASED:  # from this block's origin of the bias to each query tile's own
        own = tl.load(last_ptr + b * interval_stride + rows // TILE * TILE, mask=rows < T, other=0) - 1
        threshold += slope * (origin - own).to(tl.float32)
    tl.store(state_ptr + (bh * T + rows) * 2, tl.where(visible, threshold, NOTHING), mask=rows < T)


@triton.jit
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, mean_ptr, first_ptr, last_ptr, scale_ptr, slopes_ptr, alpha_ptr, state_ptr, tiles_ptr,
    list_ptr,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, interval_stride, alpha_stride,
    T, N, H, GROUP, n_key_tiles, n_words, scaling, alpha_value, tolerance, first_head,
    ALPHA: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    SLOPES: tl.constexpr = slopes_ptr is not None
    n_row_tiles = tl.num_programs(0)
    tile_row = n_row_tiles - 1 - tl.program_id(0)
    bh = first_head + tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    rows = tile_row * TILE + tl.arange(0, TILE)
    first, last, visible = load_intervals(first_ptr, last_ptr, b * interval_stride, rows, T)
    begin, inner_begin, inner_end, end = key_tile_ranges(first, last, visible, TILE)

    words = tiles_ptr + (bh * n_row_tiles + tile_row) * n_words
    tile_list = list_ptr + (tl.program_id(1).to(tl.int64) * n_row_tiles + tile_row) * n_key_tiles
    count = list_tiles(words, n_words, tile_list, 128)
    tl.debug_barrier()
    for start in range(0, n_words, 32):  # marked anew below
        place = start + tl.arange(0, 32)
        tl.store(words + place, tl.zeros((32,), tl.int32), mask=place < n_words)
    tl.debug_barrier()

    e = load_exponent(alpha_ptr, h, alpha_stride, alpha_value, ALPHA)
    ce = load_row_scale(scale_ptr, bh * T, rows, T, scaling, TILE) * e
    q = load_tile(q_ptr + b * sqb + h * sqh, tile_row * TILE, sqt, T, DIM, BLOCK_DIM, TILE)
    kz = ce
    slope = 0.0
    origin = 0
    slope_ptr = slopes_ptr
    if SLOPES:
        slope_ptr = slopes_ptr + h
        slope = e * tl.load(slope_ptr)
        if slope != 0.0:
            kz = tl.full((TILE,), 1.0, tl.float32)
        origin = tl.load(last_ptr + b * interval_stride + tile_row * TILE) - 1
    k_base = k_ptr + b * skb + h // GROUP * skh
    v_base = v_ptr + b * svb + h // GROUP * svh
    bound = tl.load(state_ptr + (bh * T + rows) * 2, mask=rows < T, other=NOTHING)
    threshold = bound

    first_ptr += b * interval_stride
    last_ptr += b * interval_stride

    passes = 0
    residual = tolerance + 1.0
    while (residual > tolerance) & (passes < 32):
        mass = tl.zeros((TILE,), tl.float32)
        slopes = tl.zeros((TILE,), tl.float32)
        size = tl.zeros((TILE,), tl.float32)
        kept = 0
        for base in range(0, count, 32):
            bits = tl.zeros((TILE,), tl.int32)
            for i in range(base, tl.minimum(base + 32, count)):
                j = tl.load(tile_list + i)
                k = load_tile(k_base, j * TILE, skt, N, DIM, BLOCK_DIM, TILE)
                partial = (j < inner_begin) | (j >= inner_end)
                y = excess(
                    q, k, j, kz, threshold, ce, slope_ptr, e, slope, origin, partial, first_ptr, last_ptr, rows, T,
                    TILE, SLOPES,
                )  # fmt: skip
                p, g = weights(y, e, ALPHA, EXACT)
                tile_slope = tl.sum(g, 1)
                mass += tl.sum(p, 1)
                slopes += tile_slope
                if ALPHA == 1:
                    size += tl.sum(tl.where(y > 0.0, 1.0, 0.0), 1)
                bits |= (tile_slope > 0.0).to(tl.int32) << (i - base)
            if passes == 0:  # the threshold is a lower bound in the first pass: what is below it is out for good
                places = base + tl.arange(0, 32)
                tiles = tl.load(tile_list + places, mask=places < count, other=0)
                bit = (tl.reduce(bits, 0, either) >> (places - base)) & 1
                tl.debug_barrier()
                tl.store(tile_list + kept + tl.cumsum(bit, 0) - 1, tiles, mask=bit != 0)
                tl.atomic_or(words + tiles // 32, bit << (tiles % 32), mask=bit != 0)
                tl.debug_barrier()
                kept += tl.sum(bit, 0)
        if passes == 0:
            count = kept
        step = newton_step(mass, slopes, e, ALPHA)
        if ALPHA == 1:  # Halley's step, of third order; far from the root Newton's goes further
            f = mass - 1.0
            step = tl.where(f < 1.0, 2.0 * f * slopes / tl.maximum(4.0 * slopes * slopes - f * size, 1.0e-30), step)
        residual = tl.max(tl.where(visible, tl.abs(mass - 1.0), 0.0), 0)
        threshold = tl.where(visible, tl.maximum(threshold + step, bound), threshold)
        passes += 1

    # The output at this threshold, and what it is off by: a step of first order mends a small error, and a larger one
    # (a row in some thousands) is done again.
    acc = tl.zeros((TILE, BLOCK_DIM_V), tl.float32)
    mean = tl.zeros((TILE, BLOCK_DIM_V), tl.float32)
    mass = tl.zeros((TILE,), tl.float32)
    slopes = tl.zeros((TILE,), tl.float32)
    step = tl.zeros((TILE,), tl.float32)
    residual = 1.0
    for _ in range(0, 2):
        if residual > MENDABLE:
            threshold += step
            acc = tl.zeros((TILE, BLOCK_DIM_V), tl.float32)
            mean = tl.zeros((TILE, BLOCK_DIM_V), tl.float32)
            mass = tl.zeros((TILE,), tl.float32)
            slopes = tl.zeros((TILE,), tl.float32)
            for i in range(0, count):
                j = tl.load(tile_list + i)
                k = load_tile(k_base, j * TILE, skt, N, DIM, BLOCK_DIM, TILE)
                v = load_tile(v_base, j * TILE, svt, N, DIM_V, BLOCK_DIM_V, TILE)
                partial = (j < inner_begin) | (j >= inner_end)
                y = excess(
                    q, k, j, kz, threshold, ce, slope_ptr, e, slope, origin, partial, first_ptr, last_ptr, rows, T,
                    TILE, SLOPES,
                )  # fmt: skip
                p, g = weights(y, e, ALPHA, EXACT)
                mass += tl.sum(p, 1)
                slopes += tl.sum(g, 1)
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
                mean = tl.dot(g.to(v.dtype), v, mean, input_precision="ieee")
            step = tl.where(visible, newton_step(mass, slopes, e, ALPHA), 0.0)
            residual = tl.max(tl.abs(step), 0)

    threshold += step
    mass -= step / e * slopes
    acc -= (step / e)[:, None] * mean
    mass = tl.where(mass > 0.0, mass, 1.0)
    out_base = bh * T * DIM_V
    store_tile(out_ptr + out_base, acc / mass[:, None], tile_row * TILE, DIM_V, T, DIM_V, BLOCK_DIM_V, TILE)
    if mean_ptr is not None:
        mean = mean / tl.where(slopes > 0.0, slopes, 1.0)[:, None]
        store_tile(mean_ptr + out_base, mean, tile_row * TILE, DIM_V, T, DIM_V, BLOCK_DIM_V, TILE)
    # For the backward: the factor that brings the mass to 1, and the threshold with it.
    log_mass = tl.log(mass)
    norm = tl.exp(-e * log_mass)
    threshold = threshold * norm
    if ALPHA == 0:  # (1 + y) norm = 1 + y'
        a = e * log_mass
        threshold += tl.where(tl.abs(a) < 0.01, a * (1.0 - a * (0.5 - a * (1.0 / 6.0))), 1.0 - norm)
    state = state_ptr + (bh * T + rows) * 2
    tl.store(state, tl.where(visible, threshold, NOTHING), mask=rows < T)
    tl.store(state + 1, tl.where(visible, norm, 0.0), mask=rows < T)


def kernel_forward(problem: Problem, save: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Output (B, H, T, D_v), and for the backward: the state, float32 (B, H, T, 2); the mean of the values by slope,
    like the output (None unless ``save``); the tiles, int32 (B, H, query tiles, words)."""
    x = problem
    B, H, T = x.query.shape[:3]
    out = x.query.new_empty(B, H, T, x.value.shape[-1])
    mean = torch.empty_like(out) if save else None
    state = torch.empty(B, H, T, 2, dtype=torch.float32, device=out.device)
    tiles = torch.zeros(B, H, x.n_row_tiles, x.n_words, dtype=torch.int32, device=out.device)
    if out.numel() == 0:
        return out, state, mean, tiles
    norms = _key_norms(x) if x.slopes is not None else None
    query = -x.query if x.query_scale is None and x.scaling < 0 else x.query  # the largest product: the largest score
    for biased in (False,) if x.slopes is None else (False, True):
        launch(
            _candidates_kernel,
            (x.n_row_tiles, B * H),
            _CANDIDATES,
            x.constants() | {"BIASED": biased},
            query, x.key, x.first, x.last, x.query_scale, x.slopes, norms, x.alpha, state, tiles,
            *query.stride()[:3], *x.key.stride()[:3], x.interval_stride, x.alpha_stride,
            T, x.key.shape[2], H, x.group, x.n_row_tiles, x.n_key_tiles, x.n_words, x.scaling, x.alpha_value,
        )  # fmt: skip
    tile_list = torch.empty(x.heads_at_once, x.n_row_tiles, x.n_key_tiles, dtype=torch.int32, device=out.device)
    for first_head in range(0, B * H, x.heads_at_once):
        heads = min(x.heads_at_once, B * H - first_head)
        launch(
            _attend_kernel,
            (x.n_row_tiles, heads),
            _ATTEND if x.widest <= 64 else _ATTEND[1:],
            x.constants(value=True),
            x.query, x.key, x.value, out, mean, x.first, x.last, x.query_scale, x.slopes, x.alpha, state, tiles,
            tile_list,
            *x.query.stride()[:3], *x.key.stride()[:3], *x.value.stride()[:3], x.interval_stride, x.alpha_stride,
            T, x.key.shape[2], H, x.group, x.n_key_tiles, x.n_words, x.scaling, x.alpha_value, x.tolerance, first_head,
        )  # fmt: skip
    return out, state, mean, tiles


def _key_norms(x: Problem) -> Tensor:
    """(B, H_kv, key tiles): the largest norm of the keys up to the end of each tile."""
    B, heads_kv = x.key.shape[:2]
    norms = torch.empty(B, heads_kv, x.n_key_tiles, dtype=torch.float32, device=x.key.device)
    constants = {k: v for k, v in x.constants().items() if k in ("TILE", "DIM", "BLOCK_DIM")}
    arguments = (x.key, norms, *x.key.stride()[:3], x.key.shape[2], heads_kv)
    launch(_norms_kernel, (x.n_key_tiles, B * heads_kv), _NORMS, constants, *arguments)
    return norms.cummax(-1).values
