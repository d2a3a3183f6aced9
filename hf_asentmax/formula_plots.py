"""Pictures of the maps themselves, from their formulas: no model, nothing drawn at random."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .ops.attention import entmax
from .ops.baselines import topk_softmax
from .plots import COLOURS, MARKERS, new_figure, write_figure
from .positions import alibi_slopes

KEYS, TOP_K = 64, 8
TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 4.0)
ALPHAS = (1.0, 1.25, 1.5, 2.0)
STANDS_OUT = 6.0  # score of the key that matters, beside scores of standard deviation 1
LENGTHS = tuple(2**power for power in range(4, 19))
DISTANCES = 256  # tokens
HEADS, HEAD_DIM = 8, 64  # of the position schemes

# The colour of a method is the same in every picture.
_MAPS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "softmax": (lambda scores: scores.softmax(-1), COLOURS[0]),
    f"softmax of the top {TOP_K}": (lambda scores: topk_softmax(scores.clone(), TOP_K), COLOURS[2]),
    "entmax, alpha 1.5": (lambda scores: entmax(scores, alpha=1.5), COLOURS[1]),
    "sparsemax (alpha 2)": (lambda scores: entmax(scores, alpha=2.0), COLOURS[3]),
}


def normal_scores(keys: int) -> Tensor:
    """The quantiles of the standard normal distribution at (j + 1/2) / keys, highest first, float64: scores that are as
    typical as can be, and the same every time."""
    place = (torch.arange(keys, dtype=torch.float64) + 0.5) / keys
    return torch.erfinv(2 * place - 1).mul(math.sqrt(2)).flip(0)


def plot_temperature(path: str | os.PathLike[str]) -> Path:
    """Draw the weights ``entmax(z / theta)`` of one set of scores z at several temperatures theta beside those of
    softmax, and the support against theta (arXiv 2506.16640, figure 2). Returns the path."""
    figure = new_figure(13.5, 4.4)
    left, middle, right = figure.subplots(1, 3)
    scores = normal_scores(KEYS)
    for axes, alpha, title in ((left, 1.0, "softmax: never zero"), (middle, 1.5, "entmax, alpha 1.5")):
        for theta, colour, marker in zip(TEMPERATURES, COLOURS, MARKERS, strict=False):
            p = entmax(scores / theta, alpha=alpha)
            used = p > 0
            axes.plot(
                scores[used].numpy(), p[used].numpy(), color=colour, marker=marker, markersize=4, label=f"{theta:g}"
            )
        axes.set(xlabel="score z of the key", ylabel="weight", yscale="log", ylim=(1e-6, 1.5), xlim=(-2.7, 2.7))
        axes.set_title(title)
    left.legend(title="temperature", loc="lower right")
    thetas = torch.logspace(math.log10(0.01), math.log10(20), 240, dtype=torch.float64)
    for alpha, colour in zip(ALPHAS, COLOURS, strict=False):
        size = (entmax(scores / thetas[:, None], alpha=alpha) > 0).sum(-1)
        right.plot(thetas.numpy(), size.numpy(), color=colour, linewidth=2, label=_alpha_label(alpha))
    right.set(xscale="log", xlabel="temperature", ylabel="keys with a weight above zero", title="support")
    right.set_xticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
    right.legend(fontsize=10, loc=(0.02, 0.5))
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.suptitle(f"{KEYS} keys, scores of standard deviation 1; what is not drawn is exactly zero")
    return write_figure(figure, path)


def plot_alpha(path: str | os.PathLike[str]) -> Path:
    """Draw the weights of one set of scores by alpha beside a softmax of the k largest, and the support against alpha
    (arXiv 2506.16640, figure 5). Returns the path."""
    figure = new_figure(11, 4.6)
    left, right = figure.subplots(1, 2)
    scores = normal_scores(KEYS)
    for alpha, colour, marker in zip(ALPHAS, COLOURS, MARKERS, strict=False):
        p = entmax(scores, alpha=alpha)
        left.plot(scores.numpy(), p.numpy(), color=colour, marker=marker, markersize=4, label=_alpha_label(alpha))
    p = topk_softmax(scores.clone(), TOP_K)
    left.step(scores.numpy(), p.numpy(), "--", color=COLOURS[6], where="mid", label=f"softmax of the top {TOP_K}")
    left.set(xlabel="score of the key", ylabel="weight", title="entmax goes to zero without a jump")
    alphas = torch.linspace(1.0, 2.0, 201, dtype=torch.float64)[:, None]
    for spread, style in ((0.5, ":"), (1.0, "-"), (2.0, "--"), (4.0, "-.")):
        size = (entmax((spread * scores).expand(len(alphas), -1), alpha=alphas) > 0).sum(-1)
        right.plot(alphas[:, 0].numpy(), size.numpy(), style, color=COLOURS[1], linewidth=2, label=f"spread {spread:g}")
    right.axhline(TOP_K, color=COLOURS[6], linewidth=1.5)
    right.text(1.0, TOP_K / 1.08, f"top {TOP_K}", va="top")
    right.set(xlabel="alpha", ylabel=f"keys with a weight above zero (of {KEYS})", title="support follows the scores")
    right.set_yscale("log", base=2)
    ticks = [1, 2, 4, 8, 16, 32, 64]
    right.set_yticks(ticks, [str(tick) for tick in ticks])
    left.legend(fontsize=10)
    right.legend(fontsize=10, title="entmax, scores of")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return write_figure(figure, path)


def _alpha_label(alpha: float) -> str:
    special = {1.0: " (softmax)", 2.0: " (sparsemax)"}
    return f"alpha {alpha:g}{special.get(alpha, '')}"


def plot_positions(path: str | os.PathLike[str]) -> Path:
    """Draw the weights by distance that each position scheme gives to keys of equal content, with entmax and with
    softmax (arXiv 2506.16640, figure 4). Returns the path."""
    figure = new_figure(14, 4.4)
    panels = figure.subplots(1, 4, sharey=True)
    distance = torch.arange(DISTANCES, dtype=torch.float64)
    for axes, (scheme, heads) in zip(panels, _position_scores(distance).items(), strict=True):
        for (name, scores), colour in zip(heads.items(), COLOURS, strict=False):
            for alpha, style in ((1.5, "-"), (1.0, "--")):
                p = entmax(scores, alpha=alpha)
                p[p == 0] = torch.nan  # the line ends there
                label = name if alpha == 1.5 else None
                axes.plot((distance + 1).numpy(), p.numpy(), style, color=colour, linewidth=1.8, label=label)
        axes.set(xscale="log", yscale="log", ylim=(1e-6, 5), xlabel="distance + 1 (tokens)", title=scheme)
        axes.set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right", fontsize=10)
    panels[0].set_ylabel("weight")
    figure.suptitle(
        f"{DISTANCES} keys of equal content. Solid: entmax (alpha 1.5), whose lines end at exact zeros; dashed: softmax"
    )
    return write_figure(figure, path)


def _position_scores(distance: Tensor) -> dict[str, dict[str, Tensor]]:
    """The scores of some heads of each scheme by distance, where <q, k> = sqrt(D) before any rotation, spread evenly
    over the dimensions."""
    frequency = 10000.0 ** (-torch.arange(HEAD_DIM // 2, dtype=torch.float64) / (HEAD_DIM // 2))
    rotated = (distance[:, None] * frequency).cos().mean(-1)
    found = {
        "RoPE": {f"score {size}": size * rotated for size in (4, 16)},
        "NoPE": {"every head": torch.zeros_like(distance)},
    }
    for scheme, chosen in (("ALiBi", (1, 4, 8)), ("NAPE", (1, 4, 8))):
        slopes = alibi_slopes(scheme.lower(), HEADS, torch.device("cpu"))
        if slopes is None:
            raise RuntimeError(f"{scheme} must have slopes, got none")
        found[scheme] = {
            f"head {head}, slope {_fraction(slope)}": -slope * distance
            for head, slope in ((head, float(slopes[head - 1])) for head in chosen)
        }
    return found


def _fraction(slope: float) -> str:
    return "0 (NoPE)" if slope == 0 else "1" if slope == 1 else f"1/{1 / slope:g}"


def dispersion_rows() -> list[dict[str, Any]]:
    """What each map makes of one key of score 6 among n - 1 of standard normal scores: method, n, support, entropy
    ``H(p) / log n`` and the weight of that key."""
    rows = []
    for n in LENGTHS:
        scores = torch.cat([torch.tensor([STANDS_OUT], dtype=torch.float64), normal_scores(n - 1)])
        for method, (attend, _) in _MAPS.items():
            p = attend(scores)
            row = {"method": method, "n": n, "support": int((p > 0).sum())}
            rows.append(row | {"entropy": float(torch.special.entr(p).sum() / math.log(n)), "weight": float(p[0])})
    return rows


def plot_dispersion(path: str | os.PathLike[str]) -> Path:
    """Draw :func:`dispersion_rows`: softmax spreads ever further as keys are added, while a key that entmax leaves out
    changes no weight (arXiv 2506.16640). Returns the path."""
    figure = new_figure(13.5, 4.4)
    panels = figure.subplots(1, 3)
    rows = dispersion_rows()
    titles = {"support": "keys with a weight above zero", "entropy": "entropy H(p) / log n"}
    titles |= {"weight": "weight of the key that matters"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for (method, (_, colour)), marker in zip(_MAPS.items(), MARKERS, strict=False):
            own = [row for row in rows if row["method"] == method]
            values = [row[name] for row in own]
            axes.plot([row["n"] for row in own], values, color=colour, marker=marker, markersize=5, label=method)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="keys n", title=title)
        axes.grid(alpha=0.3)
    panels[0].set_yscale("log", base=2)
    panels[1].set_ylim(-0.03, 1.03)
    panels[2].set_ylim(-0.03, 1.03)
    panels[0].legend(fontsize=10)
    figure.suptitle(f"one key of score {STANDS_OUT:g} among n - 1 keys of standard normal scores")
    return write_figure(figure, path)


FORMULA_FIGURES: dict[str, Callable[[str | os.PathLike[str]], Path]] = {
    "temperature": plot_temperature,
    "alpha": plot_alpha,
    "positions": plot_positions,
    "dispersion": plot_dispersion,
}
