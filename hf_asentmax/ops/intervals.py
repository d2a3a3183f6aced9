"""Which keys a query may see, as one interval a query: ``first[b, i] <= j < last[b, i]``.

Causality, sliding windows, left and right padding, packed documents, query offsets of a cache and any combination of
them leave every query one contiguous run of keys. So a mask of T x N entries is never needed: two integers a query say
the same, and ``n_i = last - first`` is the number of keys that query i really may attend to.
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_starts(cu_seqlens: Tensor, positions: Tensor) -> Tensor:
    """The first index of the document that holds each of ``positions`` (integer), from its (documents + 1,) bounds."""
    document = torch.bucketize(positions, cu_seqlens[1:-1].to(positions.dtype), right=True)
    return cu_seqlens[document].to(positions.dtype)


def key_intervals(
    q_length: int,
    kv_length: int,
    *,
    is_causal: bool = True,
    window: int | None = None,
    query_offset: int | Tensor | None = None,
    key_start: Tensor | None = None,
    key_length: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """``first`` and ``last``, int32 (B or 1, T), of the keys that each query may see. The arguments are those of
    :func:`hf_asentmax.entmax_attention`, which checks them; nothing here reads a tensor's value."""
    if is_causal and all(x is None for x in (window, query_offset, key_start, key_length, cu_seqlens)):
        last = torch.arange(kv_length - q_length + 1, kv_length + 1, dtype=torch.int32, device=device)[None]
        return torch.zeros_like(last), last
    offset = kv_length - q_length if query_offset is None else query_offset
    if isinstance(offset, Tensor):
        offset = offset.reshape(-1, 1).to(device)
    i = torch.arange(q_length, device=device)[None, :] + offset
    first = torch.zeros_like(i)
    last = (i + 1).clamp(max=kv_length) if is_causal else torch.full_like(i, kv_length)
    if window is not None:
        first = torch.maximum(first, i - window + 1)
    if cu_seqlens is not None:
        starts = document_starts(cu_seqlens, i)
        first = torch.maximum(first, starts)
        if not is_causal:
            ends = torch.bucketize(i, cu_seqlens[1:-1].to(i.dtype), right=True) + 1
            last = torch.minimum(last, cu_seqlens[ends].to(i.dtype))
    if key_start is not None:
        first = torch.maximum(first, key_start[:, None].to(i))
    if key_length is not None:
        end = key_length.to(i) if key_start is None else key_start.to(i) + key_length.to(i)  # not in the caller's dtype
        last = torch.minimum(last, end[:, None])
    return tuple(x.to(torch.int32).contiguous() for x in torch.broadcast_tensors(first, last))
