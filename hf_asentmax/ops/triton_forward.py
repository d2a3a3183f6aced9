"""Entmax attention, forward: one dense pass for the candidates (``triton_candidates.py``), then only candidates.

``_solve_kernel`` visits the marked tiles: one pass gives mass and slope at the bound and a little above it, and unmarks
tiles that lie below; interpolation between the two is the threshold (further passes while a row's mass is far from 1).
``_output_kernel`` gives the output and ``mean_i = sum_j g_ij v_j / sum_j g_ij``, which the backward needs, and mends
what the step left. They are two, because the first needs few registers: the more of its programs run at once.

The law and what is held of it: ``triton_common.py``. Memory beside the output: a second tensor of its size, 8 bytes a
query, one bit a pair of tiles, and lists of tiles of at most 64 MiB or, where they are longer, one head's. No atomics
on floating point numbers: the same inputs give the same bits.

Source: arXiv 2506.16640.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_candidates import mark_candidates
from .triton_common import (
    NOTHING,
    either,
    excess,
    key_tile_ranges,
    list_tiles,
    load_bias,
    load_exponent,
    load_intervals,
    load_row_scale,
    load_tile,
    newton_step,
    normalized,
    partial_sum,
    store_tile,
    weights,
)
from .triton_launch import SIZES, Config, Problem, launch
from .triton_short import attend_short, serves_short

_SOLVE = (Config(4, 2, {}, 96), Config(4, 2), Config(4, 1))  # the first for narrow heads
_OUTPUT = (Config(4, 3, {}, 168), Config(4, 3), Config(4, 2), Config(4, 1))  # likewise
# How far a threshold may be off, in units of z, to be mended by a step of first order, which leaves (keys in support) *
# step^2 of the mass: 2e-3 at most for a 16-bit output. Of float32 the backward's mean has to be near the root too: as
# near as rounding lets it, relative to a threshold above 1.
MENDABLE = tl.constexpr(9e-4)
MENDABLE_SHARE = tl.constexpr(2e-3)
MENDABLE_FLOAT32 = tl.constexpr(2e-6)
# The second threshold of a pass, in units of 1 / (sum of g). Simulated on topics, Gaussian and equal scores of 2,048 to
# 32,768 keys: with 0.3, in 0 to 6 % of the tiles a row is left off by more than MENDABLE; with 0.1 in 0 to 69 %.
AHEAD = tl.constexpr(0.3)


@triton.jit
def _step_between(mass, slope, mass_ahead, slope_ahead, ahead):
    """The step to mass 1 of alpha 1.5, from two thresholds: by a cubic through the threshold as a function of the root
    of the mass, which is nearly straight, and its derivatives; beyond the second threshold, by Newton from there."""
    root, root_ahead = tl.sqrt(mass), tl.sqrt(mass_ahead)
    slope, slope_ahead = tl.maximum(slope, 1.0e-30), tl.maximum(slope_ahead, 1.0e-30)
    fall = tl.maximum(root - root_ahead, 1.0e-30)
    x = tl.minimum(tl.maximum((root - 1.0) / fall, 0.0), 1.0)
    rise = fall * root / slope
    rise_ahead = tl.where(mass_ahead > 0.0, fall * root_ahead / slope_ahead, rise)
    step = x * (1.0 - x) * (rise * (1.0 - x) - rise_ahead * x) + ahead * x * x * (3.0 - 2.0 * x)
    step = tl.where(mass_ahead < 1.0, step, ahead + (mass_ahead - root_ahead) / slope_ahead)
    return tl.where(mass > 1.0, step, (mass - root) / slope)


@triton.jit(do_not_specialize=SIZES)
def _solve_kernel(
    q_ptr, k_ptr, first_ptr, last_ptr, scale_ptr, slopes_ptr, alpha_ptr, state_ptr, tiles_ptr, list_ptr,
    sqb, sqh, sqt, skb, skh, skt, interval_stride, alpha_stride,
    T, N, H, GROUP, n_key_tiles, n_words, scaling, alpha_value, tolerance, first_head,
    ALPHA: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, LANES: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    SLOPES: tl.constexpr = slopes_ptr is not None
    n_row_tiles = tl.num_programs(0)
    tile_row = n_row_tiles - 1 - tl.program_id(0)
    # Backwards, since what the dense pass had last is still in the cache.
    in_chunk = tl.num_programs(1).to(tl.int64) - 1 - tl.program_id(1)
    bh = first_head + in_chunk
    b, h = bh // H, bh % H
    has_slope = False
    if SLOPES:
        has_slope = tl.load(slopes_ptr + h) != 0.0
    for BIASED in tl.static_range(1 + SLOPES):
        if has_slope == BIASED:
            rows = tile_row * TILE + tl.arange(0, TILE)
            q = load_tile(q_ptr + b * sqb + h * sqh, tile_row * TILE, sqt, T, DIM, BLOCK_DIM, TILE)
            state = state_ptr + (bh * T + rows) * 2
            bound = tl.load(state, mask=rows < T, other=NOTHING)
            total_slope = tl.load(state + 1, mask=rows < T, other=1.0)
            first_ptr += b * interval_stride
            last_ptr += b * interval_stride
            first, last, visible = load_intervals(first_ptr, last_ptr, rows, T)
            e = load_exponent(alpha_ptr, h, alpha_stride, alpha_value, ALPHA)
            ce = load_row_scale(scale_ptr, bh * T, rows, T, scaling, TILE) * e
            slope, origin = load_bias(slopes_ptr, last_ptr, h, e, tile_row, TILE, BIASED)
            words = tiles_ptr + (bh * n_row_tiles + tile_row) * (n_words + 2)
            tile_list = list_ptr + (in_chunk * n_row_tiles + tile_row) * (n_key_tiles + 1)
            count = list_tiles(words, n_words, tile_list + 1, 128)
            begin, inner_begin, inner_end, end = key_tile_ranges(first, last, visible, TILE)
            tl.store(words + n_words, inner_begin)
            tl.store(words + n_words + 1, inner_end)

            k_base = k_ptr + b * skb + h // GROUP * skh
            ones = tl.full((TILE,), 1.0, tl.float32)
            threshold = bound
            passes = 0
            residual = tolerance + 1.0
            while (residual > tolerance) & (passes < 32):
                ahead = AHEAD / tl.maximum(total_slope, 1.0e-30)
                mass = tl.zeros((TILE, LANES), tl.float32)
                slopes = tl.zeros((TILE, LANES), tl.float32)
                mass_ahead = tl.zeros((TILE, LANES), tl.float32)
                slopes_ahead = tl.zeros((TILE, LANES), tl.float32)
                kept = 0
                for base in range(0, count, 32):
                    bits = tl.zeros((TILE, LANES), tl.int32)
                    for i in range(base, tl.minimum(base + 32, count)):
                        j = tl.load(tile_list + 1 + i)
                        k = load_tile(k_base, j * TILE, skt, N, DIM, BLOCK_DIM, TILE)
                        partial = (j < inner_begin) | (j >= inner_end)
                        y = excess(
                            q, k, j, ce, ones, threshold, slope, origin, partial, first_ptr, last_ptr, rows, T, TILE,
                            BIASED,
                        )  # fmt: skip
                        p, g = weights(y, e, ALPHA, EXACT)
                        tile_slope = partial_sum(g, LANES)
                        mass += partial_sum(p, LANES)
                        slopes += tile_slope
                        if ALPHA == 1:
                            above = tl.maximum(g - ahead[:, None], 0.0)
                            mass_ahead += partial_sum(above * above, LANES)
                            slopes_ahead += partial_sum(above, LANES)
                        bits |= 1 - (tile_slope <= 0.0).to(tl.int32) << (i - base)
                    if passes == 0:  # its threshold is a lower bound: what lies below is out for good
                        places = base + tl.arange(0, 32)
                        tiles = tl.load(tile_list + 1 + places, mask=places < count, other=0)
                        bit = (tl.reduce(tl.reduce(bits, 1, either), 0, either) >> (places - base)) & 1
                        tl.debug_barrier()
                        tl.store(tile_list + kept + tl.cumsum(bit, 0), tiles, mask=bit != 0)
                        dropped = (places < count) & (bit == 0)
                        tl.atomic_and(words + tiles // 32, ~(1 << (tiles % 32)), mask=dropped)
                        tl.debug_barrier()
                        kept += tl.sum(bit, 0)
                if passes == 0:
                    count = kept
                total = tl.sum(mass, 1)
                total_slope = tl.sum(slopes, 1)
                if ALPHA == 1:
                    step = _step_between(total, total_slope, tl.sum(mass_ahead, 1), tl.sum(slopes_ahead, 1), ahead)
                else:
                    step = newton_step(total, total_slope, e, ALPHA)
                residual = tl.max(tl.where(visible, tl.abs(total - 1.0), 0.0), 0)
                threshold = tl.where(visible, tl.maximum(threshold + step, bound), threshold)
                passes += 1
            tl.store(tile_list, count)
            tl.store(state, threshold, mask=rows < T)


@triton.jit(do_not_specialize=SIZES)
def _output_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, mean_ptr, first_ptr, last_ptr, scale_ptr, slopes_ptr, alpha_ptr, state_ptr, tiles_ptr,
    list_ptr,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, interval_stride, alpha_stride,
    T, N, H, GROUP, n_key_tiles, n_words, scaling, alpha_value, first_head,
    ALPHA: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr, LANES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    SLOPES: tl.constexpr = slopes_ptr is not None
    n_row_tiles = tl.num_programs(0)
    tile_row = n_row_tiles - 1 - tl.program_id(0)
    bh = first_head + tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    has_slope = False
    if SLOPES:
        has_slope = tl.load(slopes_ptr + h) != 0.0
    for BIASED in tl.static_range(1 + SLOPES):
        if has_slope == BIASED:
            rows = tile_row * TILE + tl.arange(0, TILE)
            q = load_tile(q_ptr + b * sqb + h * sqh, tile_row * TILE, sqt, T, DIM, BLOCK_DIM, TILE)
            state = state_ptr + (bh * T + rows) * 2
            threshold = tl.load(state, mask=rows < T, other=NOTHING)
            visible = threshold < NOTHING
            first_ptr += b * interval_stride
            last_ptr += b * interval_stride
            e = load_exponent(alpha_ptr, h, alpha_stride, alpha_value, ALPHA)
            ce = load_row_scale(scale_ptr, bh * T, rows, T, scaling, TILE) * e
            slope, origin = load_bias(slopes_ptr, last_ptr, h, e, tile_row, TILE, BIASED)
            words = tiles_ptr + (bh * n_row_tiles + tile_row) * (n_words + 2)
            inner_begin = tl.load(words + n_words)
            inner_end = tl.load(words + n_words + 1)
            tile_list = list_ptr + (tl.program_id(1).to(tl.int64) * n_row_tiles + tile_row) * (n_key_tiles + 1)
            count = tl.load(tile_list)
            k_base = k_ptr + b * skb + h // GROUP * skh
            v_base = v_ptr + b * svb + h // GROUP * svh
            ones = tl.full((TILE,), 1.0, tl.float32)

            # The output at this threshold, and what it is off by: a step of first order mends a small error, and a
            # larger one (of a row in thousands) is done again. Where many keys lie just below a threshold that is too
            # high, the step goes far below the root; from there each nears it, and three or four are enough.
            keys = (count * TILE).to(tl.float32)
            mendable = MENDABLE_FLOAT32 if q.dtype == tl.float32 else MENDABLE
            acc = tl.zeros((TILE, BLOCK_DIM_V), tl.float32)
            mean = tl.zeros((TILE, BLOCK_DIM_V), tl.float32)
            mass = tl.zeros((TILE,), tl.float32)
            slopes = tl.zeros((TILE,), tl.float32)
            step = tl.zeros((TILE,), tl.float32)
            residual = 1.0
            for _ in range(0, 8):
                if (residual > mendable) | (keys * residual * residual > MENDABLE_SHARE):
                    threshold += step
                    acc = tl.zeros((TILE, BLOCK_DIM_V), tl.float32)
                    mean = tl.zeros((TILE, BLOCK_DIM_V), tl.float32)
                    mass = tl.zeros((TILE,), tl.float32)
                    slopes = tl.zeros((TILE,), tl.float32)
                    for i in range(0, count):
                        j = tl.load(tile_list + 1 + i)
                        k = load_tile(k_base, j * TILE, skt, N, DIM, BLOCK_DIM, TILE)
                        v = load_tile(v_base, j * TILE, svt, N, DIM_V, BLOCK_DIM_V, TILE)
                        partial = (j < inner_begin) | (j >= inner_end)
                        y = excess(
                            q, k, j, ce, ones, threshold, slope, origin, partial, first_ptr, last_ptr, rows, T, TILE,
                            BIASED,
                        )  # fmt: skip
                        p, g = weights(y, e, ALPHA, EXACT)
                        mass += tl.sum(p, 1)
                        slopes += tl.sum(g, 1)
                        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
                        if ALPHA != 3:
                            mean = tl.dot(g.to(v.dtype), v, mean, input_precision="ieee")
                    step = tl.where(visible, newton_step(mass, slopes, e, ALPHA), 0.0)
                    residual = tl.max(tl.abs(step), 0)
                    if q.dtype == tl.float32:
                        residual = tl.max(tl.abs(step) / tl.maximum(1.0, tl.abs(threshold)), 0)

            if ALPHA == 3:
                mean = acc
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
            threshold, norm = normalized(threshold, mass, e, ALPHA)
            tl.store(state, tl.where(visible, threshold, NOTHING), mask=rows < T)
            tl.store(state + 1, tl.where(visible, norm, 0.0), mask=rows < T)


def kernel_forward(problem: Problem, save: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Output (B, H, T, D_v), and for the backward: the state, float32 (B, H, T, 2); the mean of the values by slope,
    like the output (None unless ``save``); the tiles, those of ``triton_common.py``."""
    x = problem
    B, H, T = x.query.shape[:3]
    out = x.query.new_empty(B, H, T, x.value.shape[-1])
    mean = torch.empty_like(out) if save else None
    state = torch.empty(B, H, T, 2, dtype=torch.float32, device=out.device)
    tiles = torch.zeros(x.tiles_shape, dtype=torch.int32, device=out.device)
    if out.numel() == 0:
        return out, state, mean, tiles
    if serves_short(x):
        attend_short(x, out, mean, state, tiles)
        return out, state, mean, tiles
    mark_candidates(x, state, tiles)
    # Of each query tile: how many key tiles, and which.
    tile_list = torch.empty(x.heads_at_once, x.n_row_tiles, x.n_key_tiles + 1, dtype=torch.int32, device=out.device)
    rows = (x.first, x.last, x.query_scale, x.slopes, x.alpha, state, tiles, tile_list)
    strides = [stride for tensor in (x.query, x.key, x.value) for stride in tensor.stride()[:3]]
    intervals = (x.interval_stride, x.alpha_stride)
    sizes = (T, x.key.shape[2], H, x.group, x.n_key_tiles, x.n_words, x.scaling, x.alpha_value)
    for first_head in range(0, B * H, x.heads_at_once):
        grid = (x.n_row_tiles, min(x.heads_at_once, B * H - first_head))
        launch(
            _solve_kernel,
            grid,
            _SOLVE if x.widest <= 64 else _SOLVE[1:],
            x.constants(),
            x.variant,
            x.query, x.key, *rows, *strides[:6], *intervals, *sizes, x.tolerance, first_head,
        )  # fmt: skip
        launch(
            _output_kernel,
            grid,
            _OUTPUT if x.widest <= 64 else _OUTPUT[1:],
            x.constants(value=True),
            (save, x.variant),
            x.query, x.key, x.value, out, mean, *rows, *strides, *intervals, *sizes, first_head,
        )  # fmt: skip
    return out, state, mean, tiles
