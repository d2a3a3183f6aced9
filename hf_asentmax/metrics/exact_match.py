"""Exact match as an `evaluate` metric; `evaluate.load("PATH/exact_match.py")` needs no Hub."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from hf_asentmax.evaluation import wilson_interval

_DESCRIPTION = (
    "Share of the predictions that equal their reference, white space at the ends aside, with Wilson's 95 % interval."
)

_INPUTS = """
Args:
    predictions: list of str.
    references: list of str, as many.
Returns:
    exact_match: in %.
    low, high: its 95 % interval.
    samples: how many there were.
Example:
    >>> metric = evaluate.load("hf_asentmax/metrics/exact_match.py")
    >>> metric.compute(predictions=["7", "8"], references=["7", "9"])["exact_match"]
    50.0
"""


class ExactMatch(evaluate.Metric):
    """See the module's docstring."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        same = [one.strip() == other.strip() for one, other in zip(predictions, references, strict=True)]
        low, high = wilson_interval(sum(same), len(same))
        return {"exact_match": 100 * sum(same) / len(same), "low": low, "high": high, "samples": len(same)}
