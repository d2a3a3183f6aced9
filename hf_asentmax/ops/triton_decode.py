"""Entmax attention of few queries against many keys, forward only: a step of generation.

The cache is split over the device, and all queries of a key/value head go together, so that each key is read once:

- ``_scores_kernel`` writes the scores, and of each row the largest in each tile of keys
- ``_threshold_kernel`` solves for a row's threshold. The largest scores of the tiles are scores of distinct keys: what
  solves for them alone is a lower bound, and no tile below it has support. It looks at the others only, and marks those
  that have support.
- ``_partial_kernel`` reads the values of marked tiles, ``_combine_kernel`` adds up what the splits have

Memory beside the output: the scores, float32 (B, H, T, N rounded up to a tile), which lets a thread take several at
once. The same inputs give the same bits. The law and what is held of it: ``triton_common.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import (
    HIDDEN,
    NOTHING,
    below,
    compress,
    depth,
    load_exponent,
    load_tile,
    newton_step,
    weights,
)
from .triton_launch import SIZES, Config, Problem, kind, launch, padded

MOST_ROWS = 64  # queries times heads of a group that go together
_SPLITS = 4  # programs for each multiprocessor
_SCORES = (Config(4, 3), Config(4, 2), Config(4, 1))
_THRESHOLD = (Config(4, 1),)
_PARTIAL = (Config(4, 3), Config(4, 2), Config(4, 1))
_COMBINE = (Config(4, 1, {"SPLITS": 16}),)


@triton.jit(do_not_specialize=SIZES)
def _scores_kernel(
    q_ptr, k_ptr, first_ptr, last_ptr, scale_ptr, slopes_ptr, alpha_ptr, scores_ptr, tops_ptr, marks_ptr,
    sqb, sqh, sqt, skb, skh, skt, interval_stride, alpha_stride,
    T, N, H, GROUP, n_key_tiles, n_splits, scaling, alpha_value,
    ALPHA: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    split, bh_kv = tl.program_id(0), tl.program_id(1).to(tl.int64)
    heads_kv = H // GROUP
    b, h_kv = bh_kv // heads_kv, bh_kv % heads_kv
    row = tl.arange(0, ROWS)  # head of the group, query
    inside = row < GROUP * T
    h, t = tl.minimum(h_kv * GROUP + row // T, H - 1), row % T
    dims = tl.arange(0, BLOCK_DIM)
    q = tl.load(
        q_ptr + b * sqb + (h * sqh + t * sqt)[:, None] + dims[None, :],
        mask=inside[:, None] & (dims < DIM)[None, :],
        other=0.0,
    )
    first = tl.load(first_ptr + b * interval_stride + t, mask=inside, other=0)
    last = tl.load(last_ptr + b * interval_stride + t, mask=inside, other=0)
    visible = first < last
    begin = tl.min(tl.where(visible, first, 2147483647), 0) // TILE
    end = (tl.max(tl.where(visible, last, 0), 0) + TILE - 1) // TILE
    e = load_exponent(alpha_ptr, h, alpha_stride, alpha_value, ALPHA)
    ce = scaling * e
    if scale_ptr is not None:
        ce = ce * tl.load(scale_ptr + (b * H + h) * T + t, mask=inside, other=0.0)
    else:
        ce = tl.zeros((ROWS,), tl.float32) + ce
    slope = tl.zeros((ROWS,), tl.float32)
    if slopes_ptr is not None:
        slope = e * tl.load(slopes_ptr + h, mask=inside, other=0.0)
    k_base = k_ptr + b * skb + h_kv * skh
    own = bh_kv * GROUP * T + row
    n_own = (n_key_tiles + n_splits - 1) // n_splits
    start, stop = split * n_own, tl.minimum(split * n_own + n_own, n_key_tiles)
    unseen = tl.full((ROWS,), HIDDEN, tl.float32)
    for j in range(start, stop):
        tl.store(marks_ptr + bh_kv * n_key_tiles + j, 0)
        if (j < begin) | (j >= end):
            tl.store(tops_ptr + own * n_key_tiles + j, unseen, mask=inside)
    for j in range(tl.maximum(start, begin), tl.minimum(stop, end)):
        k = load_tile(k_base, j * TILE, skt, N, DIM, BLOCK_DIM, TILE)
        z = tl.dot(q, tl.trans(k), input_precision="ieee") * ce[:, None]
        keys = j * TILE + tl.arange(0, TILE)
        z += slope[:, None] * (keys[None, :] - (last - 1)[:, None]).to(tl.float32)
        z = tl.where((keys[None, :] >= first[:, None]) & (keys[None, :] < last[:, None]), z, HIDDEN)
        tl.store(scores_ptr + own[:, None] * (n_key_tiles * TILE) + keys[None, :], z, mask=inside[:, None])
        tl.store(tops_ptr + own * n_key_tiles + j, tl.max(z, 1), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _threshold_kernel(
    scores_ptr, tops_ptr, alpha_ptr, thresholds_ptr, marks_ptr, list_ptr, alpha_stride,
    T, H, GROUP, n_key_tiles, alpha_value,
    ALPHA: tl.constexpr, TILE: tl.constexpr, EXACT: tl.constexpr, CHUNK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row, bh_kv = tl.program_id(0), tl.program_id(1).to(tl.int64)
    h = bh_kv % (H // GROUP) * GROUP + row // T
    own = bh_kv * GROUP * T + row
    e = load_exponent(alpha_ptr, h, alpha_stride, alpha_value, ALPHA)
    tops = tops_ptr + own * n_key_tiles
    scores = scores_ptr + own * n_key_tiles * TILE
    tile_list = list_ptr + own * n_key_tiles
    places = tl.arange(0, CHUNK)
    largest = tl.full((CHUNK,), HIDDEN, tl.float32)
    for start in range(0, n_key_tiles, CHUNK):
        largest = tl.maximum(largest, tl.load(tops + start + places, mask=start + places < n_key_tiles, other=HIDDEN))
    largest = tl.max(largest, 0)
    if largest <= 0.5 * HIDDEN:
        tl.store(thresholds_ptr + own, NOTHING)
        return

    # Newton from below on the largest scores alone, of distinct keys: a lower bound.
    threshold = largest - below(ALPHA)
    for _ in range(4):
        mass = tl.zeros((CHUNK,), tl.float32)
        slope = tl.zeros((CHUNK,), tl.float32)
        for start in range(0, n_key_tiles, CHUNK):
            top = tl.load(tops + start + places, mask=start + places < n_key_tiles, other=HIDDEN)
            p, g = weights(top - threshold, e, ALPHA, EXACT)
            mass += p
            slope += g
        threshold += tl.maximum(newton_step(tl.sum(mass, 0), tl.sum(slope, 0), e, ALPHA), 0.0)
    count = 0
    for start in range(0, n_key_tiles, CHUNK):
        top = tl.load(tops + start + places, mask=start + places < n_key_tiles, other=HIDDEN)
        above = (start + places < n_key_tiles) & ~(top <= threshold - depth(ALPHA))  # NaN is to be seen
        count += compress(tile_list + count, start + places, above)
    tl.debug_barrier()

    bound = threshold
    residual = 1.0e30
    passes = 0
    while (residual > 1.0e-3) & (passes < 32):
        mass = tl.zeros((TILES,), tl.float32)
        slope = tl.zeros((TILES,), tl.float32)
        for start in range(0, count, TILES):
            i = start + tl.arange(0, TILES)
            j = tl.load(tile_list + i, mask=i < count, other=n_key_tiles)
            keys = j[:, None] * TILE + tl.arange(0, TILE)[None, :]
            z = tl.load(scores + keys, mask=(i < count)[:, None], other=HIDDEN)
            p, g = weights(z - threshold, e, ALPHA, EXACT)
            mass += tl.sum(p, 1)
            slope += tl.sum(g, 1)
        total = tl.sum(mass, 0)
        residual = tl.abs(total - 1.0)
        threshold = tl.maximum(threshold + newton_step(total, tl.sum(slope, 0), e, ALPHA), bound)
        passes += 1
    for start in range(0, count, CHUNK):
        j = tl.load(tile_list + start + places, mask=start + places < count, other=0)
        top = tl.load(tops + j, mask=start + places < count, other=HIDDEN)
        tl.store(
            marks_ptr + bh_kv * n_key_tiles + j,
            tl.full((CHUNK,), 1, tl.int32),
            mask=(start + places < count) & ~(top <= threshold - depth(ALPHA)),
        )
    tl.store(thresholds_ptr + own, threshold)


@triton.jit(do_not_specialize=SIZES)
def _partial_kernel(
    v_ptr, alpha_ptr, scores_ptr, thresholds_ptr, marks_ptr, list_ptr, sums_ptr, masses_ptr,
    svb, svh, svt, alpha_stride,
    T, N, H, GROUP, n_key_tiles, n_splits, alpha_value,
    ALPHA: tl.constexpr, TILE: tl.constexpr, EXACT: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DIM_V: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    split, bh_kv = tl.program_id(0), tl.program_id(1).to(tl.int64)
    heads_kv = H // GROUP
    b, h_kv = bh_kv // heads_kv, bh_kv % heads_kv
    row = tl.arange(0, ROWS)
    inside = row < GROUP * T
    own = bh_kv * GROUP * T + row
    h = tl.minimum(h_kv * GROUP + row // T, H - 1)
    e = load_exponent(alpha_ptr, h, alpha_stride, alpha_value, ALPHA)
    if alpha_ptr is not None:
        e = e[:, None]
    threshold = tl.load(thresholds_ptr + own, mask=inside, other=NOTHING)
    # Every n_splits-th tile: neighbours, which often have support together, fall to different programs.
    n_own = (n_key_tiles - split + n_splits - 1) // n_splits
    tile_list = list_ptr + (bh_kv * n_splits + split) * ((n_key_tiles + n_splits - 1) // n_splits)
    count = 0
    for start in range(0, n_own, CHUNK):
        i = start + tl.arange(0, CHUNK)
        j = split + i * n_splits
        marked = tl.load(marks_ptr + bh_kv * n_key_tiles + j, mask=i < n_own, other=0) != 0
        count += compress(tile_list + count, j, marked)
    tl.debug_barrier()
    v_base = v_ptr + b * svb + h_kv * svh
    acc = tl.zeros((ROWS, BLOCK_DIM_V), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    for i in range(0, count):
        j = tl.load(tile_list + i)
        keys = j * TILE + tl.arange(0, TILE)
        z = tl.load(
            scores_ptr + own[:, None] * (n_key_tiles * TILE) + keys[None, :], mask=inside[:, None], other=HIDDEN
        )
        p, _ = weights(z - threshold[:, None], e, ALPHA, EXACT)
        v = load_tile(v_base, j * TILE, svt, N, DIM_V, BLOCK_DIM_V, TILE)
        mass += tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    dims = tl.arange(0, BLOCK_DIM_V)
    part = (bh_kv * n_splits + split) * GROUP * T + row
    tl.store(sums_ptr + part[:, None] * DIM_V + dims[None, :], acc, mask=inside[:, None] & (dims < DIM_V)[None, :])
    tl.store(masses_ptr + part, mass, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _combine_kernel(
    sums_ptr, masses_ptr, out_ptr, T, GROUP, n_splits, DIM_V: tl.constexpr, BLOCK_DIM_V: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    row, bh_kv = tl.program_id(0), tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, BLOCK_DIM_V)
    acc = tl.zeros((SPLITS, BLOCK_DIM_V), tl.float32)
    masses = tl.zeros((SPLITS,), tl.float32)
    for start in range(0, n_splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        part = (bh_kv * n_splits + split) * GROUP * T + row
        mask = (split < n_splits)[:, None] & (dims < DIM_V)[None, :]
        acc += tl.load(sums_ptr + part[:, None] * DIM_V + dims[None, :], mask=mask, other=0.0)
        masses += tl.load(masses_ptr + part, mask=split < n_splits, other=0.0)
    mass = tl.sum(masses, 0)
    mass = tl.where(mass > 0.0, mass, 1.0)
    out = out_ptr + (bh_kv * GROUP * T + row) * DIM_V + dims
    tl.store(out, (tl.sum(acc, 0) / mass).to(out_ptr.dtype.element_ty), mask=dims < DIM_V)


def serves_decode(problem: Problem) -> bool:
    """Whether few enough queries look at enough keys."""
    rows = problem.group * problem.query.shape[2]
    return 0 < rows <= MOST_ROWS and problem.query.shape[2] <= 16 and problem.key.shape[2] > 4 * problem.tile


def kernel_decode(problem: Problem) -> Tensor:
    """The output (B, H, T, D_v) of what :func:`serves_decode`."""
    x = problem
    B, H, T = x.query.shape[:3]
    heads_kv, N = x.key.shape[1:3]
    device, rows = x.query.device, x.group * T
    out = x.query.new_empty(B, H, T, x.value.shape[-1])
    if out.numel() == 0:
        return out
    n_splits = max(1, min(x.n_key_tiles, _SPLITS * _multiprocessors(device) // (B * heads_kv)))
    shapes = (
        (rows, x.n_key_tiles * x.tile),
        (rows, x.n_key_tiles),
        (rows,),
        (n_splits, rows, out.shape[-1]),
        (n_splits, rows),
    )
    scores, tops, thresholds, sums, masses = (
        torch.empty(B * heads_kv, *shape, dtype=torch.float32, device=device) for shape in shapes
    )
    marks = torch.empty(B * heads_kv, x.n_key_tiles, dtype=torch.int32, device=device)
    tile_list = torch.empty(B * heads_kv, rows, x.n_key_tiles + n_splits, dtype=torch.int32, device=device)
    constants = x.constants(value=True) | {"ROWS": padded(rows), "CHUNK": 1024, "TILES": 16}

    def some(*names: str) -> dict[str, int]:
        return {name: constants[name] for name in ("ALPHA", "TILE", *names)}

    sizes = (T, N, H, x.group, x.n_key_tiles)
    launch(
        _scores_kernel,
        (n_splits, B * heads_kv),
        _SCORES,
        some("DIM", "BLOCK_DIM", "ROWS"),
        x.variant,
        x.query, x.key, x.first, x.last, x.query_scale, x.slopes, x.alpha, scores, tops, marks,
        *x.query.stride()[:3], *x.key.stride()[:3], x.interval_stride, x.alpha_stride,
        *sizes, n_splits, x.scaling, x.alpha_value,
    )  # fmt: skip
    launch(
        _threshold_kernel,
        (rows, B * heads_kv),
        _THRESHOLD,
        some("EXACT", "CHUNK", "TILES"),
        kind(x.alpha),
        scores, tops, x.alpha, thresholds, marks, tile_list, x.alpha_stride, T, H, x.group, x.n_key_tiles,
        x.alpha_value,
    )  # fmt: skip
    launch(
        _partial_kernel,
        (n_splits, B * heads_kv),
        _PARTIAL,
        some("EXACT", "DIM_V", "BLOCK_DIM_V", "ROWS", "CHUNK"),
        kind(x.value, x.alpha),
        x.value, x.alpha, scores, thresholds, marks, tile_list, sums, masses,
        *x.value.stride()[:3], x.alpha_stride, *sizes, n_splits, x.alpha_value,
    )  # fmt: skip
    dims = {name: constants[name] for name in ("DIM_V", "BLOCK_DIM_V")}
    launch(_combine_kernel, (rows, B * heads_kv), _COMBINE, dims, kind(out), sums, masses, out, T, x.group, n_splits)
    return out


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
