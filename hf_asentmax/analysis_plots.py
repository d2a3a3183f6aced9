"""Pictures of what trained models do with their attention, from the rows of :mod:`hf_asentmax.analysis_report`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .plots import COLOURS, MARKERS, new_figure, write_figure
from .scale_fits import SCALE_LAWS, scale_law

Row = dict[str, Any]
_MOST_PANELS = 8  # heads in the picture of the scale
_MOST_LENGTHS = 4  # panels side by side
_MOST_NUMBERS = 16  # heads of a layer up to which cells carry their number
_MOST_BANDS = 4  # lines up to which each has its band
_STYLES = ("-", "--", ":", "-.")


def spread_evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / max(1, most - 1))] for place in range(most)]


def head_name(row: Mapping[str, Any]) -> str:
    return f"layer {row['layer']}, head {row['head']}"


def plot_scale(scales: Sequence[Row], path: str | os.PathLike[str], *, train_length: int | None = None) -> Path:
    """Draw r against n with the three fits, a panel a head, evenly chosen where there are many.

    Args:
        scales: layer, head, n, r and fits of each head of one model.
        path: image file.
        train_length: where to mark the longest length that was trained on.

    Returns:
        The path.
    """
    chosen = spread_evenly(scales, _MOST_PANELS)
    columns = min(4, len(chosen))
    lines = -(-len(chosen) // columns)
    figure = new_figure(3.7 * columns + 0.5, 3.3 * lines + 0.8)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True)
    for axes, scale in zip(panels.flat, chosen, strict=False):
        axes.plot(scale["n"], scale["r"], "o", color="black", markersize=4)
        fine = torch.logspace(math.log10(scale["n"][0]), math.log10(scale["n"][-1]), 200, dtype=torch.float64)
        for law, colour, style in zip(SCALE_LAWS, COLOURS, _STYLES, strict=False):
            fit = scale["fits"][law]
            values = scale_law(law, fit, fine).numpy()
            axes.plot(fine.numpy(), values, style, color=colour, linewidth=2, label=f"R² {fit['r2']:.3f}")
        # The line through the origin may leave by far what the others share.
        low, high = min(scale["r"]), max(scale["r"])
        room = 0.12 * (high - low) + 0.02 * abs(high)
        axes.set_ylim(low - room, high + room)
        if train_length is not None:
            axes.axvline(train_length, color="gray", linestyle=":")
        gamma = scale["fits"][SCALE_LAWS[-1]]["gamma"]
        axes.set_title(f"{head_name(scale)}: gamma {gamma:.2f}", fontsize=11)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, handlelength=1.6)
    for axes in list(panels.flat)[len(chosen) :]:
        axes.set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("visible keys n")
    for line in panels:
        line[0].set_ylabel("scale r")
    labels = ["mean over queries", *SCALE_LAWS, *(["training length"] if train_length is not None else [])]
    figure.legend(panels[0, 0].lines, labels, loc="outside upper center", ncols=len(labels), fontsize=11)
    return write_figure(figure, path)


def plot_model_dispersion(rows: Sequence[Row], path: str | os.PathLike[str]) -> Path:
    """Draw support, normalised entropy and largest weight of the final queries against the keys that they see."""
    figure = new_figure(13.5, 4.6)
    panels = figure.subplots(1, 3)
    names = {"final_support": "keys with a weight above zero", "final_entropy": "entropy H(p) / log n"}
    names |= {"final_largest": "largest weight"}
    for axes, (name, title) in zip(panels, names.items(), strict=True):
        _draw_groups(axes, rows, "final_n", name)
        axes.set(xlabel="visible keys n", title=title)
    panels[0].set_yscale("log", base=2)
    for axes in panels[1:]:
        axes.set_ylim(-0.03, 1.03)
    _legend(figure, panels[0], rows)
    return write_figure(figure, path)


def plot_sparsity(rows: Sequence[Row], path: str | os.PathLike[str], *, benchmark: tuple[float, float]) -> Path:
    """Draw support and block sparsity over all queries against length, beside the range that the kernels are timed at.

    Args:
        rows: of all models.
        path: image file.
        benchmark: the lowest and the highest block sparsity of the benchmark's sparse cases.

    Returns:
        The path.
    """
    figure = new_figure(11, 4.8)
    left, right = figure.subplots(1, 2)
    right.axhspan(*benchmark, color="#E69F00", alpha=0.2, linewidth=0, label="kernels' benchmark")
    for axes, name in ((left, "support_size"), (right, "block_sparsity")):
        _draw_groups(axes, rows, "length", name)
        axes.set(xlabel="length (tokens)")
    left.set_yscale("log", base=2)
    left.set(title="keys with a weight above zero", ylabel="keys a query, mean over all queries")
    right.set(title="block sparsity", ylabel="share of the visible 64 x 64 blocks", ylim=(-0.03, 1.03))
    _legend(figure, right, rows)
    return write_figure(figure, path)


def _draw_groups(axes: Any, rows: Sequence[Row], x: str, y: str) -> None:
    """A line a model and kind of head, the mean over the heads; few lines are in a band that holds 80 % of them."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    groups = _group_styles(rows)
    for (model, kind), style in groups.items():
        own = [row for row in rows if (row["model"], row["kind"]) == (model, kind)]
        lengths = sorted({row["length"] for row in own})
        values = [torch.tensor([row[y] for row in own if row["length"] == length]).double() for length in lengths]
        places = [next(row[x] for row in own if row["length"] == length) for length in lengths]
        number = models.index(model) % len(COLOURS)
        look = {"color": COLOURS[number], "marker": MARKERS[number], "linewidth": 2, "markersize": 7}
        look["markerfacecolor"] = COLOURS[number] if style == "-" else "white"
        axes.plot(places, [float(heads.nanmean()) for heads in values], style, **look, label=f"{model}, {kind} heads")
        if len(groups) <= _MOST_BANDS:
            low, high = ([float(heads.nanquantile(share)) for heads in values] for share in (0.1, 0.9))
            axes.fill_between(places, low, high, color=COLOURS[number], alpha=0.12, linewidth=0)
    axes.set_xscale("log", base=2)
    if x == "length":
        shown = spread_evenly(sorted({row[x] for row in rows}), 9)
        axes.set_xticks(shown, [f"{length:,}" for length in shown], rotation=0 if len(shown) < 6 else 45)
        axes.minorticks_off()
    axes.grid(alpha=0.3)


def _group_styles(rows: Sequence[Row]) -> dict[tuple[str, str], str]:
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    return {(row["model"], row["kind"]): _STYLES[kinds.index(row["kind"]) % len(_STYLES)] for row in rows}


def _legend(figure: Any, axes: Any, rows: Sequence[Row]) -> None:
    handles, labels = axes.get_legend_handles_labels()
    title = "mean over the heads"
    if len(_group_styles(rows)) <= _MOST_BANDS:
        title += "; the bands hold 80 % of them"
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=11, title=title)


def plot_heads(rows: Sequence[Row], path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Draw support and block sparsity of one model by layer, head and length, as grids."""
    from matplotlib.colors import LogNorm

    lengths = spread_evenly(sorted({row["length"] for row in rows}), _MOST_LENGTHS)
    layers, heads = (1 + max(row[name] for row in rows) for name in ("layer", "head"))
    width, height = max(2.6, 0.5 * heads), max(1.2, 0.34 * layers)
    figure = new_figure(1.8 + len(lengths) * width, 1.6 + 2 * height)
    panels = figure.subplots(2, len(lengths), squeeze=False, sharex=True, sharey=True)
    highest = max(row["support_size"] for row in rows)
    norm = LogNorm(1.0, max(2.0, highest))
    kinds = (("support_size", {"cmap": "cividis_r", "norm": norm}, "keys a query"),)
    shares = (("block_sparsity", {"cmap": "cividis", "vmin": 0.0, "vmax": 1.0}, "block sparsity"),)
    for line, (name, look, label) in zip(panels, kinds + shares, strict=True):
        for axes, length in zip(line, lengths, strict=True):
            grid = _grid([row for row in rows if row["length"] == length], name, layers, heads)
            image = _draw_grid(axes, grid, look, digits=0 if name == "support_size" else 2)
            axes.set_title(f"{length:,} tokens", fontsize=11)
        figure.colorbar(image, ax=list(line), label=label)
        line[0].set_ylabel("layer")
    for axes in panels[-1]:
        axes.set_xlabel("head")
    figure.suptitle(title or "support size (above) and block sparsity (below)")
    return write_figure(figure, path)


def plot_learned_alpha(rows: Sequence[Row], path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Draw the learned alpha of one model by layer and head, as a grid."""
    layers, heads = (1 + max(row[name] for row in rows) for name in ("layer", "head"))
    figure = new_figure(2.6 + max(3.0, 0.55 * heads), 1.6 + max(1.2, 0.4 * layers))
    axes = figure.add_subplot()
    grid = _grid(rows, "alpha", layers, heads)
    alphas = [row["alpha"] for row in rows]
    low, high = math.floor(10 * min(alphas)) / 10, math.ceil(10 * max(alphas)) / 10
    image = _draw_grid(axes, grid, {"cmap": "cividis", "vmin": low, "vmax": high}, 2)
    axes.set(xlabel="head", ylabel="layer", title=title or "learned alpha")
    figure.colorbar(image, ax=axes, label="alpha")
    return write_figure(figure, path)


def _grid(rows: Sequence[Row], name: str, layers: int, heads: int) -> Tensor:
    grid = torch.full((layers, heads), torch.nan)
    for row in rows:
        grid[row["layer"], row["head"]] = row[name]
    return grid


def _draw_grid(axes: Any, grid: Tensor, look: dict[str, Any], digits: int) -> Any:
    image = axes.imshow(grid.numpy(), aspect="auto", **look)
    layers, heads = grid.shape
    if heads <= _MOST_NUMBERS:
        for layer in range(layers):
            for head in range(heads):
                value = float(grid[layer, head])
                if math.isnan(value):  # a head that was cut, left white
                    continue
                red, green, blue, _ = image.cmap(image.norm(value))
                shade = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
                axes.text(head, layer, f"{value:.{digits}f}", ha="center", va="center", color=shade, fontsize=8)
    axes.set_xticks(range(0, heads, -(-heads // 16)))
    axes.set_yticks(range(0, layers, -(-layers // 16)))
    return image


def plot_maps(
    maps: Mapping[str, Mapping[tuple[int, int], Tensor]], path: str | os.PathLike[str], *, smallest: float = 1e-4
) -> Path:
    """Draw attention maps, a line of panels a model, exact zeros left white.

    Args:
        maps: by model, then by (layer, head), the weights (T, T), of which the lower triangle is visible.
        path: image file.
        smallest: weights below it have the colour of this one.

    Returns:
        The path.
    """
    from matplotlib.colors import ListedColormap, LogNorm

    columns = max(len(heads) for heads in maps.values())
    figure = new_figure(3.2 * columns + 1.4, 3.4 * len(maps) + 0.4)
    panels = figure.subplots(len(maps), columns, squeeze=False)
    for line, (model, heads) in zip(panels, maps.items(), strict=True):
        for axes in line[len(heads) :]:
            axes.set_visible(False)
        for axes, ((layer, head), p) in zip(line, heads.items(), strict=False):
            hidden = torch.ones_like(p, dtype=torch.bool).triu(1)
            axes.imshow(hidden.numpy(), cmap=ListedColormap(["white", "#D9D9D9"]), interpolation="nearest")
            shown = p.clamp_min(smallest).masked_fill(p == 0, torch.nan).numpy()
            image = axes.imshow(shown, cmap="viridis_r", norm=LogNorm(smallest, 1.0), interpolation="nearest")
            zeros = (p == 0)[~hidden].float().mean().item()
            axes.set_title(f"layer {layer}, head {head}: {zeros:.0%} zeros", fontsize=11)
            axes.set_xlabel("key")
        line[0].set_ylabel(f"{model}\nquery")
    figure.colorbar(image, ax=list(panels.flat), label="weight; white is exactly zero", aspect=40)
    return write_figure(figure, path)
