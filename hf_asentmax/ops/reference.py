"""alpha-entmax and alpha-entmax attention in plain PyTorch: exact, in row chunks, with analytic gradients.

Write ``e = alpha - 1``, ``u_j = s_j - max(s)`` and ``x_j = u_j - t``. The map is

    p_j = [1 + e x_j]_+ ^ (1/e)        with t the unique root of  sum_j p_j = 1,

which is ``p_j = [(alpha-1) s_j - tau]_+^(1/(alpha-1))`` (arXiv 1905.05702, eq. 10) with ``tau = e (max(s) + t) - 1``.
Written so, ``log p_j = log1p(e x_j) / e`` loses nothing as alpha tends to 1, where it becomes softmax with t the log of
the partition sum. ``t`` lies in ``[0, log n]``.

With ``g_j = p_j^(2-alpha)`` on the support, the gradients are (arXiv 1909.00015, propositions 1 and 2)

    ds_j     = g_j (dp_j - c)                   c = sum(g dp) / sum(g)
    dalpha   = sum_j (dp_j - c) p_j phi_j       phi = (1 + a - exp(a)) / e^2,  a = -e log p_j

where the second is the paper's formula with its two cancelling terms collected: accurate down to alpha = 1.

Scores, thresholds and sums are float32 for inputs of at most 32 bits and float64 for float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Alpha = float | Tensor  # a float, or a tensor that broadcasts against (..., rows, 1)

_MAX_NEWTON_STEPS = 200  # quadratic in practice (5 to 12 steps); the bound only guards against NaN input
_SMALLEST_ALPHA_MINUS_ONE = 1e-6  # a tensor alpha of exactly 1 is softmax to rounding
# Scores held at once, a handful of such buffers alive. On a CPU 1 MiB of float32, which stays in its cache: three times
# faster than 32 MiB at 1,024 tokens. On a GPU 256 MiB, so that launches don't dominate.
_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scores and sums of inputs of ``dtype`` are held: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


Function = TypeVar("Function", bound=Callable[..., Any])


def without_autocast(function: Function) -> Function:
    """The function with its products in the dtype of their factors: autocast would make them 16-bit ones, scores and
    sums of float32 too."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


def _exponent(alpha: Alpha) -> Alpha:
    return alpha - 1.0 if isinstance(alpha, float) else (alpha - 1.0).clamp_min(_SMALLEST_ALPHA_MINUS_ONE)


def _map(x: Tensor, alpha: Alpha) -> tuple[Tensor, Tensor]:
    """p and its slopes ``g = p^(2-alpha)``, zero off the support, from ``x = s - max(s) - t``."""
    if isinstance(alpha, float) and alpha == 1.0:
        p = x.exp()
        return p, p
    if isinstance(alpha, float) and alpha == 1.5:
        w = (1.0 + 0.5 * x).clamp_min_(0.0)
        return w * w, w
    if isinstance(alpha, float) and alpha == 2.0:
        w = (1.0 + x).clamp_min_(0.0)
        return w, (w > 0).to(w.dtype)
    y = _exponent(alpha) * x
    outside = y <= -1.0
    y.masked_fill_(outside, 0.0)
    p = (y.log1p() / _exponent(alpha)).exp_().masked_fill_(outside, 0.0)
    return p, p / y.add_(1.0)


def _sums(u: Tensor, t: Tensor, alpha: Alpha) -> tuple[Tensor, Tensor]:
    """Row sums of p and g at the threshold t; for alpha = 1.5 in fewer passes."""
    if isinstance(alpha, float) and alpha == 1.5:
        w = torch.add(1.0 - 0.5 * t, u, alpha=0.5).clamp_min_(0.0)
        slope = w.sum(-1, keepdim=True)
        return w.square_().sum(-1, keepdim=True), slope
    p, g = _map(u - t, alpha)
    return p.sum(-1, keepdim=True), g.sum(-1, keepdim=True)


def _weights(x: Tensor, alpha: Alpha) -> tuple[Tensor, Tensor]:
    """p and g of whole rows, scaled to a mass of exactly 1: that takes out the rounding of t, which all weights of a
    row share and which would cost 4e-4 of the mass over 262,144 equal keys in float32."""
    p, g = _map(x, alpha)
    mass = p.sum(-1, keepdim=True)
    mass = mass.masked_fill_(mass == 0, 1.0)
    if p is g:
        p = g = p.div_(mass)
    else:
        p, g = p.div_(mass), g.div_(mass.pow(1.0 - _exponent(alpha)))
    return p, g


def _threshold(u: Tensor, alpha: Alpha) -> Tensor:
    """The root t of ``sum_j p_j = 1`` for ``u = s - max(s)``, (..., n) -> (..., 1); any value for a row of -inf only.

    Newton on the 1/e-norm of ``[1 + e (u - t)]_+`` from t = 0. The norm is convex and decreasing in t, so no step
    overshoots, and it is linear where all supported scores are equal, so few steps are needed for any alpha (one, for
    alpha = 1).
    """
    if isinstance(alpha, float) and alpha == 1.0:
        return u.exp().sum(-1, keepdim=True).log_().clamp_min_(0.0)
    e = _exponent(alpha)
    tiny = torch.finfo(u.dtype).tiny ** 0.5
    t = torch.zeros_like(u[..., :1])
    for _ in range(_MAX_NEWTON_STEPS):
        mass, slope = _sums(u, t, alpha)
        step = -torch.expm1(-e * mass.clamp_min(tiny).log()) / e * (mass / slope.clamp_min(tiny))
        t = t + step.clamp_min(0.0)
        if not bool((step > 2 * torch.finfo(u.dtype).eps * t.clamp_min(1.0)).any()):
            break
    return t


def _alpha_slope(p: Tensor, g: Tensor, alpha: Alpha) -> Tensor:
    """``p_j phi_j``: the derivative of p_j with respect to alpha at a fixed threshold t."""
    e = _exponent(alpha)
    a = (-e * p.clamp_min(torch.finfo(p.dtype).tiny).log()).clamp_min_(0.0)
    series = torch.full_like(a, 1.0 / 16)
    for k in range(15, 2, -1):  # (exp(a) - 1 - a) / (a^2 / 2) by Horner: exact to rounding for a < 1/2
        series = 1.0 / k + (a / k) * series if k == 15 else (1.0 + a * series) / k
    near = p * a * a * 0.5 * (1.0 + a * series)
    far = g - p * (1.0 + a)
    return -torch.where(a < 0.5, near, far) / e**2


def entmax_forward(scores: Tensor, alpha: Alpha) -> Tensor:
    """alpha-entmax over the last dimension. (..., n) -> (..., n), same dtype; a row of -inf only gives zeros."""
    s = scores.to(compute_dtype(scores.dtype))
    u = s - _finite_max(s)
    p, _ = _weights(u - _threshold(u, alpha), alpha)
    return p.to(scores.dtype)


def entmax_backward(grad: Tensor, p: Tensor, alpha: Alpha, alpha_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of :func:`entmax_forward` from its output: d scores (..., n), and d alpha (..., 1) if asked for."""
    dtype = compute_dtype(p.dtype)
    dp, weights = grad.to(dtype), p.to(dtype)
    exponent = 1.0 - _exponent(alpha)
    g = weights.pow(exponent).masked_fill_(weights <= 0, 0.0)
    centred = dp - _ratio((g * dp).sum(-1, keepdim=True), g.sum(-1, keepdim=True))
    dalpha = (_alpha_slope(weights, g, alpha) * centred).sum(-1, keepdim=True) if alpha_grad else None
    return (g * centred).to(p.dtype), dalpha


def _finite_max(s: Tensor) -> Tensor:
    """Row maximum, 0 where the row has no key, so that ``-inf - max`` stays -inf."""
    peak = s.amax(-1, keepdim=True)
    return peak.masked_fill_(peak == -torch.inf, 0.0)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """``numerator / denominator``, 0 where a row has no support."""
    return numerator / denominator.masked_fill(denominator == 0, 1.0)


class _Rows:
    """One chunk of query rows against the keys that any of them may see."""

    def __init__(self, query: Tensor, key: Tensor, first: Tensor, last: Tensor, rows: slice, keys: slice) -> None:
        dtype = compute_dtype(query.dtype)
        self.batch, self.heads, _, self.dim = query.shape
        self.kv_heads = key.shape[1]
        self.rows, self.keys = rows, keys
        self.query = self.fold(query[:, :, rows].to(dtype))
        self.key = key[:, :, keys].to(dtype)
        self.first, self.last = first[:, rows], last[:, rows]

    def fold(self, x: Tensor) -> Tensor:
        """(B, H, c, D) -> (B, H_kv, G c, D): the heads of one key/value group side by side."""
        return x.reshape(self.batch, self.kv_heads, -1, x.shape[-1])

    def unfold(self, x: Tensor) -> Tensor:
        return x.reshape(self.batch, self.heads, -1, x.shape[-1])

    def scores(self, query_scale: Tensor | None, alibi_slopes: Tensor | None, scaling: float) -> Tensor:
        """(B, H, c, n) scores, -inf outside each row's interval."""
        s = self.unfold(self.query @ self.key.transpose(-1, -2)).mul_(scaling)
        if query_scale is not None:
            s *= query_scale[:, :, self.rows, None].to(s.dtype)
        j = torch.arange(self.keys.start, self.keys.stop, device=s.device)
        if alibi_slopes is not None:  # measured from the row's last key: a constant per row changes nothing
            distance = j - (self.last[:, None, :, None] - 1)
            s += alibi_slopes.to(s.dtype)[:, None, None] * distance
        hidden = (j < self.first[:, None, :, None]) | (j >= self.last[:, None, :, None])
        return s.masked_fill_(hidden, -torch.inf)


def _chunks(first: Tensor, last: Tensor, batch: int, heads: int) -> list[tuple[slice, slice]]:
    """Row chunks, each with the range of keys that its rows may see."""
    if 0 in (batch, heads, first.shape[1]):
        return []
    most = _CHUNK_ELEMENTS.get(first.device.type, 1 << 24) // (batch * heads)
    low, high = torch.stack([first.amin(0), last.amax(0)]).tolist()
    total, chunks, start = len(low), [], 0
    while start < total:
        stop, lo, hi = start, low[start], high[start]
        while stop < total:
            next_lo, next_hi = min(lo, low[stop]), max(hi, high[stop])
            if stop > start and (stop + 1 - start) * max(next_hi - next_lo, 1) > most:
                break
            lo, hi, stop = next_lo, next_hi, stop + 1
        chunks.append((slice(start, stop), slice(lo, max(hi, lo))))
        start = stop
    return chunks


@without_autocast
def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    query_scale: Tensor | None,
    alibi_slopes: Tensor | None,
    alpha: Alpha,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, T, D_v) in the dtype of ``query`` and the thresholds t (B, H, T, 1), which the backward needs.

    ``first``, ``last``: int (B or 1, T); query i sees the keys ``first[i] <= j < last[i]``. A tensor ``alpha`` has
    shape (1, 1, 1) or (H, 1, 1). Memory beyond inputs and outputs: a few buffers of one chunk's scores.
    """
    dtype = compute_dtype(query.dtype)
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    thresholds = torch.zeros(*query.shape[:3], 1, dtype=dtype, device=query.device)
    for rows, keys in _chunks(first, last, query.shape[0], query.shape[1]):
        if keys.start == keys.stop:
            continue
        chunk = _Rows(query, key, first, last, rows, keys)
        u = chunk.scores(query_scale, alibi_slopes, scaling)
        u -= _finite_max(u)
        t = _threshold(u, alpha)
        p, _ = _weights(u.sub_(t), alpha)
        out[:, :, rows] = chunk.unfold(chunk.fold(p) @ value[:, :, keys].to(dtype)).to(out.dtype)
        thresholds[:, :, rows] = t
    return out, thresholds


@without_autocast
def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    query_scale: Tensor | None,
    alibi_slopes: Tensor | None,
    alpha: Alpha,
    scaling: float,
    thresholds: Tensor,
    alpha_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, query_scale (or None) and alpha ((H,), or None), recomputing the scores."""
    dtype = compute_dtype(query.dtype)
    dq = torch.zeros_like(query)
    dk = torch.zeros_like(key, dtype=dtype)
    dv = torch.zeros_like(value, dtype=dtype)
    dr = torch.zeros_like(query_scale) if query_scale is not None else None
    dalpha = torch.zeros(query.shape[1], dtype=dtype, device=query.device) if alpha_grad else None
    for rows, keys in _chunks(first, last, query.shape[0], query.shape[1]):
        if keys.start == keys.stop:
            continue
        chunk = _Rows(query, key, first, last, rows, keys)
        u = chunk.scores(query_scale, alibi_slopes, scaling)
        u -= _finite_max(u)
        p, g = _weights(u.sub_(thresholds[:, :, rows]), alpha)
        grad = chunk.fold(grad_out[:, :, rows].to(dtype))
        dv[:, :, keys] += chunk.fold(p).transpose(-1, -2) @ grad
        centred = chunk.unfold(grad @ value[:, :, keys].to(dtype).transpose(-1, -2))
        centred -= _ratio((g * centred).sum(-1, keepdim=True), g.sum(-1, keepdim=True))
        if dalpha is not None:
            dalpha += (_alpha_slope(p, g, alpha) * centred).sum((0, 2, 3))
        ds = centred.mul_(g).mul_(scaling)
        dq_rows = chunk.unfold(chunk.fold(ds) @ chunk.key)
        if query_scale is not None and dr is not None:
            dr[:, :, rows] = (dq_rows * query[:, :, rows].to(dtype)).sum(-1).to(dr.dtype)
            scale = query_scale[:, :, rows, None].to(dtype)
            dq_rows, ds = dq_rows * scale, ds * scale
        dq[:, :, rows] = dq_rows.to(dq.dtype)
        dk[:, :, keys] += chunk.fold(ds).transpose(-1, -2) @ chunk.query
    return dq, dk.to(key.dtype), dv.to(value.dtype), dr, dalpha


@without_autocast
def attention_weights(
    query: Tensor,
    key: Tensor,
    first: Tensor,
    last: Tensor,
    query_scale: Tensor | None,
    alibi_slopes: Tensor | None,
    weights: Alpha | Callable[[Tensor], Tensor],
    scaling: float,
) -> Tensor:
    """The dense map (B, H, T, N) in the compute dtype, exact zeros included: entmax of an alpha, or what a function
    makes of the scores. O(T N) memory, no gradient of its own."""
    rows, keys = slice(0, query.shape[2]), slice(0, key.shape[2])
    u = _Rows(query, key, first, last, rows, keys).scores(query_scale, alibi_slopes, scaling)
    if callable(weights):
        return weights(u)
    u -= _finite_max(u)
    return _weights(u - _threshold(u, weights), weights)[0]
