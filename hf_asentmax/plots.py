"""Reports of evaluations: table, JSON, and pictures of accuracy by length, or by depth and length."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .checkpoints import write_json
from .evaluation import results_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito: told apart by every kind of colour vision. The markers tell methods apart without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
FONT_SIZE = 12  # points
PANELS = 4  # side by side, at most


def plot_ladder(
    rows: Sequence[dict[str, Any]],
    path: str | os.PathLike[str],
    *,
    train_length: int | None = None,
    title: str | None = None,
) -> Path:
    """Draw accuracy against length, a line a method with 95 % intervals, and write it as an image.

    Of a method with several runs (seeds, or models) each is a thin line with its own intervals, and the thick line is
    their mean.

    Args:
        rows: method, length, accuracy, low and high in %, as `synthetic_ladder` and `retrieve` return them; where
            rows have a seed or a model, runs differ in it.
        path: image file, PNG by its ending.
        train_length: where to mark the longest length that was trained on.
        title: heading.

    Returns:
        The path.
    """
    figure = new_figure(7.0, 4.5)
    axes = figure.add_subplot()
    _draw_runs(axes, rows, "accuracy")
    if train_length is not None:
        axes.axvline(train_length, color="gray", linestyle=":", label="training length")
    what = "exact match (%)" if "token_accuracy" in rows[0] else "accuracy (%)"
    axes.set(xlabel="length (tokens)", ylabel=what, ylim=(-5, 105), title=title or "")
    _legend(figure, axes, "bars: 95 % intervals")
    return write_figure(figure, path)


def plot_perplexity(rows: Sequence[dict[str, Any]], path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Draw perplexity against context length, a line a method with 95 % intervals, and write it as an image.

    Models of one method are drawn as its runs, as in `plot_ladder`. The axis is logarithmic and ends at four times the
    lowest perplexity: what fails beyond its trained length leaves the picture instead of flattening the others.

    Args:
        rows: method, model, length, perplexity, low and high.
        path: image file, PNG by its ending.
        title: heading.

    Returns:
        The path.
    """
    from matplotlib.ticker import LogFormatter

    figure = new_figure(7.0, 4.5)
    axes = figure.add_subplot()
    _draw_runs(axes, rows, "perplexity")
    low, high = min(row["low"] for row in rows), max(row["high"] for row in rows)
    axes.set_yscale("log")
    axes.set_ylim(0.97 * low, min(1.03 * high, 4 * low))
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2.0, 1.0)))
    axes.set(xlabel="context (tokens)", ylabel="perplexity", title=title or "")
    _legend(figure, axes, "bars: 95 % intervals by document")
    return write_figure(figure, path)


def _legend(figure: Figure, axes: Any, title: str) -> None:
    """In the picture where it is short, else beside it."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) <= 4:
        axes.legend(title=title)
    else:
        figure.set_figwidth(figure.get_figwidth() + 1.2 + 0.09 * max(map(len, labels)))
        figure.legend(handles, labels, loc="outside right upper", title=title)


def _draw_runs(axes: Any, rows: Sequence[dict[str, Any]], value: str) -> None:
    """A line a method against length, with the intervals low to high; its runs, where there are several, thin.

    More than four methods stand a little beside each other, so that their intervals can be told apart.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for number, method in enumerate(methods):
        aside = 2 ** (0.3 * (number / (len(methods) - 1) - 0.5)) if len(methods) > 4 else 1.0
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["length"])
        runs: dict[tuple[Any, Any], list[dict[str, Any]]] = {}
        for row in own:
            runs.setdefault((row.get("seed"), row.get("model")), []).append(row)
        for run in runs.values():
            values = [row[value] for row in run]
            # Clipped, because rounding puts an end of the interval 1e-14 on the wrong side.
            below = [max(0.0, row[value] - row["low"]) for row in run]
            above = [max(0.0, row["high"] - row[value]) for row in run]
            axes.errorbar(
                [aside * row["length"] for row in run],
                values,
                yerr=[below, above],
                color=colour,
                capsize=3,
                linewidth=0.8,
                alpha=1.0 if len(runs) == 1 else 0.5,
            )
        lengths = sorted({row["length"] for row in own})
        means = [fmean(row[value] for row in own if row["length"] == length) for length in lengths]
        label = method if len(runs) == 1 else f"{method} (mean of {len(runs)} runs)"
        style = ("-", "--", ":")[number // len(COLOURS) % 3]
        axes.plot(
            [aside * length for length in lengths],
            means,
            style,
            color=colour,
            marker=marker,
            linewidth=2.2,
            label=label,
        )
    axes.set_xscale("log", base=2)
    shown = sorted({row["length"] for row in rows})
    axes.set_xticks(shown, [f"{length:,}" for length in shown], rotation=0 if len(shown) < 8 else 45)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def plot_heatmap(rows: Sequence[dict[str, Any]], path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Draw accuracy by depth (down) and length (across), one panel a method, and write it as an image.

    Args:
        rows: method, length, depth in % of the haystack, and accuracy in %, as `retrieve` returns them. Of a
            method with several runs the mean is drawn.
        path: image file, PNG by its ending.
        title: heading.

    Returns:
        The path.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lengths, depths = (sorted({row[name] for row in rows}) for name in ("length", "depth"))
    columns = min(len(methods), PANELS)
    lines = -(-len(methods) // columns)
    figure = new_figure(
        2.0 + columns * max(3.0, 0.85 * len(lengths)), 0.8 + lines * (1.2 + max(1.5, 0.45 * len(depths)))
    )
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes in panels.flat[len(methods) :]:
        axes.set_visible(False)
    for axes, method in zip(panels.flat, methods, strict=False):
        found: dict[tuple[float, int], list[float]] = {}
        for row in rows:
            if row["method"] == method:
                found.setdefault((row["depth"], row["length"]), []).append(row["accuracy"])
        shares, runs = {cell: fmean(each) for cell, each in found.items()}, max(map(len, found.values()))
        grid = [[shares.get((depth, length), float("nan")) for length in lengths] for depth in depths]
        image = axes.imshow(grid, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for (depth, length), share in shares.items():
            place, shade = (lengths.index(length), depths.index(depth)), "black" if share > 55 else "white"
            axes.text(*place, f"{share:.0f}", ha="center", va="center", color=shade)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:g} %" for depth in depths])
        title_of = method if runs == 1 else f"{method} (mean of {runs} runs)"
        axes.set(xlabel="length (tokens)", title=title_of)
        axes.tick_params(labelbottom=True)
    for line in panels:
        line[0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=list(panels.flat), label="found (%)")
    if title:
        figure.suptitle(title)
    return write_figure(figure, path)


def plot_training(
    runs: Mapping[str, dict[str, Any]], path: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """Draw the training loss of several runs, and alpha and the exact zeros of those that are sparse, by step.

    Args:
        runs: what `run_training` wrote to results.json, by method.
        path: image file, PNG by its ending.
        title: heading.

    Returns:
        The path.
    """
    figure = new_figure(11, 4.2)
    left, right = figure.subplots(1, 2)
    for colour, (method, results) in zip(COLOURS, runs.items(), strict=False):
        log = [entry for entry in results["log"] if "loss" in entry]
        steps = [entry["step"] for entry in log]
        left.plot(steps, [entry["loss"] for entry in log], color=colour, label=method)
        if any(entry.get("zero_share") for entry in log):
            zeros = [100 * entry["zero_share"] for entry in log]
            right.plot(steps, zeros, color=colour, label=f"{method}: weights exactly zero (%)")
            alpha = [100 * (entry["entmax_alpha"] - 1) for entry in log]
            right.plot(steps, alpha, "--", color=colour, label=f"{method}: 100 (alpha - 1)")
    left.set(xlabel="step", ylabel="training loss (nats)")
    right.set(xlabel="step", ylim=(-5, 105))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    if title:
        figure.suptitle(title)
    return write_figure(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches; no window and no pyplot, so no display is needed."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["font.size"] = FONT_SIZE
    return Figure(figsize=(width, height), layout="constrained")


def write_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def write_report(
    rows: Sequence[dict[str, Any]],
    folder: str | os.PathLike[str],
    *,
    title: str | None = None,
    train_length: int | None = None,
) -> list[Path]:
    """Write results.json (the rows), results.md (the table) and a picture, heatmap.png by depth or ladder.png.

    Args:
        rows: results of `synthetic_ladder` or `retrieve`.
        folder: where to; made if it is not there.
        title: heading of the picture.
        train_length: marked in a ladder.

    Returns:
        The three paths.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", list(rows))
    (folder / "results.md").write_text(results_table(rows) + "\n", encoding="utf-8")
    picture = plot_results(rows, folder, title=title, train_length=train_length)
    return [folder / "results.json", folder / "results.md", picture]


def plot_results(
    rows: Sequence[dict[str, Any]], folder: Path, *, title: str | None = None, train_length: int | None = None
) -> Path:
    """heatmap.png of rows by depth, else ladder.png."""
    if any("depth" in row for row in rows):
        return plot_heatmap(rows, folder / "heatmap.png", title=title)
    return plot_ladder(rows, folder / "ladder.png", title=title, train_length=train_length)
