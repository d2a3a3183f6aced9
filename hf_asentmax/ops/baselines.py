"""What ASEntmax is compared with and no fused kernel computes: top-k softmax and adaptive temperature.

In the row chunks of ``reference.py`` on every device: beyond inputs and outputs, memory is a handful of one chunk's
scores, never O(T N). Scores, weights and sums are float32 for inputs of at most 32 bits and float64 for float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from . import reference
from .attention import check_tensors, checked_intervals
from .operators import call, define

if TYPE_CHECKING:
    from typing_extensions import Unpack

_POLYNOMIAL = (-0.037, 0.481, -2.3, 4.917, -1.791)  # of the entropy in nats, highest power first
_LEAST_ENTROPY = 0.5  # at most this, and the scores stay as they are


class Masks(TypedDict, total=False):
    """Which keys a query may see: the arguments of :func:`hf_asentmax.entmax_attention` by these names."""

    is_causal: bool
    window: int | None
    query_offset: int | Tensor | None
    key_start: Tensor | None
    key_length: Tensor | None
    cu_seqlens: Tensor | None


def topk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    k: int,
    scaling: float | None = None,
    query_scale: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    **masks: Unpack[Masks],
) -> Tensor:
    """Attention with ``p_i = softmax(s_i)`` over the k largest scores of query i, exactly 0 elsewhere:
    ``s_ij = scaling * query_scale_i * <q_i, k_j> - slope * (i - j)``, over the keys j that query i may see.

    Of equal scores the first keys are taken. A query that sees at most k keys attends to all of them, one that sees
    none gives zeros. Gradients, with the selection held fixed: query, key, value, query_scale. Deterministic as far as
    PyTorch's matrix product is.

    Args:
        k: how many keys a query attends to, at least 1.

    The other arguments are those of :func:`hf_asentmax.entmax_attention`.

    Returns:
        (B, H, T, D_v) in the dtype of ``query``.

    Raises:
        ValueError, TypeError: as :func:`hf_asentmax.entmax_attention` does, or k is no positive int.
    """
    first, last, _ = checked_intervals(query, key, value, query_scale, alibi_slopes, **masks)
    return topk_from_intervals(
        query, key, value, first, last, k=k, scaling=scaling, query_scale=query_scale, alibi_slopes=alibi_slopes
    )


def topk_from_intervals(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    *,
    k: int,
    scaling: float | None = None,
    query_scale: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """:func:`topk_attention` for queries whose visible keys are int32 intervals (B or 1, T)."""
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k must be a positive int, got {k!r}; it is the number of keys that a query attends to")
    check_tensors(query, key, value, query_scale, alibi_slopes)
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out: Tensor = call("topk_attention")(query, key, value, first, last, query_scale, alibi_slopes, k, scaling)
    return out


def adaptive_temperature_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None = None,
    query_scale: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    **masks: Unpack[Masks],
) -> Tensor:
    """Softmax attention whose scores are sharpened where they are spread out, ``p_i = softmax(b(H_i) s_i)``: H_i is the
    entropy of ``softmax(s_i)`` in nats, ``b(H) = max(1, poly(H))`` where H > 0.5, else 1, and
    ``poly(H) = -0.037 H^4 + 0.481 H^3 - 2.3 H^2 + 4.917 H - 1.791``. s_i is that of :func:`topk_attention`.

    For inference only: the factor was fitted to trained softmax models and is not meant to be learned through. A query
    that sees no key gives zeros.

    The arguments are those of :func:`hf_asentmax.entmax_attention`.

    Returns:
        (B, H, T, D_v) in the dtype of ``query``, without a gradient.

    Raises:
        RuntimeError: a gradient is on and one of the tensors requires it.
        ValueError, TypeError: as :func:`hf_asentmax.entmax_attention` does.

    Reference: arXiv 2410.01104 (adaptive temperature).
    """
    first, last, _ = checked_intervals(query, key, value, query_scale, alibi_slopes, **masks)
    return adaptive_temperature_from_intervals(
        query, key, value, first, last, scaling=scaling, query_scale=query_scale, alibi_slopes=alibi_slopes
    )


def adaptive_temperature_from_intervals(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    *,
    scaling: float | None = None,
    query_scale: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """:func:`adaptive_temperature_attention` for queries whose visible keys are int32 intervals (B or 1, T)."""
    check_tensors(query, key, value, query_scale, alibi_slopes)
    names = ("query", "key", "value", "query_scale")
    tensors = (query, key, value, query_scale)
    asked = [name for name, x in zip(names, tensors, strict=True) if x is not None and x.requires_grad]
    if asked and torch.is_grad_enabled():
        raise RuntimeError(
            f"adaptive temperature must be used without a gradient, got {asked} that require one; "
            "call it under torch.no_grad()"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out: Tensor = call("adaptive_temperature_attention")(
        query, key, value, first, last, query_scale, alibi_slopes, scaling
    )
    return out


def _plain_softmax(scores: Tensor) -> Tensor:
    """Over the last dimension; a row of -inf only gives zeros."""
    return reference._weights(scores - reference._finite_max(scores), 1.0)[0]


def topk_softmax(scores: Tensor, k: int) -> Tensor:
    """Over the k largest of each row, of equals the first ones. Overwrites ``scores``."""
    if k < scores.shape[-1]:
        least = scores.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        ties = scores == least
        room = k - (scores > least).sum(-1, keepdim=True, dtype=torch.int32)
        ties &= ties.cumsum(-1, dtype=torch.int32) > room  # the ties that find no room
        scores.masked_fill_(ties.logical_or_(scores < least), -torch.inf)
    return _plain_softmax(scores)


def tempered_softmax(scores: Tensor) -> Tensor:
    entropy = torch.special.entr(_plain_softmax(scores)).sum(-1, keepdim=True)
    factor = torch.zeros_like(entropy)
    for coefficient in _POLYNOMIAL:
        factor = factor * entropy + coefficient
    return _plain_softmax(scores * torch.where(entropy > _LEAST_ENTROPY, factor.clamp_min(1.0), 1.0))


def _row_chunks(query: Tensor, key: Tensor, first: Tensor, last: Tensor) -> Iterator[reference._Rows]:
    for rows, keys in reference._chunks(first, last, query.shape[0], query.shape[1]):
        if keys.start < keys.stop:
            yield reference._Rows(query, key, first, last, rows, keys)


@reference.without_autocast
def _attend(
    weights: Callable[[Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    query_scale: Tensor | None,
    alibi_slopes: Tensor | None,
    scaling: float,
) -> Tensor:
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    for chunk in _row_chunks(query, key, first, last):
        p = weights(chunk.scores(query_scale, alibi_slopes, scaling))
        mean = chunk.fold(p) @ value[:, :, chunk.keys].to(p.dtype)
        out[:, :, chunk.rows] = chunk.unfold(mean).to(out.dtype)
    return out


def _adaptive_temperature(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    query_scale: Tensor | None,
    alibi_slopes: Tensor | None,
    scaling: float,
) -> Tensor:
    return _attend(tempered_softmax, query, key, value, first, last, query_scale, alibi_slopes, scaling)


def _topk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    query_scale: Tensor | None,
    alibi_slopes: Tensor | None,
    k: int,
    scaling: float,
) -> Tensor:
    return _attend(
        lambda scores: topk_softmax(scores, k), query, key, value, first, last, query_scale, alibi_slopes, scaling
    )


@reference.without_autocast
def _topk_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    query_scale: Tensor | None,
    alibi_slopes: Tensor | None,
    k: int,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and query_scale (empty if there is none): ``ds_j = p_j (dp_j - sum(p dp))``."""
    dtype = reference.compute_dtype(query.dtype)
    dq = torch.zeros_like(query)
    dk, dv = torch.zeros_like(key, dtype=dtype), torch.zeros_like(value, dtype=dtype)
    dr = query.new_empty(0) if query_scale is None else torch.zeros_like(query_scale)
    for chunk in _row_chunks(query, key, first, last):
        rows, keys = chunk.rows, chunk.keys
        p = topk_softmax(chunk.scores(query_scale, alibi_slopes, scaling), k)
        grad = chunk.fold(grad_out[:, :, rows].to(dtype))
        dv[:, :, keys] += chunk.fold(p).transpose(-1, -2) @ grad
        ds = chunk.unfold(grad @ value[:, :, keys].to(dtype).transpose(-1, -2))
        ds = ds.sub_((p * ds).sum(-1, keepdim=True)).mul_(p).mul_(scaling)
        dq_rows = chunk.unfold(chunk.fold(ds) @ chunk.key)
        if query_scale is not None:
            dr[:, :, rows] = (dq_rows * query[:, :, rows].to(dtype)).sum(-1).to(dr.dtype)
            scale = query_scale[:, :, rows, None].to(dtype)
            dq_rows, ds = dq_rows.mul_(scale), ds.mul_(scale)
        dq[:, :, rows] = dq_rows.to(dq.dtype)
        dk[:, :, keys] += chunk.fold(ds).transpose(-1, -2) @ chunk.query
    return dq, dk.to(key.dtype), dv.to(value.dtype), dr


def _out_fake(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[-1])


def _topk_backward_fake(
    _: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dr = torch.empty_like(rest[2]) if isinstance(rest[2], Tensor) else query.new_empty(0)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), dr


def _topk_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.k, ctx.scaling = inputs
    ctx.save_for_backward(*tensors)


def _topk_autograd(ctx, grad_out):  # type: ignore[no-untyped-def]
    dq, dk, dv, dr = call("topk_attention_backward")(grad_out, *ctx.saved_tensors, ctx.k, ctx.scaling)
    has_scale = ctx.saved_tensors[5] is not None
    return dq, dk, dv, None, None, dr if has_scale else None, None, None, None


define("topk_attention_backward", _topk_backward, _topk_backward_fake)
define("topk_attention", _topk, _out_fake, _topk_autograd, _topk_context)
define("adaptive_temperature_attention", _adaptive_temperature, _out_fake)
