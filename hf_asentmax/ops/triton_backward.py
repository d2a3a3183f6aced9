"""Entmax attention, backward: over the tiles that have support, and nothing else.

With p and g of ``triton_common.py``, scores ``s_ij = c_i <q_i, k_j> + bias``, ``c_i = scaling * r_i`` and
``dp_ij = <do_i, v_j>``:

    ds_ij = g_ij (dp_ij - delta_i)       delta_i = sum_j g_ij dp_ij / sum_j g_ij = <do_i, mean_i>
    dq_i = c_i sum_j ds_ij k_j           dk_j = sum_i c_i ds_ij q_i           dv_j = sum_i p_ij do_i
    dr_i = scaling <q_i, sum_j ds_ij k_j>
    dalpha = sum_ij (dp_ij - delta_i) p_ij phi_ij,   phi = (1 + a - exp(a)) / (alpha-1)^2,  a = -(alpha-1) log p_ij

where ``mean_i = sum_j g_ij v_j / sum_j g_ij`` comes from the forward. ``_queries_kernel`` takes a tile of queries and
its list of key tiles, ``_keys_kernel`` a tile of keys and its list of query tiles, of all heads of the group. Each sum
has one owner and a fixed order: the same inputs give the same bits.

Source: arXiv 1909.00015, propositions 1 and 2; the terms of dalpha collected so that nothing cancels near alpha = 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import (
    alpha_slopes,
    excess,
    list_tiles,
    load_bias,
    load_exponent,
    load_row_scale,
    load_tile,
    store_tile,
    weights,
)
from .triton_launch import SIZES, Config, Problem, kind, launch
from .triton_short import gradients_short, serves_short_backward

# The first for narrow heads.
_QUERIES = (Config(4, 3, {}, 168), Config(4, 2), Config(4, 1))
_KEYS = (Config(4, 2, {}, 168), Config(4, 2), Config(4, 1))


@triton.jit(do_not_specialize=SIZES)
def _queries_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, mean_ptr, first_ptr, last_ptr, scale_ptr, slopes_ptr, alpha_ptr, state_ptr,
    tiles_ptr, dq_ptr, dr_ptr, dalpha_ptr, delta_ptr, list_ptr,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sgb, sgh, sgt, sdb, sdh, sdt, interval_stride, alpha_stride,
    T, N, H, GROUP, n_key_tiles, n_words, scaling, alpha_value, first_head,
    ALPHA: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr, LANES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    SLOPES: tl.constexpr = slopes_ptr is not None
    n_row_tiles = tl.num_programs(0)
    tile_row = n_row_tiles - 1 - tl.program_id(0)
    # Backwards, since what the forward had last may still be in the cache.
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
            grad = load_tile(grad_ptr + b * sgb + h * sgh, tile_row * TILE, sgt, T, DIM_V, BLOCK_DIM_V, TILE)
            mean = load_tile(mean_ptr + bh * T * DIM_V, tile_row * TILE, DIM_V, T, DIM_V, BLOCK_DIM_V, TILE)
            threshold = tl.load(state_ptr + (bh * T + rows) * 2, mask=rows < T, other=1.0)
            norm = tl.load(state_ptr + (bh * T + rows) * 2 + 1, mask=rows < T, other=0.0)
            first_ptr += b * interval_stride
            last_ptr += b * interval_stride
            e = load_exponent(alpha_ptr, h, alpha_stride, alpha_value, ALPHA)
            c = load_row_scale(scale_ptr, bh * T, rows, T, scaling, TILE)
            ce = c * e
            slope, origin = load_bias(slopes_ptr, last_ptr, h, e, tile_row, TILE, BIASED)
            words = tiles_ptr + (bh * n_row_tiles + tile_row) * (n_words + 2)
            inner_begin = tl.load(words + n_words)
            inner_end = tl.load(words + n_words + 1)
            tile_list = list_ptr + (in_chunk * n_row_tiles + tile_row) * n_key_tiles
            count = list_tiles(words, n_words, tile_list, 128)
            delta = tl.sum(grad.to(tl.float32) * mean.to(tl.float32), 1)
            tl.store(delta_ptr + bh * T + rows, delta, mask=rows < T)
            k_base = k_ptr + b * skb + h // GROUP * skh
            v_base = v_ptr + b * svb + h // GROUP * svh

            acc = tl.zeros((TILE, BLOCK_DIM), tl.float32)
            dalpha = tl.zeros((TILE,), tl.float32)
            for i in range(0, count):
                j = tl.load(tile_list + i)
                k = load_tile(k_base, j * TILE, skt, N, DIM, BLOCK_DIM, TILE)
                v = load_tile(v_base, j * TILE, svt, N, DIM_V, BLOCK_DIM_V, TILE)
                partial = (j < inner_begin) | (j >= inner_end)
                dp = tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None]
                y = excess(
                    q, k, j, ce, norm, threshold, slope, origin, partial, first_ptr, last_ptr, rows, T, TILE, BIASED
                )
                p, g = weights(y, e, ALPHA, EXACT)
                if dalpha_ptr is not None:
                    dalpha += tl.sum(alpha_slopes(y, p, g, e, EXACT) * dp, 1)
                acc = tl.dot((g * dp).to(k.dtype), k, acc, input_precision="ieee")

            if dr_ptr is not None:
                tl.store(dr_ptr + bh * T + rows, scaling * tl.sum(q.to(tl.float32) * acc, 1), mask=rows < T)
            if dalpha_ptr is not None:
                tl.store(dalpha_ptr + bh * T + rows, dalpha, mask=rows < T)
            store_tile(dq_ptr + b * sdb + h * sdh, acc * c[:, None], tile_row * TILE, sdt, T, DIM, BLOCK_DIM, TILE)


@triton.jit(do_not_specialize=SIZES)
def _keys_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, first_ptr, last_ptr, scale_ptr, slopes_ptr, alpha_ptr, state_ptr, tiles_ptr,
    dk_ptr, dv_ptr, delta_ptr, list_ptr,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sgb, sgh, sgt, sdkb, sdkh, sdkt, sdvb, sdvh, sdvt,
    interval_stride, alpha_stride,
    T, N, H, GROUP, n_row_tiles, n_words, scaling, alpha_value, first_head,
    ALPHA: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr, LANES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    SLOPES: tl.constexpr = slopes_ptr is not None
    j = tl.program_id(0)  # the keys that the most queries see first
    heads_kv = H // GROUP
    bh_kv = first_head + tl.program_id(1).to(tl.int64)
    b, h_kv = bh_kv // heads_kv, bh_kv % heads_kv
    first_query_head = b * H + h_kv * GROUP
    k = load_tile(k_ptr + b * skb + h_kv * skh, j * TILE, skt, N, DIM, BLOCK_DIM, TILE)
    v = load_tile(v_ptr + b * svb + h_kv * svh, j * TILE, svt, N, DIM_V, BLOCK_DIM_V, TILE)

    # The query tiles of the group's heads that have support here, as head << 24 | masked << 23 | query tile: from the
    # front those that need neither mask nor bias, from the back the others.
    n_places = GROUP * n_row_tiles
    tile_list = list_ptr + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + j) * n_places
    words = tiles_ptr + first_query_head * n_row_tiles * (n_words + 2)
    n_plain = 0
    n_others = 0
    for start in range(0, n_places, 128):
        place = start + tl.arange(0, 128)
        row_words = words + place * (n_words + 2)
        inside = place < n_places
        head = place // n_row_tiles
        bit = (tl.load(row_words + j // 32, mask=inside, other=0) >> (j % 32)) & 1
        whole = j >= tl.load(row_words + n_words, mask=inside, other=0)
        whole = whole & (j < tl.load(row_words + n_words + 1, mask=inside, other=0))
        plain = whole
        if SLOPES:
            slopes = tl.load(slopes_ptr + h_kv * GROUP + head, mask=inside, other=0.0)
            plain = plain & (slopes == 0.0)
        counts = tl.where(plain, bit, bit << 16)
        ranks = tl.cumsum(counts, 0)
        index = tl.where(plain, n_plain + (ranks & 65535) - 1, n_places - n_others - (ranks >> 16))
        entry = head << 24 | (1 - whole.to(tl.int32)) << 23 | place - head * n_row_tiles
        tl.store(tile_list + index, entry, mask=bit != 0)
        counts = tl.sum(counts, 0)
        n_plain += counts & 65535
        n_others += counts >> 16
    tl.debug_barrier()

    dk = tl.zeros((TILE, BLOCK_DIM), tl.float32)
    dv = tl.zeros((TILE, BLOCK_DIM_V), tl.float32)
    first_ptr += b * interval_stride
    last_ptr += b * interval_stride
    for part in tl.static_range(2):
        for i in range(0, n_others if part else n_plain):
            entry = tl.load(tile_list + (n_places - 1 - i if part else i))
            h = h_kv * GROUP + ((entry >> 24) & 0xFF)
            masked = False
            if part:
                masked = (entry >> 23 & 1) != 0
            tile_row = entry & 0x7FFFFF
            offset = (b * H + h) * T
            rows = tile_row * TILE + tl.arange(0, TILE)
            inside = rows < T
            q = load_tile(q_ptr + b * sqb + h * sqh, tile_row * TILE, sqt, T, DIM, BLOCK_DIM, TILE)
            grad = load_tile(grad_ptr + b * sgb + h * sgh, tile_row * TILE, sgt, T, DIM_V, BLOCK_DIM_V, TILE)
            threshold = tl.load(state_ptr + (offset + rows) * 2, mask=inside, other=1.0)
            norm = tl.load(state_ptr + (offset + rows) * 2 + 1, mask=inside, other=0.0)
            delta = tl.load(delta_ptr + offset + rows, mask=inside, other=0.0)
            c = load_row_scale(scale_ptr, offset, rows, T, scaling, TILE)
            e = load_exponent(alpha_ptr, h, alpha_stride, alpha_value, ALPHA)
            slope, origin = load_bias(slopes_ptr, last_ptr, h, e, tile_row, TILE, SLOPES and part == 1)
            y = excess(
                q, k, j, c * e, norm, threshold, slope, origin, masked, first_ptr, last_ptr, rows, T, TILE,
                SLOPES and part == 1,
            )  # fmt: skip
            p, g = weights(y, e, ALPHA, EXACT)
            dv = tl.dot(tl.trans(p.to(grad.dtype)), grad, dv, input_precision="ieee")
            ds = g * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
            if scale_ptr is not None:
                ds = ds * c[:, None]
            dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision="ieee")

    if scale_ptr is None:
        dk = dk * scaling
    store_tile(dk_ptr + b * sdkb + h_kv * sdkh, dk, j * TILE, sdkt, N, DIM, BLOCK_DIM, TILE)
    store_tile(dv_ptr + b * sdvb + h_kv * sdvh, dv, j * TILE, sdvt, N, DIM_V, BLOCK_DIM_V, TILE)


def kernel_backward(
    problem: Problem, grad_out: Tensor, state: Tensor, mean: Tensor, tiles: Tensor, alpha_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, query_scale (float32, or None) and alpha (float32 (H,), or None)."""
    x = problem
    B, H, T = x.query.shape[:3]
    heads_kv, N = x.key.shape[1:3]
    dq, dk, dv = torch.empty_like(x.query), torch.empty_like(x.key), torch.empty_like(x.value)
    delta = torch.empty(B, H, T, dtype=torch.float32, device=x.query.device)
    dr = torch.empty_like(delta) if x.query_scale is not None else None
    dalpha = torch.empty_like(delta) if alpha_grad else None
    if x.query.numel() == 0 or x.key.numel() == 0:
        for gradient in (dq, dk, dv, dr, dalpha):
            if gradient is not None:
                gradient.zero_()
        return dq, dk, dv, dr, None if dalpha is None else dalpha.sum((0, 2))
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    if serves_short_backward(x):
        gradients_short(x, grad_out, state, mean, dq, dk, dv, dr, dalpha)
        return dq, dk, dv, dr, None if dalpha is None else dalpha.sum((0, 2))
    variant = (kind(grad_out, dq, dk, dv, dalpha), x.variant)
    strides = [s for t in (x.query, x.key, x.value, grad_out) for s in t.stride()[:3]]
    tile_list = torch.empty(x.heads_at_once * x.n_row_tiles * x.n_key_tiles, dtype=torch.int32, device=dq.device)
    for first_head in range(0, B * H, x.heads_at_once):
        heads = min(x.heads_at_once, B * H - first_head)
        launch(
            _queries_kernel,
            (x.n_row_tiles, heads),
            _QUERIES if x.widest <= 64 else _QUERIES[1:],
            x.constants(value=True),
            variant,
            x.query, x.key, x.value, grad_out, mean, x.first, x.last, x.query_scale, x.slopes, x.alpha, state, tiles,
            dq, dr, dalpha, delta, tile_list,
            *strides, *dq.stride()[:3], x.interval_stride, x.alpha_stride,
            T, N, H, x.group, x.n_key_tiles, x.n_words, x.scaling, x.alpha_value, first_head,
        )  # fmt: skip
    at_once = max(1, x.heads_at_once // x.group)
    if at_once * x.group > x.heads_at_once:
        tile_list = torch.empty(x.group * x.n_row_tiles * x.n_key_tiles, dtype=torch.int32, device=dq.device)
    for first_head in range(0, B * heads_kv, at_once):
        heads = min(at_once, B * heads_kv - first_head)
        launch(
            _keys_kernel,
            (x.n_key_tiles, heads),
            _KEYS if x.widest <= 64 else _KEYS[1:],
            x.constants(value=True),
            variant,
            x.query, x.key, x.value, grad_out, x.first, x.last, x.query_scale, x.slopes, x.alpha, state, tiles,
            dk, dv, delta, tile_list,
            *strides, *dk.stride()[:3], *dv.stride()[:3], x.interval_stride, x.alpha_stride,
            T, N, H, x.group, x.n_row_tiles, x.n_words, x.scaling, x.alpha_value, first_head,
        )  # fmt: skip
    return dq, dk, dv, dr, None if dalpha is None else dalpha.sum((0, 2))
