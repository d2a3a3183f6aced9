"""Softmax attention, the case alpha = 1, by PyTorch's own fused kernels.

Memory is O(T + N) and a few integers for each pair of blocks of 128 queries and 128 keys, never O(T N).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

# All of SDPA's kernels but the one that writes out T x N scores.
_FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
_BLOCK = 128  # queries and keys in a block of FlexAttention's mask
_NEVER = torch.iinfo(torch.int32).max  # where the keys begin of a query that sees none
# FlexAttention is compiled anew for each dtype, head dim and kind of arguments, and for one token or many. Dynamo stops
# at 8, where a process that trains, evaluates and generates may well arrive.
_MOST_COMPILATIONS = 128


def takes_softmax(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether :func:`softmax_attention` serves these: at most 32 bits, at least one query and key, head dims from 16
    to 128, or 256 both with 16 bits. FlexAttention's tiles can't be narrower, nor wider in the memory of one
    multiprocessor (between 128 and 256 it has no tile that an A100 holds)."""
    dims = query.shape[-1], value.shape[-1]
    wide = dims == (256, 256) and query.dtype != torch.float32
    return (
        query.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and 0 not in (*query.shape, *key.shape)
        and (wide or all(16 <= dim <= 128 for dim in dims))
    )


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    *,
    scaling: float,
    query_scale: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    """Attention with ``p_i = softmax(s_i)``, ``s_ij = scaling * query_scale_i * <q_i, k_j> - slope * (i - j)``, over
    the keys ``first_i <= j < last_i``, for what :func:`takes_softmax`.

    Where ``is_causal`` says all and there is no ``query_scale`` and no ``alibi_slopes``, a fused kernel of
    ``scaled_dot_product_attention`` computes it: flash attention or cuDNN for 16 bits (D = D_v a multiple of 8), the
    memory-efficient kernel for float32 (H = H_kv, head dims multiples of 4). Compiled FlexAttention computes the rest.
    Scores and their factor are float32 in both: ``query_scale`` is not rounded into a 16-bit query.

    Args:
        query: (B, H, T, D).
        key: (B, H_kv, N, D), H a multiple of H_kv.
        value: (B, H_kv, N, D_v).
        first, last: int32 (B or 1, T). A query without keys gives zeros, in the output and in every gradient.
        scaling: factor of the products.
        query_scale: float32 (B, H, T), factor of each query's scores; may require a gradient.
        alibi_slopes: (H,), without a gradient.
        is_causal: True if T = N and query i sees the keys up to i, False if every query sees every key: what the
            intervals say then, which are not read. None if only they tell.

    Returns:
        (B, H, T, D_v) in the dtype of ``query``.

    Raises:
        RuntimeError: by PyTorch, with its words: a GPU is too old for a fused kernel (compute capability below 8.0),
            FlexAttention would be compiled for more than 128 kinds of arguments, or its backward is to keep the graph
            (compiled functions allow ``retain_graph=True`` only where ``torch._functorch.config.donated_buffer`` is
            off).

    Reference: arXiv 2412.05496 (FlexAttention).
    """
    with torch.autocast(query.device.type, enabled=False):
        plain = is_causal is not None and query_scale is None and alibi_slopes is None
        if plain and _is_fused(query, key, value):
            with sdpa_kernel(_FUSED):
                grouped = query.shape[1] != key.shape[1]
                return scaled_dot_product_attention(
                    query, key, value, is_causal=bool(is_causal), scale=scaling, enable_gqa=grouped
                )
        return _flex(query, key, value, first, last, query_scale, alibi_slopes, scaling)


def _is_fused(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether SDPA has a fused kernel for these, by shapes and strides: what PyTorch offers for the question
    (``torch.backends.cuda.can_use_flash_attention``) can't be compiled."""
    dims = query.shape[-1], value.shape[-1]
    if max(dims) > 128 or any(x.stride(-1) != 1 for x in (query, key, value)):
        return False
    if query.dtype == torch.float32:
        return query.shape[1] == key.shape[1] and dims[0] % 4 == 0 and dims[1] % 4 == 0
    return dims[0] == dims[1] and dims[0] % 8 == 0


def _flex(*arguments: Tensor | float | None) -> Tensor:
    """:func:`_flex_attention` compiled: a length becomes dynamic when it changes, a number never."""
    if torch.compiler.is_compiling():
        return _flex_attention(*arguments)  # type: ignore[arg-type]  # the same arguments, one by one
    with torch._dynamo.config.patch(recompile_limit=_MOST_COMPILATIONS, specialize_float=True):
        return _compiled_flex()(*arguments)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(_flex_attention, fullgraph=True)  # uncompiled, FlexAttention writes out T x N scores


def _flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    query_scale: Tensor | None,
    alibi_slopes: Tensor | None,
    scaling: float,
) -> Tensor:
    first, last = (x.expand(query.shape[0], -1).contiguous() for x in (first, last))
    factor = None
    if query_scale is not None:
        query, factor = _split_scale(query, query_scale.to(torch.float32))
    slopes = None if alibi_slopes is None else alibi_slopes.to(torch.float32)

    def modified(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if factor is not None:
            score = score * factor[b, h, i]
        if slopes is not None:  # measured from the row's last key: a constant per row changes nothing
            score = score + slopes[h] * (j - (last[b, i] - 1))
        return score

    out: Tensor = flex_attention(
        query,
        key,
        value,
        score_mod=modified,
        block_mask=_block_mask(first, last, key.shape[2]),
        scale=scaling,
        enable_gqa=True,
    )
    return out


def _split_scale(query: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``scale = factor * 2^e`` with e <= 0 and |factor| >= 1/2: the query times 2^e, exact in any dtype, and the factor
    (B, H, T), a constant, with which FlexAttention multiplies the scores.

    The gradient of ``scale`` needs none from FlexAttention, which would add up one atomically for every score: the
    query's is ``dq = factor * sum_j ds_j scaling k_j``, and the division by the factor in ``scale / factor`` takes it
    out again: ``dscale = <q, dq> / factor``, at any scale. At 0 the factor is 1.
    """
    factor = scale.detach()
    factor = torch.where(factor.abs() < 1.0, torch.frexp(factor).mantissa, factor)
    factor = factor.masked_fill(factor == 0.0, 1.0)
    return (query * (scale / factor)[..., None]).to(query.dtype), factor


def _block_mask(first: Tensor, last: Tensor, kv_length: int) -> BlockMask:
    """The blocks that hold a visible key, those that hold no other ("full") apart. first, last: int32 (B, T)."""
    length, device = first.shape[1], first.device
    start, rows = (torch.arange(0, n, _BLOCK, device=device) for n in (kv_length, length))
    rows = rows[:, None] + torch.arange(_BLOCK, device=device)
    low, high = (x[:, None, rows.clamp(max=length - 1)] for x in (first, last))  # (B, 1, query blocks, 128)
    unseen = (rows >= length) | (low >= high)
    low, high = low.masked_fill(unseen, _NEVER), high.masked_fill(unseen, 0)
    stop = start + _BLOCK
    seen = (low.amin(-1, keepdim=True) < stop) & (high.amax(-1, keepdim=True) > start)
    full = (low.amax(-1, keepdim=True) <= start) & (high.amin(-1, keepdim=True) >= stop)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (first[b, i] <= j) & (j < last[b, i])

    return BlockMask.from_kv_blocks(
        *_listed(seen & ~full), *_listed(full), BLOCK_SIZE=_BLOCK, mask_mod=visible, seq_lengths=(length, kv_length)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are marked, and their numbers before all others, int32."""
    marked = blocks.to(torch.int32)
    order = torch.argsort(marked, dim=-1, descending=True, stable=True)
    return marked.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()
