"""The public operations :func:`entmax` and :func:`entmax_attention`: they check, then call the operators."""

from __future__ import annotations

import torch
from torch import Tensor

from .intervals import key_intervals
from .operators import attend, call
from .softmax import fused_softmax_attention, is_fused

MIN_ALPHA, MAX_ALPHA = 1.0, 2.0


def check_alpha(alpha: float | Tensor, name: str = "alpha") -> tuple[Tensor | None, float]:
    """``(tensor, float)`` of an alpha, one of which carries it. The values of a tensor on a GPU are not read."""
    if isinstance(alpha, Tensor):
        if not alpha.is_floating_point():
            raise TypeError(f"{name} must be a floating point tensor, got {alpha.dtype}; pass float32")
        hidden = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()  # values can't be read
        if alpha.device.type == "cpu" and not hidden:
            outside = (alpha < MIN_ALPHA) | (alpha > MAX_ALPHA) | alpha.isnan()
            if bool(outside.any()):
                raise ValueError(_alpha_rule(name, alpha.detach().tolist()))
        return alpha, 0.0
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"{name} must be a float or a tensor, got {type(alpha).__name__}; pass for example 1.5")
    if not MIN_ALPHA <= alpha <= MAX_ALPHA:
        raise ValueError(_alpha_rule(name, alpha))
    return None, float(alpha)


def _alpha_rule(name: str, value: object) -> str:
    return (
        f"{name} must be between {MIN_ALPHA} (softmax) and {MAX_ALPHA} (sparsemax), got {value!r}; "
        "use 1.5 unless there is a reason not to"
    )


def entmax(scores: Tensor, *, alpha: float | Tensor = 1.5, dim: int = -1) -> Tensor:
    """The alpha-entmax map ``p_j = [(alpha - 1) s_j - tau]_+ ^ (1 / (alpha - 1))`` with tau such that p sums to 1.

    Exact for every alpha in [1, 2]: 1 is softmax, 2 is sparsemax. Differentiable in ``scores`` and in a tensor
    ``alpha``, with analytic gradients; computed in float32 (float64 for float64 scores).

    Args:
        scores: any shape, floating point. -inf marks an entry that must get 0; a row of -inf only gives zeros.
        alpha: a float, or a tensor that broadcasts to the shape of ``scores`` with 1 at ``dim``: one value a row.
        dim: the dimension that sums to 1.

    Returns:
        Weights of the shape and dtype of ``scores``, exact zeros off the support.

    Raises:
        TypeError: scores or alpha are not floating point.
        ValueError: alpha lies outside [1, 2] or doesn't broadcast.

    Reference: arXiv 1905.05702, eq. 10; gradients arXiv 1909.00015, propositions 1 and 2.
    """
    if not scores.is_floating_point():
        raise TypeError(f"scores must be a floating point tensor, got {scores.dtype}; cast them to float32")
    if scores.dim() == 0 or not -scores.dim() <= dim < scores.dim():
        raise ValueError(f"dim must index a dimension of scores {tuple(scores.shape)}, got {dim}; use -1 for the last")
    tensor, value = check_alpha(alpha)
    if scores.numel() == 0:
        return scores.clone()
    if tensor is not None and tensor.dim():
        rows = list(scores.shape)
        rows[dim] = 1
        try:
            tensor = tensor.expand(rows).movedim(dim, -1)
        except RuntimeError as error:
            raise ValueError(
                f"alpha must have shape () or broadcast to {tuple(rows)}, got {tuple(tensor.shape)}; "
                "it holds one value a row"
            ) from error
    p: Tensor = call("entmax")(scores.movedim(dim, -1), tensor, value)
    return p.movedim(-1, dim)


def _check_rows(name: str, x: Tensor | None, batch: int) -> None:
    if x is not None and (not _is_integer_tensor(x) or tuple(x.shape) != (batch,)):
        raise ValueError(f"{name} must be an integer tensor of shape ({batch},), one entry a row, got {_kind(x)}")


def _is_integer_tensor(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def _kind(x: object) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)


def check_tensors(
    query: Tensor, key: Tensor, value: Tensor, query_scale: Tensor | None, alibi_slopes: Tensor | None
) -> None:
    """Raises TypeError or ValueError unless these are the tensors that :func:`entmax_attention` describes."""
    for name, x in (
        ("query", query),
        ("key", key),
        ("value", value),
        ("query_scale", query_scale),
        ("alibi_slopes", alibi_slopes),
    ):
        if not isinstance(x, Tensor) and not (x is None and name in ("query_scale", "alibi_slopes")):
            raise TypeError(f"{name} must be a tensor, got {x!r}")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise ValueError(f"{name} must have shape (batch, heads, tokens, head dim), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}; cast it to float32 or bfloat16")
        if x.dtype != query.dtype or x.device != query.device:
            raise ValueError(
                f"{name} must have the dtype and device of query ({query.dtype} on {query.device}), "
                f"got {x.dtype} on {x.device}"
            )
    batch, heads, tokens, dim = query.shape
    if key.shape[0] != batch or key.shape[3] != dim or key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(
            f"key must have shape ({batch}, a divisor of {heads}, tokens, {dim}) to go with "
            f"query {tuple(query.shape)}, got {tuple(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value must have shape {tuple(key.shape[:3])} + (dim,) as key has, got {tuple(value.shape)}")
    if query_scale is not None and (
        tuple(query_scale.shape) != (batch, heads, tokens) or query_scale.dtype not in (torch.float32, torch.float64)
    ):
        raise ValueError(
            f"query_scale must be float32 of shape (batch, heads, tokens) = {(batch, heads, tokens)}, "
            f"got {query_scale.dtype} {tuple(query_scale.shape)}"
        )
    if alibi_slopes is not None and tuple(alibi_slopes.shape) != (heads,):
        raise ValueError(f"alibi_slopes must have shape (heads,) = ({heads},), got {tuple(alibi_slopes.shape)}")
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise ValueError("alibi_slopes must not require a gradient: slopes are constants; detach them")


def attention_from_intervals(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    *,
    alpha: float | Tensor,
    scaling: float | None = None,
    query_scale: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    """:func:`entmax_attention` for queries whose visible keys are given as int32 intervals (B or 1, T).

    ``is_causal`` repeats what a caller knows of the intervals, so that a GPU's softmax (alpha the float 1.0) need not
    read them: True if T = N and query i sees the keys up to i, False if every query sees every key, None otherwise.
    """
    tensor, alpha_value = check_alpha(alpha)
    if tensor is not None and tuple(tensor.shape) not in ((), (query.shape[1],)):
        raise ValueError(f"alpha must be a float or have shape () or ({query.shape[1]},), got {tuple(tensor.shape)}")
    check_tensors(query, key, value, query_scale, alibi_slopes)
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    softmax = tensor is None and alpha_value == 1.0 and query_scale is None and alibi_slopes is None
    if softmax and is_causal is not None and query.is_cuda and is_fused(query, key, value):
        return fused_softmax_attention(query, key, value, scaling=scaling, is_causal=is_causal)
    return attend(query, key, value, first, last, query_scale, alibi_slopes, tensor, alpha_value, scaling)


def entmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    alpha: float | Tensor = 1.5,
    scaling: float | None = None,
    query_scale: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    is_causal: bool = True,
    window: int | None = None,
    query_offset: int | Tensor | None = None,
    key_start: Tensor | None = None,
    key_length: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Attention with alpha-entmax weights: ``out_i = sum_j p_ij v_j``, p_i = entmax_alpha(s_i),
    ``s_ij = scaling * query_scale_i * <q_i, k_j> - slope * (i - j)``, over the keys j that query i may see.

    Query i stands at key position ``query_offset + i``. A query that may see no key gives zeros, in the output and in
    every gradient. Memory is O(T + N), never O(T N). Gradients: query, key, value, query_scale, a tensor alpha.

    Args:
        query: (B, H, T, D), floating point.
        key: (B, H_kv, N, D), H a multiple of H_kv (grouped-query attention).
        value: (B, H_kv, N, D_v).
        alpha: a float in [1, 2] (1 is softmax), or a tensor of shape () or (H,) that may require a gradient.
        scaling: factor of the products, D^-0.5 by default.
        query_scale: float32 (B, H, T), factor of each query's scores.
        alibi_slopes: (H,), not negative, 0 for a head without a bias; needs ``is_causal``.
        is_causal: query i sees no key after its own position.
        window: query i sees the keys j with ``0 <= i - j < window``; needs ``is_causal``.
        query_offset: position of the first query: an int, or an integer tensor of shape () or (B,). By default the
            last query stands at the last key.
        key_start: integer (B,), first key of each row that is not padding.
        key_length: integer (B,), number of keys from ``key_start`` on that are not padding.
        cu_seqlens: integer (documents + 1,), bounds of documents packed in one row: B = 1, T = N, from 0 to N.

    Returns:
        (B, H, T, D_v) in the dtype of ``query``.

    Raises:
        ValueError, TypeError: a shape, dtype or value is wrong, or a combination isn't handled; the message says which.

    Reference: arXiv 2506.16640 (ASEntmax), arXiv 2108.12409 (ALiBi).
    """
    first, last, plain = checked_intervals(
        query,
        key,
        value,
        query_scale,
        alibi_slopes,
        is_causal=is_causal,
        window=window,
        query_offset=query_offset,
        key_start=key_start,
        key_length=key_length,
        cu_seqlens=cu_seqlens,
    )
    return attention_from_intervals(
        query,
        key,
        value,
        first,
        last,
        alpha=alpha,
        scaling=scaling,
        query_scale=query_scale,
        alibi_slopes=alibi_slopes,
        is_causal=plain,
    )


def checked_intervals(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_scale: Tensor | None,
    alibi_slopes: Tensor | None,
    *,
    is_causal: bool = True,
    window: int | None = None,
    query_offset: int | Tensor | None = None,
    key_start: Tensor | None = None,
    key_length: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, bool | None]:
    """The intervals of keys that the queries of :func:`entmax_attention` see, its arguments checked, and what these
    alone tell of the intervals: the ``is_causal`` of :func:`attention_from_intervals`."""
    check_tensors(query, key, value, query_scale, alibi_slopes)
    readable = alibi_slopes is not None and alibi_slopes.device.type == "cpu" and not torch.compiler.is_compiling()
    if alibi_slopes is not None and readable and bool((alibi_slopes < 0).any()):
        raise ValueError(f"alibi_slopes must not be negative, got {alibi_slopes.tolist()}; distance lowers a score")
    batch, q_length, kv_length = query.shape[0], query.shape[2], key.shape[2]
    if not is_causal and (window is not None or alibi_slopes is not None):
        raise ValueError("window and alibi_slopes must go with is_causal=True, got is_causal=False; leave them out")
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise ValueError(f"window must be a positive int or None, got {window!r}")
    if isinstance(query_offset, Tensor):
        if not _is_integer_tensor(query_offset) or tuple(query_offset.shape) not in ((), (1,), (batch,)):
            raise ValueError(
                f"query_offset must be an int or an integer tensor of shape () or ({batch},), got {_kind(query_offset)}"
            )
    elif query_offset is None and is_causal and q_length > kv_length:
        raise ValueError(f"key must have at least as many tokens as query ({q_length}), got {kv_length}")
    elif query_offset is not None and (
        not isinstance(query_offset, int) or isinstance(query_offset, bool) or query_offset < 0
    ):
        raise ValueError(f"query_offset must be an int of at least 0 or an integer tensor, got {query_offset!r}")
    _check_rows("key_start", key_start, batch)
    _check_rows("key_length", key_length, batch)
    if cu_seqlens is not None:
        if batch != 1 or q_length != kv_length or query_offset is not None or key_start is not None:
            raise ValueError(
                "cu_seqlens must go with one row (B = 1), T = N and no query_offset or key_start, "
                f"got B = {batch}, T = {q_length}, N = {kv_length}; flatten the documents into one row"
            )
        if key_length is not None:
            raise ValueError(
                "cu_seqlens must go without key_length, got both; end the last document where the tokens end"
            )
        check_documents(cu_seqlens, kv_length)
    first, last = key_intervals(
        q_length,
        kv_length,
        is_causal=is_causal,
        window=window,
        query_offset=query_offset,
        key_start=key_start,
        key_length=key_length,
        cu_seqlens=cu_seqlens,
        device=query.device,
    )
    if any(x is not None for x in (window, query_offset, key_start, key_length, cu_seqlens)):
        return first, last, None
    full = not is_causal or q_length == 1
    return first, last, False if full else True if q_length == kv_length else None


def check_documents(cu_seqlens: Tensor, length: int) -> None:
    """Raises ValueError unless the bounds of packed documents rise from 0 to ``length``. Reads their values."""
    if not _is_integer_tensor(cu_seqlens) or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must be an integer tensor of shape (documents + 1,), got {_kind(cu_seqlens)}")
    if torch.compiler.is_compiling():
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(b < a for a, b in zip(bounds, bounds[1:], strict=False)):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens {length}, got {bounds}")
