"""What evaluations share: intervals and tables."""

from __future__ import annotations

import pytest
from helpers import tiny_model
from retrieval_setup import Reader

from hf_asentmax.evaluation import result_row, results_table, wilson_interval
from hf_asentmax.retrieval import retrieve


@pytest.mark.parametrize(
    ("correct", "samples", "low", "high"), [(8, 10, 49.02, 94.33), (0, 10, 0, 27.75), (10, 10, 72.25, 100)]
)
def test_wilson_interval_equals_published_values(correct: int, samples: int, low: float, high: float) -> None:
    assert wilson_interval(correct, samples) == pytest.approx((low, high), abs=0.01)


def test_results_table_notes_lengths_beyond_the_context() -> None:
    reader = Reader(limit=550)
    table = results_table(retrieve(reader, reader.tokenizer, "needle", [500, 1600], depths=[25], samples=2))
    assert "| softmax |             0 |     500 |  25 % |       100.0 | 34.2 to 100.0 |       2 |" in table
    assert "| samples' seed |" in table  # not that of training
    assert "| 1,600 * |" in table
    assert table.endswith("config states (max_position_embeddings); not cut.")
    assert "max_position_embeddings" not in results_table(
        retrieve(reader, reader.tokenizer, "passkey", [400], samples=2)
    )


def test_results_table_names_the_models_where_several_are_of_one_method() -> None:
    row = result_row("sort", tiny_model("llama"), 0, 16, [True], 20)
    rows = [row | {"model": name} for name in ("runs/a", "runs/b")]
    table = results_table(rows)
    assert "| softmax | runs/a |" in table
    assert "| softmax | runs/b |" in table
    named = results_table([row | {"method": name} for name, row in zip("ab", rows, strict=True)])
    assert "model" not in named.partition("\n")[0]
    assert results_table(rows[:1]) == results_table([row])
