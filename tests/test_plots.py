"""Pictures: drawn from rows and logs, written as PNG of a readable size."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from hf_asentmax.plots import plot_heatmap, plot_ladder, plot_training, write_report


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def row(method: str, length: int, seed: int = 0, **more: float) -> dict[str, object]:
    interval = {"accuracy": 80.0, "low": 70.0, "high": 90.0}
    about = {"task": "passkey", "method": method, "seed": seed, "length": length, "samples": 20, "token_accuracy": 90.0}
    return about | interval | {"beyond_context": length > 64} | more


def test_ladder_and_heatmap_are_drawn(tmp_path: Path) -> None:
    rows = [row(method, length, seed) for method in ("softmax", "asentmax") for length in (64, 128) for seed in (0, 1)]
    assert min(png_size(plot_ladder(rows, tmp_path / "ladder.png", train_length=64))) > 400
    cells = [row("asentmax", length, depth=depth) for length in (64, 128) for depth in (0, 50, 100)]
    assert min(png_size(plot_heatmap(cells, tmp_path / "heatmap.png"))) > 300


def test_ladder_draws_models_of_one_method_as_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr("hf_asentmax.plots.write_figure", lambda figure, path: figures.append(figure))
    rows = [row("asentmax", length) | {"model": model} for model in ("one", "two") for length in (64, 128)]
    plot_ladder(rows, tmp_path / "ladder.png")
    (axes,) = figures[0].axes
    assert axes.get_legend_handles_labels()[1] == ["asentmax (mean of 2 runs)"]
    assert sorted({len(line.get_xdata()) for line in axes.lines}) == [2]


def test_training_picture_is_drawn_from_logs(tmp_path: Path) -> None:
    log = [
        {"step": 10 * i, "loss": 2.0 / i, "zero_share": 0.1 * i, "entmax_alpha": 1 + 0.1 * i, "support_size": 9.0}
        for i in (1, 2, 3)
    ]
    dense = [{**entry, "zero_share": 0.0, "entmax_alpha": 1.0} for entry in log]
    runs = {"asentmax": {"log": log}, "softmax": {"log": dense}}
    assert png_size(plot_training(runs, tmp_path / "training.png"))[0] > 1000


def test_report_holds_rows_table_and_picture(tmp_path: Path) -> None:
    paths = write_report([row("asentmax", 64), row("asentmax", 128)], tmp_path / "report")
    assert sorted(path.name for path in paths) == ["ladder.png", "results.json", "results.md"]
    assert "128" in paths[1].read_text()
