"""Tables of what trained models do with their attention, from the rows of :mod:`hf_asentmax.analysis_report`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from .analysis_plots import Row, head_name
from .benchmark.inputs import CASES
from .evaluation import markdown_table
from .scale_fits import SCALE_LAWS

FINAL_TOKENS = 64  # of a text: the queries whose dispersion is reported
_REGIME = [case.block_sparsity for case in CASES.values() if case.block_sparsity > 0]
BENCHMARK_SPARSITY = (min(_REGIME), max(_REGIME))
_COLUMNS = {
    "support_size": ("keys a query", "{:.1f}"),
    "zero_share": ("exact zeros", "{:.1%}"),
    "block_sparsity": ("block sparsity", "{:.3f}"),
    "final_n": ("final queries: n", "{:.0f}"),
    "final_support": ("support", "{:.1f}"),
    "final_entropy": ("H / log n", "{:.3f}"),
    "final_largest": ("largest", "{:.3f}"),
    "final_scale": ("r", "{:.2f}"),
    "alpha": ("alpha", "{:.2f}"),
}


def summary_table(rows: Sequence[Row]) -> str:
    """A line a model, length and kind of head: means over the heads, and how many are as sparse as the benchmark."""
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["length"], row["kind"]), []).append(row)
    low, high = BENCHMARK_SPARSITY
    lines = []
    for (model, length, kind), own in groups.items():
        means = [text.format(fmean(row[name] for row in own)) for name, (_, text) in _COLUMNS.items()]
        reached = sum(row["block_sparsity"] >= low for row in own)
        lines.append([model, f"{length:,}", f"{len(own)} {kind}", *means, f"{reached} of {len(own)}"])
    header = ["model", "length", "heads", *(title for title, _ in _COLUMNS.values()), f"heads at >= {low:g}"]
    about = f"""Means over the heads. Keys a query, exact zeros (share of visible pairs) and block sparsity (share of
visible 64 x 64 blocks) are over all queries; the others are over the final queries: those that predict a task's
answer, or the last {FINAL_TOKENS} of a text or document. Zeros of softmax are float32 underflow. The kernels are
benchmarked at a block sparsity of {low:g} to {high:g}."""
    return "\n".join([*markdown_table(header, lines), "", about])


def scale_table(scales: Sequence[Row]) -> str:
    """The fits of r against n, a line a head."""
    lines = []
    for row in scales:
        fits = [row["fits"][law] for law in SCALE_LAWS]
        power = fits[-1]
        numbers = [f"{fit['r2']:.3f}" for fit in fits] + [f"{power[name]:.3g}" for name in ("delta", "beta", "gamma")]
        lines.append([row["model"], head_name(row), f"{row['r'][0]:.2f}", f"{row['r'][-1]:.2f}", *numbers])
    header = ["model", "head", "r at first n", "r at last n", *(f"R2 of {law}" for law in SCALE_LAWS)]
    return "\n".join(markdown_table([*header, "delta", "beta", "gamma"], lines))


def heads_table(rows: Sequence[Row]) -> str:
    """A line a model, length, layer and head."""
    lines = [
        [row["model"], f"{row['length']:,}", str(row["layer"]), str(row["head"]), row["kind"]]
        + [text.format(row[name]) for name, (_, text) in _COLUMNS.items()]
        for row in rows
    ]
    header = ["model", "length", "layer", "head", "kind", *(title for title, _ in _COLUMNS.values())]
    return "\n".join(markdown_table(header, lines))
