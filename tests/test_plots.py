"""Pictures: drawn from rows and logs, written as PNG of a readable size."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from hf_asentmax.plots import plot_heatmap, plot_ladder, plot_perplexity, plot_training, write_report


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


def test_heatmap_of_several_runs_shows_their_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr("hf_asentmax.plots.write_figure", lambda figure, path: figures.append(figure))
    plot_heatmap([row("asentmax", 64, depth=0) | {"accuracy": share} for share in (20.0, 70.0)], tmp_path / "map.png")
    assert [text.get_text() for text in figures[0].axes[0].texts] == ["45"]


def test_perplexity_is_drawn_with_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"method": method, "model": f"{method} {seed}", "length": length, "perplexity": 9.0, "low": 8.0, "high": 11.0}
        for method in ("softmax", "asentmax") for seed in (0, 1) for length in (64, 128)
    ]  # fmt: skip
    assert min(png_size(plot_perplexity(rows, tmp_path / "perplexity.png", title="text"))) > 400
    figures: list[Any] = []
    monkeypatch.setattr("hf_asentmax.plots.write_figure", lambda figure, path: figures.append(figure))
    plot_perplexity(rows, tmp_path / "perplexity.png")
    labels = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert labels == ["softmax (mean of 2 runs)", "asentmax (mean of 2 runs)"]
    assert figures[0].axes[0].get_yscale() == "log"
    plot_perplexity([rows[0], rows[1] | {"perplexity": 900.0, "high": 1000.0}], tmp_path / "perplexity.png")
    assert figures[1].axes[0].get_ylim()[1] == pytest.approx(32)  # what fails leaves the picture


def test_pictures_of_many_methods_have_room(tmp_path: Path) -> None:
    """Panels go into lines, the legend beside the picture, and no two methods look alike."""
    methods = [f"method {i}" for i in range(9)]
    rows = [row(method, length) for method in methods for length in (64, 128)]
    few = png_size(plot_ladder(rows[:4], tmp_path / "few.png"))
    assert png_size(plot_ladder(rows, tmp_path / "many.png"))[0] > few[0] + 200
    cells = [row(method, length, depth=depth) for method in methods for length in (64, 128) for depth in (0, 50)]
    width, height = png_size(plot_heatmap(cells, tmp_path / "heatmap.png"))
    assert width < 2 * height + 500


def test_methods_look_different(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr("hf_asentmax.plots.write_figure", lambda figure, path: figures.append(figure))
    plot_ladder([row(f"method {i}", length) for i in range(16) for length in (64, 128)], tmp_path / "ladder.png")
    thick = [line for line in figures[0].axes[0].lines if line.get_linewidth() > 2]
    assert len({(line.get_color(), line.get_linestyle()) for line in thick}) == 16


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
