"""Perplexity from token losses as an `evaluate` metric; `evaluate.load("PATH/perplexity.py")` needs no Hub."""

from __future__ import annotations

import math

import datasets
import evaluate
import numpy as np

_DESCRIPTION = (
    "exp of the mean negative log-likelihood of all tokens, with a 95 % interval bootstrapped over the documents."
)

_INPUTS = """
Args:
    predictions: list of lists of float, the negative log-likelihood in nats of each scored token of each document, as
        `hf_asentmax.perplexity.token_losses` gives it. No model is run here.
Returns:
    perplexity: at least 1 for proper likelihoods.
    low, high: its 95 % interval, from 2,000 bootstrap draws of documents with a fixed seed.
    documents, tokens: how many there were.
Example:
    >>> evaluate.load("hf_asentmax/metrics/perplexity.py").compute(predictions=[[0.0, 1.386294361]])["perplexity"]
    2.0
"""


class Perplexity(evaluate.Metric):
    """See the module's docstring."""

    def _info(self) -> evaluate.MetricInfo:
        losses = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": losses}),
        )

    def _compute(self, predictions: list[list[float]]) -> dict[str, float]:
        if not all(len(document) for document in predictions):
            raise ValueError(
                "predictions must hold at least one token loss for each document, got an empty list; drop it"
            )
        sums = np.array([math.fsum(document) for document in predictions])
        counts = np.array([len(document) for document in predictions])
        draws = np.random.default_rng(0).integers(0, len(sums), size=(2000, len(sums)))
        low, high = np.quantile(sums[draws].sum(1) / counts[draws].sum(1), [0.025, 0.975])
        return {
            "perplexity": math.exp(sums.sum() / counts.sum()),
            "low": math.exp(low),
            "high": math.exp(high),
            "documents": len(sums),
            "tokens": int(counts.sum()),
        }
