"""The `evaluate` metrics: loaded from their files without a network, on values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import evaluate
import pytest
from helpers import random_tokens, tiny_model

from hf_asentmax import metrics
from hf_asentmax.evaluation import wilson_interval
from hf_asentmax.perplexity import perplexity_by_length, token_losses

FOLDER = Path(metrics.__file__).parent
CASES: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "exact_match": (
        {"predictions": [" 42\n", "42.", "7", ""], "references": ["42", "42", "7", " "]},
        {"exact_match": 75.0, "samples": 4},
    ),
    "needle_recall": (
        {"predictions": ["They are 12 and x.", "None."], "references": [["12", "X", "56"], ["9"]]},
        {"needle_recall": 100 / 3, "all_found": 0.0, "samples": 2},
    ),
    "perplexity": ({"predictions": [[0.0, math.log(4)], [math.log(16)]]}, {"perplexity": 4.0, "tokens": 3}),
}


def load(name: str) -> evaluate.Metric:
    return evaluate.load(str(FOLDER / f"{name}.py"))


def test_metrics_tested_are_those_that_there_are() -> None:
    assert set(CASES) == {file.stem for file in FOLDER.glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("name", CASES)
def test_metrics_give_the_values_worked_out_by_hand(name: str) -> None:
    given, wanted = CASES[name]
    found = load(name).compute(**given)
    assert {key: found[key] for key in wanted} == pytest.approx(wanted)
    assert all(isinstance(value, (int, float)) for value in found.values())


@pytest.mark.parametrize("name", CASES)
def test_metrics_do_not_depend_on_the_batches(name: str) -> None:
    given, _ = CASES[name]
    metric = load(name)
    for row in zip(*given.values(), strict=True):
        metric.add_batch(**{key: [value] for key, value in zip(given, row, strict=True)})
    assert metric.compute() == load(name).compute(**given)


@pytest.mark.parametrize("name", CASES)
def test_metrics_keep_the_promise_of_their_example(name: str) -> None:
    lines = [line.strip().removeprefix(">>> ") for line in load(name).inputs_description.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith(("metric =", "evaluate.load")))
    *code, expression, wanted = [
        line.replace("hf_asentmax/metrics", FOLDER.as_posix()) for line in lines[start:] if line
    ]
    names: dict[str, Any] = {"evaluate": evaluate}
    for line in code:
        exec(line, names)
    assert eval(expression, names) == pytest.approx(float(wanted))


def test_exact_match_has_the_interval_of_the_tables() -> None:
    found = load("exact_match").compute(predictions=list("abcd"), references=list("abxy"))
    assert (found["low"], found["high"]) == pytest.approx(wilson_interval(2, 4))


def test_perplexity_metric_agrees_with_the_evaluation() -> None:
    model, documents = tiny_model("llama"), [random_tokens(24, seed=seed) for seed in range(3)]
    losses = [token_losses(model, ids[None], 8)[0].tolist() for ids in documents]
    (row,) = perplexity_by_length(model, [ids.tolist() for ids in documents], [24], scored=8)
    found = load("perplexity").compute(predictions=losses)
    assert {name: found[name] for name in ("perplexity", "low", "high")} == pytest.approx(
        {name: row[name] for name in ("perplexity", "low", "high")}, rel=1e-5
    )


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("needle_recall", {"predictions": ["a", "b"], "references": [["a"], []]}),
        ("perplexity", {"predictions": [[1.0], []]}),
    ],
)
def test_metrics_refuse_what_has_no_value(name: str, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must hold at least one .*, got"):
        load(name).compute(**given)
