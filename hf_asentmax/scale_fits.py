"""How the learned query scale r grows with the number n of visible keys: three laws, fitted by least squares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LINEAR, LOG, POWER = "beta n", "delta + beta log n", "delta + beta (log n)^gamma"
SCALE_LAWS = (LINEAR, LOG, POWER)
GAMMAS = (-4.0, 8.0)  # searched for the exponent
LEAST_KEYS = 8  # queries that see fewer are too few for a mean


def fit_scale(n: Tensor, r: Tensor) -> dict[str, dict[str, float]]:
    """Fit each of :data:`SCALE_LAWS` to points (n, r), all points alike.

    Args:
        n: (K,), numbers of keys, at least 2 and not all equal.
        r: (K,), the scale there.

    Returns:
        By law beta, delta, gamma (of log n; 0, 1 where the law has none) and r2, the share of the variance of r that it
        explains: 1 is exact, below 0 is worse than a constant, NaN where r does not vary.

    Raises:
        ValueError: fewer than three points, an n below 2, all n equal, or a number that isn't finite.

    Reference: arXiv 2506.16640, figure 3.
    """
    n, r = n.double(), r.double()
    if n.shape != r.shape or n.numel() < 3 or not bool((n >= 2).all()) or bool((n == n[0]).all()):
        raise ValueError(
            f"n must hold at least 3 numbers of keys from 2 on, not all equal, and as many as r has, got {n.tolist()} "
            f"for {r.numel()} scales; use a longer input"
        )
    if not bool(torch.isfinite(torch.stack([n, r])).all()):
        raise ValueError(f"r must be finite, got {r.tolist()}; the model may have diverged")
    gammas = torch.linspace(*GAMMAS, 1201, dtype=torch.float64, device=n.device)
    for _ in range(4):  # each search is between the neighbours of the best of the former
        best = int(_affine(n.log() ** gammas[:, None], r)[2].argmin())
        low, high = gammas[max(best - 1, 0)], gammas[min(best + 1, len(gammas) - 1)]
        gamma = float(gammas[best])
        gammas = torch.linspace(float(low), float(high), 101, dtype=torch.float64, device=n.device)
    beta = float((n * r).sum() / n.square().sum())
    fits = {LINEAR: {"beta": beta, "delta": 0.0, "gamma": 0.0}}
    for law, exponent in ((LOG, 1.0), (POWER, gamma)):
        slope, constant, _ = _affine(n.log() ** exponent, r)
        fits[law] = {"beta": float(slope), "delta": float(constant), "gamma": exponent}
    spread = float((r - r.mean()).square().sum())
    for law, fit in fits.items():
        error = float((scale_law(law, fit, n) - r).square().sum())
        fit["r2"] = 1 - error / spread if spread > 1e-12 * float(r.square().sum()) else torch.nan
    return fits


def _affine(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slope, constant and squared error of the line through the points of each row of x (..., K) with y (K,)."""
    centred, values = x - x.mean(-1, keepdim=True), y - y.mean()
    spread = centred.square().sum(-1)
    # Powers near 0 leave a column that is constant but for its rounding, which explains nothing.
    flat = spread <= 1e-20 * x.square().sum(-1)
    slope = ((centred * values).sum(-1) / spread).masked_fill(flat, 0.0)
    error = (values - slope[..., None] * centred).square().sum(-1)
    return slope, y.mean() - slope * x.mean(-1), error


def scale_law(law: str, fit: dict[str, float], n: Tensor) -> Tensor:
    """r at n by a law of :data:`SCALE_LAWS` and its fit."""
    if law == LINEAR:
        return fit["beta"] * n
    return fit["delta"] + fit["beta"] * n.log() ** fit["gamma"]


def scale_points(n: Tensor, query_scale: Tensor, *, bins: int = 40) -> dict[str, Any]:
    """The mean scale of each head by the number of visible keys, in bins of about equal width in log n.

    Args:
        n: (B, T), keys that each query sees; those below 8 are left out.
        query_scale: (B, H, T).
        bins: at most so many points; a bin without queries gives none.

    Returns:
        n, list of the mean n of each bin, and r, a list of lists, one of each head.

    Raises:
        ValueError: no query sees 8 keys.
    """
    chosen = n >= LEAST_KEYS
    counts = n[chosen].double()
    if not counts.numel():
        raise ValueError(f"n must hold queries that see {LEAST_KEYS} keys, got {n.max()} at most; use a longer input")
    place = counts.div(LEAST_KEYS).log() / counts.max().add(1).div(LEAST_KEYS).log() * bins
    number, members = place.long().unique(return_inverse=True)
    size = torch.zeros(len(number), dtype=torch.float64).index_add_(0, members, torch.ones_like(counts))

    def means(x: Tensor) -> list[float]:
        return (torch.zeros_like(size).index_add_(0, members, x.double()) / size).tolist()

    return {"n": means(counts), "r": [means(query_scale[:, head][chosen]) for head in range(query_scale.shape[1])]}
