"""Tables and the picture of benchmark results, from their JSON alone."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..evaluation import markdown_table
from ..plots import COLOURS, MARKERS, new_figure, write_figure

OURS = "asentmax"
LABELS = {
    "asentmax": "ASEntmax (this package)",
    "adasplash": "AdaSplash-2",
    "sdpa_cudnn": "softmax, SDPA cuDNN",
    "sdpa_flash": "softmax, SDPA flash",
    "flex": "softmax, FlexAttention",
    "sdpa_math": "softmax, SDPA math",
}
PASSES = ("forward", "backward", "forward_backward")


def _groups(rows: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of each case."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["case"], []).append(row)
    return list(groups.values())


def _median(row: dict[str, Any] | None, name: str) -> float | None:
    return row[name]["median"] if row is not None and row["status"] == "ok" and name in row else None


def _ours(row: dict[str, Any], rows: Iterable[dict[str, Any]], case: str | None = None) -> dict[str, Any] | None:
    """Our row of a case (by default the row's own), if it is of the same run: only such times are compared."""
    wanted = (case or row["case"], OURS, row["run"])
    return next((one for one in rows if (one["case"], one["implementation"], one["run"]) == wanted), None)


def _ratio(times: float | None, ours: float | None) -> str:
    return "" if times is None or ours is None else f"{times / ours:.2f}"


def _times(row: dict[str, Any], name: str) -> str:
    if row["status"] != "ok" or name not in row:
        return ""
    return f"{row[name]['median']:.3f} ({row[name]['low']:.3f}-{row[name]['high']:.3f})"


def describe_case(row: dict[str, Any]) -> str:
    """One line: name, sizes, and what was measured of the inputs."""
    case, support = row["settings"], row["support"]
    return (
        f"{row['case']}: B {case['batch']}, H {case['heads']}/{case['kv_heads']}, N {case['tokens']}, "
        f"D {case['head_dim']}, {case['pattern']}{', NAPE slopes' if case['nape'] else ''}; block sparsity "
        f"{support['block_sparsity']:.3f} (asked {case['block_sparsity']:g}), exact zeros "
        f"{100 * support['zero_share']:.2f} %, {support['mean_support']:.1f} keys a query"
    )


def case_table(rows: list[dict[str, Any]], all_rows: list[dict[str, Any]]) -> str:
    """The rows of one case as Markdown: median times in ms (10 to 90 %), and their ratios to ours."""
    lines = []
    for row in rows:
        ours = _ours(row, rows)
        if row["status"] != "ok":
            lines.append([row["implementation"], *[""] * 8, row["status"]])
            continue
        worst = max(row["errors"].values())
        ratios = [_ratio(_median(row, name), _median(ours, name)) for name in ("forward", "forward_backward")]
        cold = f"{row['first_call_s']:.1f}"
        memory = f"{row['peak_mib']:.0f} / {row['state_mib']:.1f}" if "peak_mib" in row else ""
        name = row["implementation"]
        lines.append([name, f"{worst:.1e}", cold, *(_times(row, each) for each in PASSES), *ratios, memory, ""])
    header = ["implementation", "error", "first call s", "forward", "backward", "forward + backward"]
    header += ["forward / ours", "fwd+bwd / ours", "peak / state MiB", "note"]
    notes = [line for row in rows for line in _notes(row, all_rows)]
    return "\n".join([describe_case(rows[0]), "", *markdown_table(header, lines), *notes])


def _notes(row: dict[str, Any], all_rows: list[dict[str, Any]]) -> Iterable[str]:
    if row["status"] != "ok":
        return
    for name in PASSES:
        times = row.get(name, {})
        if "wall" in times:
            text = f"  {row['implementation']}, {name}: eager wall {times['wall']['median']:.3f} ms"
            if times.get("graph"):
                text += f", CUDA graph {times['graph']['median']:.3f} ms"
            elif "graph_failure" in times:
                text += f", CUDA graph {times['graph_failure']}"
            yield text
    if row["settings"]["nape"] and row["implementation"] == OURS:
        plain = _ours(row, all_rows, row["case"].removesuffix("_nape"))
        share = _ratio(_median(row, "forward_backward"), _median(plain, "forward_backward"))
        if share:
            yield f"  with slopes: {share} of the time without (forward + backward)"


def models_table(rows: list[dict[str, Any]]) -> str:
    """Training speed as Markdown: tokens/s (10 to 90 %), the ratio to softmax, memory, and the measured support."""
    lines = []
    for group in _groups(rows):
        for row in group:
            speed, support, case = row["tokens_per_s"], row["support"], row["settings"]
            same = [one for one in group if one["support"] is None and one["run"] == row["run"]]
            ratio = f"{speed['median'] / same[0]['tokens_per_s']['median']:.2f}" if same else ""
            sparse = [f"{support['block_sparsity']:.2f}", f"{support['mean_support']:.0f}"] if support else ["", ""]
            memory = f"{row['peak_mib'] / 1024:.1f}" if row["peak_mib"] else ""
            times = f"{speed['median']:,.0f} ({speed['low']:,.0f}-{speed['high']:,.0f})"
            lines.append([row["implementation"], f"{case['context']}", case["setting"], times, ratio, memory, *sparse])
    header = ["model", "context", "inputs", "training tokens/s", "/ softmax", "peak GiB", "block sparsity", "support"]
    return "\n".join(markdown_table(header, lines))


def generation_table(rows: list[dict[str, Any]]) -> str:
    """Speed of generate() as Markdown: prefill, decoding (10 to 90 %), both as ratios to softmax, memory, support."""
    lines = []
    for group in _groups(rows):
        for row in group:
            prefill, speed, support, case = (
                row[name] for name in ("prefill_ms", "tokens_per_s", "support", "settings")
            )
            same = [one for one in group if one["implementation"] == "softmax_sdpa" and one["run"] == row["run"]]
            ratios = ["", ""]
            if same:
                ratios = [
                    f"{same[0]['prefill_ms']['median'] / prefill['median']:.2f}",
                    f"{speed['median'] / same[0]['tokens_per_s']['median']:.2f}",
                ]
            times = f"{speed['median']:.1f} ({speed['low']:.1f}-{speed['high']:.1f})"
            memory = f"{row['peak_mib'] / 1024:.1f}" if row["peak_mib"] else ""
            sparse = f"{support['block_sparsity']:.2f}" if support else ""
            line = [row["implementation"], f"{case['prompt']}", case["cache"], f"{prefill['median']:.0f}", ratios[0]]
            lines.append([*line, times, ratios[1], memory, sparse])
    header = ["model", "prompt", "cache", "prefill ms", "speed / softmax", "decoded tokens/s", "/ softmax", "peak GiB"]
    return "\n".join(markdown_table([*header, "block sparsity"], lines))


def decoding_table(rows: list[dict[str, Any]]) -> str:
    """Decoding steps as Markdown: median times in us (10 to 90 %), replayed as a CUDA graph and called one by one, and
    their ratios to ours."""

    def times(row: dict[str, Any], name: str) -> list[str]:
        if row["status"] != "ok" or name not in row:
            return ["", ""]
        median, low, high = (1e3 * row[name][which] for which in ("median", "low", "high"))
        return [f"{median:.0f} ({low:.0f}-{high:.0f})", _ratio(row[name]["median"], _median(_ours(row, rows), name))]

    lines = []
    for row in rows:
        case = row["settings"]
        padded = "ragged" if case["ragged"] else ""
        values = f"{100 * row['support']:.1f} %"
        error = f"{row['error']:.1e}" if "error" in row else ""
        note = "" if row["status"] == "ok" else row["status"]
        line = [f"{case['batch']}", f"{case['keys']:,}", padded, values, row["implementation"], error]
        lines.append([*line, *times(row, "graph"), *times(row, "wall"), note])
    header = ["batch", "keys", "padding", "values read", "implementation", "error", "us, as a graph", "/ ours"]
    return "\n".join(markdown_table([*header, "us, called", "/ ours", "note"], lines))


def tables(results: dict[str, Any]) -> str:
    """Every table, and the runs they come from."""
    parts = []
    for number, run in enumerate(results["runs"]):
        versions = ", ".join(f"{name} {value}" for name, value in run["versions"].items())
        parts.append(f"run {number}: {run['device']}, {run['dtype']}, seed {run['seed']}, {versions}\n{run['command']}")
    parts += [case_table(group, results["rows"]) for group in _groups(results["rows"])]
    if results["decoding"]:
        parts.append(decoding_table(results["decoding"]))
    if results["models"]:
        parts.append(models_table(results["models"]))
    if results["generation"]:
        parts.append(generation_table(results["generation"]))
    return "\n\n".join(parts)


def crossings(ratios: Sequence[float]) -> list[tuple[int, float]]:
    """Where ratios pass 1: the number of the point before, and the share of the way to the next, by straight lines
    between the logarithms."""
    y = [math.log(ratio) for ratio in ratios]
    pairs = enumerate(zip(y, y[1:], strict=False))
    return [(i, y0 / (y0 - y1)) for i, (y0, y1) in pairs if y0 < 0 <= y1 or y1 < 0 <= y0]


def plot_benchmark(results: dict[str, Any], path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Draw the sweeps: time of forward + backward against length, and its ratio to ours against block sparsity.

    Crosses mark where a peer and ours are equally fast.

    Args:
        results: with the rows of one sweep or both.
        path: image file, PNG by its ending.
        title: heading.

    Raises:
        ValueError: there is no sweep in the results.
    """
    timed = [row for row in results["rows"] if row["status"] == "ok" and "forward_backward" in row]
    panels = {"lengths_": _draw_lengths, "sparsity_": _draw_sparsity}
    sweeps = {sweep: [row for row in timed if row["case"].startswith(sweep)] for sweep in panels}
    drawn = [sweep for sweep, rows in sweeps.items() if rows]
    if not drawn:
        raise ValueError("results must hold a timed sweep to be drawn, got none; run with --sweep lengths sparsity")
    figure = new_figure(6.5 * len(drawn), 5.0)
    for axes, sweep in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        panels[sweep](axes, sweeps[sweep])
        axes.grid(alpha=0.3)
        axes.legend(title="crosses: as fast as ours", alignment="left", fontsize="small", title_fontsize="small")
    if title:
        figure.suptitle(title)
    return write_figure(figure, path)


def _time(row: dict[str, Any]) -> float:
    return row["forward_backward"]["median"]


def _beside_ours(rows: list[dict[str, Any]], name: str) -> list[tuple[dict[str, Any], float]]:
    """Our rows, by length and sparsity, and the time of another implementation over ours."""
    pairs = [(_ours(row, rows), row) for row in rows if row["implementation"] == name and name != OURS]
    found = [(ours, _time(row) / _time(ours)) for ours, row in pairs if ours is not None]
    return sorted(found, key=lambda pair: (pair[0]["settings"]["tokens"], pair[0]["support"]["block_sparsity"]))


def _style(name: str) -> dict[str, Any]:
    number = list(LABELS).index(name)
    width = 2.6 if name == OURS else 1.6
    return {"color": COLOURS[number], "marker": MARKERS[number], "linewidth": width, "label": LABELS[name]}


def _mark(axes: Any, x: float, y: float, text: str, name: str) -> None:
    colour = _style(name)["color"]
    axes.plot([x], [y], marker="x", markersize=11, markeredgewidth=2.5, color=colour, zorder=5)
    place = {"xytext": (0, -20 if len(axes.texts) % 2 else 12), "textcoords": "offset points"}  # neighbours alternate
    ground = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0}
    axes.annotate(text, (x, y), **place, ha="center", color=colour, bbox=ground, zorder=6)


def _named(rows: list[dict[str, Any]]) -> list[str]:
    return [name for name in LABELS if any(row["implementation"] == name for row in rows)]


def _draw_lengths(axes: Any, rows: list[dict[str, Any]]) -> None:
    lengths = sorted({row["settings"]["tokens"] for row in rows})
    for name in _named(rows):
        points = sorted((row["settings"]["tokens"], _time(row)) for row in rows if row["implementation"] == name)
        axes.plot(*zip(*points, strict=True), **_style(name))
        ours = _beside_ours(rows, name)
        for i, share in crossings([ratio for _, ratio in ours]):
            (before, _), (after, _) = ours[i : i + 2]
            tokens, times = [
                start * (end / start) ** share
                for start, end in (
                    (before["settings"]["tokens"], after["settings"]["tokens"]),
                    (_time(before), _time(after)),
                )
            ]
            _mark(axes, tokens, times, f"{tokens / 1024:.1f}K", name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length // 1024}K" if length >= 1024 else f"{length}" for length in lengths])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    case = rows[0]["settings"]
    axes.set(xlabel="tokens", ylabel="forward + backward (ms)")
    axes.set_title(f"block sparsity about {case['block_sparsity']:g}; {_sizes(case)}")


def _draw_sparsity(axes: Any, rows: list[dict[str, Any]]) -> None:
    for name in _named(rows):
        points = [(ours["support"]["block_sparsity"], ratio) for ours, ratio in _beside_ours(rows, name)]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), **_style(name))
        for i, share in crossings([ratio for _, ratio in points]):
            place = points[i][0] + share * (points[i + 1][0] - points[i][0])
            _mark(axes, place, 1.0, f"{place:.2f}", name)
    axes.axhline(1.0, color=_style(OURS)["color"], linewidth=2.6, label=LABELS[OURS])
    axes.set(xlabel="measured block sparsity", ylabel="time / ours (forward + backward)", ylim=(0, None))
    case = rows[0]["settings"]
    axes.set_title(f"{case['tokens']:,} tokens; {_sizes(case)}")


def _sizes(case: dict[str, Any]) -> str:
    return f"B {case['batch']}, H {case['heads']}/{case['kv_heads']}, D {case['head_dim']}"
