"""Results of several evaluations, put together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_asentmax import cli
from hf_asentmax.joining import JoinArguments, run_join

LENGTHS = (64, 128)


def perplexity_rows(model: str, method: str, *, more: float = 0.0, tail: str = "") -> list[dict[str, Any]]:
    """Of three documents, with losses of 1, 2 and 3 nats, and so many more at the longer length."""
    rows = []
    for length in LENGTHS:
        losses = [1 + more * (length > 64), 2 + more * (length > 64), 3 + more * (length > 64)]
        perplexity = float(np.exp(np.mean(losses)))
        rows.append({"model": f"{model}{tail}", "method": f"{method}{tail}", "length": length, "losses": losses})
        rows[-1] |= {"perplexity": perplexity, "low": 0.9 * perplexity, "high": 1.1 * perplexity, "documents": 3}
        rows[-1] |= {"tokens": 24, "beyond_context": length > 64}
    return rows


def accuracy_rows(model: str, accuracy: float, depths: tuple[float, ...] = (0.0, 100.0)) -> list[dict[str, Any]]:
    return [
        {"task": f"needle at depth {depth:g} %", "model": model, "method": "entmax", "seed": 0, "length": length}
        | {"depth": depth, "accuracy": accuracy + depth / 10, "low": 0.0, "high": 100.0, "samples": 20}
        | {"beyond_context": False}
        for length in LENGTHS
        for depth in depths
    ]


def save(path: Path, content: Any) -> str:
    path.mkdir(parents=True)
    (path / "results.json").write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def joined(tmp_path: Path, *contents: Any, method: list[str] | None = None, **options: Any) -> str:
    given = [save(tmp_path / str(i), content) for i, content in enumerate(contents)]
    return "\n".join(run_join(JoinArguments(results=given, method=method, **options)))


def cells(text: str, name: str) -> list[list[str]]:
    """What stands behind a name in each table."""
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if "|" in line]
    return [line[1:] for line in lines if line[0] == name]


def test_perplexities_are_compared_document_by_document(tmp_path: Path) -> None:
    softmax = perplexity_rows("a", "softmax", more=np.log(4)) + perplexity_rows("a", "softmax", tail=", yarn:8")
    ours = perplexity_rows("b", "asentmax", more=np.log(0.5))
    text = joined(
        tmp_path,
        {"by_length": softmax},
        {"by_length": ours},
        method=["softmax, RoPE", "ASEntmax"],
        output_dir=str(tmp_path / "out"),
    )
    whole = np.exp(2)
    assert cells(text, "softmax, RoPE") == [[f"{whole:.2f}", f"{4 * whole:.2f}"], ["4.00 (4.00 to 4.00)"]]
    assert cells(text, "softmax, RoPE, yarn:8")[1] == ["1.00 (1.00 to 1.00)"]
    assert cells(text, "ASEntmax") == [[f"{whole:.2f}", f"{whole / 2:.2f}"], ["0.50 (0.50 to 0.50)"]]
    assert cells(text, "method")[0] == ["64", "128 *"]
    rows = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert [row["ratio"] for row in rows if row["method"] == "ASEntmax"] == pytest.approx([1.0, 1 / 8])
    assert (tmp_path / "out" / "perplexity.png").stat().st_size > 10_000


def test_one_model_read_in_two_ways_is_no_two_runs(tmp_path: Path) -> None:
    """Given names or the evaluation's own, which say nothing of the reading where --method was given there."""
    ways = ("yarn:4", "blocks:4096", "yarn:1:1.3, blocks:4096")
    rows = [[row | {"method": "twin"} for row in perplexity_rows("a", "", tail=f", {way}")] for way in ways]
    for method in (None, ["twin"] * 3):
        text = joined(tmp_path / str(method), *({"by_length": own} for own in rows), method=method)
        assert [len(cells(text, f"twin, {way}")) for way in ways] == [2, 2, 2]


def test_one_name_is_several_runs_with_their_mean_and_range(tmp_path: Path) -> None:
    text = joined(
        tmp_path,
        accuracy_rows("a", 40.0),
        accuracy_rows("b", 70.0),
        method=["x", "x"],
        output_dir=str(tmp_path / "out"),
    )
    assert cells(text, "x") == [["60 (45 to 75)"] * 2]  # depths 0 and 100 %: 40 and 50, 70 and 80
    assert "needle: accuracy, %, mean over the depths 0, 100 %; 20 samples a depth and length." in text
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"results.json", "results.md", "heatmap.png"}
    perplexities = [{"by_length": perplexity_rows(name, "x", more=more)} for name, more in (("a", 0.0), ("b", 0.1))]
    text = joined(tmp_path / "more", *perplexities)
    assert cells(text, "x")[0] == ["7.39 (7.39 to 7.39)", "7.78 (7.39 to 8.17)"]
    assert cells(text, "x")[1] == ["1.00 (1.00 to 1.00); 1.11 (1.11 to 1.11)"]


def test_results_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    rows = accuracy_rows("a", 50.0)
    other_task = [row | {"task": "passkey", "model": "b"} for row in rows]
    fewer = [row | {"model": "b"} for row in rows if row["length"] == 64]
    other_documents = [row | {"losses": row["losses"][:2]} for row in perplexity_rows("b", "softmax")]
    for number, (contents, message) in enumerate(
        [
            ((rows, other_task), "one task, got needle, passkey"),
            ((rows, rows), "different models, got a twice"),
            ((rows, fewer), "same lengths and samples"),
            ((perplexity_rows("a", "softmax"), other_documents), "same lengths and samples"),
            (([{"loss": 1.0}],), "rows with length, method, model"),
            (([],), "rows with length, method, model"),
            (({"settings": {}},), "rows with length, method, model"),
        ]
    ):
        with pytest.raises(ValueError, match=message):
            joined(tmp_path / str(number), *contents)
    with pytest.raises(ValueError, match="name each of the 1 results"):
        joined(tmp_path / "names", rows, method=["x", "y"])
    with pytest.raises(FileNotFoundError, match="what evaluate wrote"):
        list(run_join(JoinArguments(results=[str(tmp_path / "nothing")])))
    (tmp_path / "results.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="must be JSON"):
        list(run_join(JoinArguments(results=[str(tmp_path)])))


def test_the_command_prints_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = save(tmp_path / "a", accuracy_rows("a", 50.0))
    cli.main(["evaluate", "join", "--results", given, "--method", "mine"])
    assert cells(capsys.readouterr().out, "mine") == [["55", "55"]]
