"""What evaluations share: rows of results with their intervals, the table of them, eval mode and progress."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import sqrt
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .methods import method_name
from .sharding import is_main


def wilson_interval(correct: float, samples: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share, in %."""
    quantile, right = 1.959964, correct / samples
    spread = quantile**2 / samples
    middle = (right + spread / 2) / (1 + spread)
    half = quantile / (1 + spread) * sqrt(right * (1 - right) / samples + spread / (4 * samples))
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def result_row(
    task: str, model: PreTrainedModel, seed: int, length: int, hits: Sequence[float], tokens: int
) -> dict[str, Any]:
    """One cell of an evaluation.

    Args:
        task: its name.
        model: whose config says the rest.
        seed: from which the samples are drawn.
        length: of the cell, in tokens.
        hits: which samples are right, or the share of each that is.
        tokens: length of the longest sequence.

    Returns:
        task, method, positions (None of a model whose config says none), seed, length, accuracy in %, its 95 % interval
        (low, high), samples, and beyond_context, whether the sequences are longer than the config says.
    """
    low, high = wilson_interval(sum(hits), len(hits))
    limit = getattr(model.config, "max_position_embeddings", None)
    return {
        "task": task,
        "method": method_name(model.config),
        "positions": getattr(model.config, "positions", None),
        "seed": seed,
        "length": length,
        "accuracy": 100 * sum(hits) / len(hits),
        "low": low,
        "high": high,
        "samples": len(hits),
        "beyond_context": limit is not None and tokens > limit,
    }


def check_positive(**values: Sequence[int]) -> None:
    """Raise ValueError unless each list has something in it, and nothing below 1."""
    for name, given in values.items():
        if not given or min(given) < 1:
            raise ValueError(f"{name} must be positive, got {list(given)!r}; give at least 1")


def progress_bar(what: str, total: int) -> tqdm:
    """A bar of so many samples, on the process that reports."""
    return tqdm(total=total, desc=what, unit=" samples", leave=False, disable=not is_main())


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """No gradients and eval mode; the model is left as it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, its columns aligned."""
    cells = [list(header), *map(list, lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of a ladder or of `retrieve` as a Markdown table, with a note where one is needed.

    It names the models where several are of one method.
    """
    titles = {"method": "method", "model": "model", "seed": "samples' seed", "length": "length", "depth": "depth"}
    titles |= {"accuracy": "accuracy, %", "": "95 % interval", "token_accuracy": "answer tokens, %"}
    titles["samples"] = "samples"
    if len({(row["method"], row.get("model")) for row in rows}) == len({row["method"] for row in rows}):
        del titles["model"]
    columns = [name for name in titles if name == "" or name in rows[0]]
    lines = [[titles[name] for name in columns]]
    for row in rows:
        cells = {name: str(row[name]) for name in columns if name}
        cells["length"] = f"{row['length']:,}{' *' if row['beyond_context'] else ''}"
        cells[""] = f"{row['low']:.1f} to {row['high']:.1f}"
        cells |= {name: f"{row[name]:.1f}" for name in ("accuracy", "token_accuracy") if name in row}
        if "depth" in row:
            cells["depth"] = f"{row['depth']:g} %"
        lines.append([cells[name] for name in columns])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    text = ["| " + " | ".join(map(str.rjust, line, widths)) + " |" for line in lines]
    return "\n".join(text + beyond_context_note(rows))


def beyond_context_note(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The lines after a table that say what its "*" means, if there is one."""
    if not any(row.get("beyond_context") for row in rows):
        return []
    return ["", "\\* longer than the context that the model's config states (max_position_embeddings); not cut."]


def model_names(given: Sequence[str] | None, models: Sequence[str]) -> list[str | None]:
    """What to call each model in the results; None, for all of them: by the kind of its attention.

    Raises:
        ValueError: not every model has a name.
    """
    if given and len(given) != len(models):
        raise ValueError(f"method must name each of the {len(models)} models, got {list(given)!r}; name them all")
    return list(given) if given else [None] * len(models)
