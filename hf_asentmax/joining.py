"""Results of evaluations that were made one by one, put together: a table with a line a method, and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from .checkpoints import write_json
from .evaluation import beyond_context_note, markdown_table
from .extrapolation import tail_of
from .options import option
from .perplexity import compared
from .plots import plot_perplexity, plot_results

Rows = list[dict[str, Any]]
_COLUMNS = {"length", "method", "model"}


@dataclass
class JoinArguments:
    """Which results to put together."""

    results: list[str] = field(
        metadata={
            "help": "Folders that `evaluate` wrote to (--output_dir), or their results.json: all of perplexity on the "
            "same documents, or all of one task."
        }
    )
    method: list[str] | None = option(
        None,
        "Names, one for each of --results; by default the names that the results have. How each reads (--rope, "
        "--block) is added. Results of one name are runs.",
    )
    title: str | None = option(None, "Heading of the picture.")
    output_dir: str | None = option(None, "Folder for results.json, results.md and the picture.")


def run_join(args: JoinArguments) -> Iterator[str]:
    """Put results together; yields the tables, and what was written.

    Raises:
        OSError: a file is missing.
        ValueError: a file holds no results, or they don't belong together.
    """
    if args.method and len(args.method) != len(args.results):
        raise ValueError(
            f"method must name each of the {len(args.results)} results, got {args.method!r}; name them all"
        )
    rows: Rows = []
    for number, given in enumerate(args.results):
        for row in _read(given):
            name, tail = args.method[number] if args.method else row["method"], tail_of(row["model"])
            rows.append(row | {"method": name if name.endswith(tail) else name + tail})
    _check(rows)
    if "losses" in rows[0]:
        rows = compared(rows)
        shortest = min(row["length"] for row in rows)
        growth = f"Of its own at {shortest:,} tokens, with 95 % intervals by document:"
        parts = ["Perplexity:", _table(rows, "perplexity", "{:.2f}"), growth, _growth(rows, shortest)]
    else:
        depths = sorted({row["depth"] for row in rows if "depth" in row})
        over = f", mean over the depths {', '.join(f'{depth:g}' for depth in depths)} %" if depths else ""
        samples = sorted({row["samples"] for row in rows})
        each = f"{' or '.join(map(str, samples))} samples {'a depth and length' if depths else 'a length'}"
        parts = [f"{_task(rows[0])}: accuracy, %{over}; {each}.", _table(rows, "accuracy", "{:.0f}")]
    text = "\n\n".join([*parts, *beyond_context_note(rows)[1:]])
    yield text
    if args.output_dir:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "results.json", rows)
        (folder / "results.md").write_text(text + "\n", encoding="utf-8")
        if "losses" in rows[0]:
            picture = plot_perplexity(rows, folder / "perplexity.png", title=args.title)
        else:
            picture = plot_results(rows, folder, title=args.title or _task(rows[0]))
        yield f"written: {folder / 'results.json'}, {folder / 'results.md'}, {picture}"


def _read(given: str) -> Rows:
    path = Path(given)
    path = path / "results.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"results must be what evaluate wrote, got {given!r}, where there is none; evaluate first"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"results must be JSON that evaluate wrote, got {path}: {error}; evaluate again") from error
    rows = found.get("by_length") if isinstance(found, dict) else found
    if (
        not isinstance(rows, list)
        or not rows
        or not all(isinstance(row, dict) and set(row) >= _COLUMNS for row in rows)
    ):
        raise ValueError(
            f"results must be rows with {', '.join(sorted(_COLUMNS))}, as evaluate writes, got {path}; name another"
        )
    return list(rows)


def _task(row: dict[str, Any]) -> str:
    return str(row.get("task", "perplexity")).partition(" at depth")[0]


def _check(rows: Rows) -> None:
    tasks = sorted({_task(row) for row in rows})
    if len(tasks) > 1:
        raise ValueError(f"results must be of one task, got {', '.join(tasks)}; put each together by itself")
    models: dict[str, Rows] = {}
    for row in rows:
        models.setdefault(row["model"], []).append(row)
    cells = {}
    for model, own in models.items():
        found = [(row["length"], row.get("depth"), row.get("seed"), len(row.get("losses", ()))) for row in own]
        if len(set(found)) < len(found):
            raise ValueError(f"results must be of different models, got {model} twice; name each once")
        cells[model] = set(found)
    first, *others = cells
    for other in others:
        if cells[other] != cells[first]:
            raise ValueError(
                f"results must be of the same lengths and samples, got others of {other} than of {first}; evaluate "
                "both alike"
            )


def _lines(rows: Rows, cell: Callable[[Rows], str]) -> list[str]:
    """A table: a line a method, a column a length."""
    lengths = sorted({row["length"] for row in rows})
    beyond = {row["length"] for row in rows if row["beyond_context"]}
    header = ["method", *(f"{length:,}{' *' if length in beyond else ''}" for length in lengths)]
    methods = dict.fromkeys(row["method"] for row in rows)
    own = {name: [row for row in rows if row["method"] == name] for name in methods}
    return markdown_table(
        header,
        [[name, *(cell([r for r in own[name] if r["length"] == length]) for length in lengths)] for name in own],
    )


def _table(rows: Rows, value: str, shape: str) -> str:
    """Of several runs the mean and the range, of several depths the mean."""

    def cell(own: Rows) -> str:
        models = dict.fromkeys(row["model"] for row in own)
        means = [fmean(row[value] for row in own if row["model"] == model) for model in models]
        spread = f" ({shape.format(min(means))} to {shape.format(max(means))})" if len(means) > 1 else ""
        return shape.format(fmean(means)) + spread

    return "\n".join(_lines(rows, cell))


def _growth(rows: Rows, shortest: int) -> str:
    """Of several runs one after the other, each with its interval."""

    def cell(own: Rows) -> str:
        return "; ".join(f"{r['growth']:.2f} ({r['growth_low']:.2f} to {r['growth_high']:.2f})" for r in own)

    return "\n".join(_lines([row for row in rows if row["length"] > shortest], cell))
