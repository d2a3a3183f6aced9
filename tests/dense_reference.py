"""Entmax attention the slow way, in float64: an explicit T x N mask, the `entmax` package, and autograd through it.

Written from the definitions alone; it shares no code with the package.
"""

from __future__ import annotations

from typing import Any

import torch
from entmax import entmax15, entmax_bisect, sparsemax
from torch import Tensor


def dense_entmax(scores: Tensor, alpha: float | Tensor) -> Tensor:
    """The map over the last dimension by the `entmax` package; -inf hides an entry, a row of -inf only gives zeros."""
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(dead, 0.0)
    if isinstance(alpha, Tensor):
        p = entmax_bisect(scores, alpha, dim=-1, n_iter=70)
    elif alpha == 1.0:
        p = scores.softmax(-1)
    elif alpha == 1.5:
        p = entmax15(scores, dim=-1)
    elif alpha == 2.0:
        p = sparsemax(scores, dim=-1)
    else:
        p = entmax_bisect(scores, alpha, dim=-1, n_iter=70)
    return p.masked_fill(dead, 0.0)


def visible_keys(
    batch: int,
    q_length: int,
    kv_length: int,
    *,
    is_causal: bool = True,
    window: int | None = None,
    query_offset: int | Tensor | None = None,
    key_start: Tensor | None = None,
    key_length: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """bool (B, T, N): True where the query may see the key, each rule on its own."""
    offset = torch.as_tensor(kv_length - q_length if query_offset is None else query_offset).reshape(-1, 1, 1)
    i = torch.arange(q_length)[None, :, None] + offset
    j = torch.arange(kv_length)[None, None, :]
    mask = torch.ones(batch, q_length, kv_length, dtype=torch.bool)
    if is_causal:
        mask = mask & (j <= i)
    if window is not None:
        mask = mask & (i - j < window)
    if key_start is not None:
        mask = mask & (j >= key_start[:, None, None])
    if key_length is not None:
        start = torch.zeros_like(key_length) if key_start is None else key_start
        mask = mask & (j < (start + key_length)[:, None, None])
    if cu_seqlens is not None:
        document = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff())
        mask = mask & (document[:, None] == document[None, :])
    return mask


def dense_scores(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float | None = None,
    query_scale: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    query_offset: int | Tensor | None = None,
    **rules: object,
) -> Tensor:
    """float64 (B, H, T, N): the scores of `entmax_attention`, -inf where the query may not see the key."""
    batch, heads, q_length, dim = query.shape
    kv_length = key.shape[2]
    keys = key.double().repeat_interleave(heads // key.shape[1], dim=1)
    scores = torch.einsum("bhid,bhjd->bhij", query.double(), keys) * (dim**-0.5 if scaling is None else scaling)
    if query_scale is not None:
        scores = scores * query_scale.double()[..., None]
    if alibi_slopes is not None:
        offset = torch.as_tensor(kv_length - q_length if query_offset is None else query_offset).reshape(-1, 1, 1, 1)
        distance = torch.arange(q_length)[:, None] + offset - torch.arange(kv_length)
        scores = scores - alibi_slopes.double()[:, None, None] * distance
    mask = visible_keys(batch, q_length, kv_length, query_offset=query_offset, **rules)  # type: ignore[arg-type]
    return scores.masked_fill(~mask[:, None], -torch.inf)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, *, alpha: float | Tensor = 1.5, **options: Any
) -> Tensor:
    """`entmax_attention` with every intermediate written out, in float64 whatever the dtype of the arguments."""
    values = value.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    if isinstance(alpha, Tensor):
        alpha = alpha.double().reshape(-1, 1, 1)
    return dense_entmax(dense_scores(query, key, **options), alpha) @ values
