"""Needle recall as an `evaluate` metric; `evaluate.load("PATH/needle_recall.py")` needs no Hub.

Reference: arXiv 2404.06654 (RULER), the score of its needle tasks.
"""

from __future__ import annotations

import datasets
import evaluate

_DESCRIPTION = "Mean share, in %, of the needles that a prediction contains, whatever the case: RULER's string match."

_INPUTS = """
Args:
    predictions: list of str, what the model wrote.
    references: list of lists of str, the needles of each prediction, one or several.
Returns:
    needle_recall: in %.
    all_found: predictions that contain all of their needles, in %.
    samples: how many predictions there were.
Example:
    >>> metric = evaluate.load("hf_asentmax/metrics/needle_recall.py")
    >>> metric.compute(predictions=["It is 12 or 13."], references=[["12", "15"]])["needle_recall"]
    50.0
"""


class NeedleRecall(evaluate.Metric):
    """See the module's docstring."""

    def _info(self) -> evaluate.MetricInfo:
        needles = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string"), "references": needles}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        if not all(len(needles) for needles in references):
            raise ValueError("references must hold at least one needle for each prediction, got an empty list; drop it")
        shares = [
            sum(needle.lower() in text.lower() for needle in needles) / len(needles)
            for text, needles in zip(predictions, references, strict=True)
        ]
        return {
            "needle_recall": 100 * sum(shares) / len(shares),
            "all_found": 100 * sum(share == 1 for share in shares) / len(shares),
            "samples": len(shares),
        }
