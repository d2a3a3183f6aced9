"""The demo: fair twins, and everything that it promises to leave behind, at a size that takes seconds."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_asentmax import demo
from hf_asentmax.demo import DemoArguments, build_twin, comparison_table, run_demo, samples_at, train_twin
from hf_asentmax.tasks import IGNORED, MaxRetrieval, build_task, load_task, sample_batch

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "demo.py"
TINY: dict[str, Any] = {
    "steps": 12,
    "batch_size": 8,
    "train_length": 8,
    "lengths": [8, 16],
    "samples": 20,
    "priorities": 6,
    "values": 3,
    "hidden_size": 16,
    "heads": 2,
}


def test_twins_start_as_the_same_function() -> None:
    args = DemoArguments(**TINY)
    softmax, asentmax = (build_twin(method, args).eval() for method in ("softmax", "asentmax"))
    theirs = softmax.state_dict()
    ours = asentmax.state_dict()
    assert {name for name in ours if name not in theirs} == {name for name in ours if ".query_scale." in name}
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    demo.set_alpha(asentmax, 1.0)
    ids = sample_batch(MaxRetrieval(priorities=6, values=3), 2, 8)["input_ids"]
    torch.testing.assert_close(asentmax(ids).logits, softmax(ids).logits)


def test_twins_see_the_same_training_batches_and_none_of_the_test_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[tuple[Any, ...]]] = {"softmax": [], "asentmax": []}
    original = demo.sample_batch
    for method, calls in seen.items():

        def record(task: Any, size: int, length: int, calls: list[Any] = calls, **options: Any) -> Any:
            calls.append((size, length, sorted(options.items())))
            return original(task, size, length, **options)

        monkeypatch.setattr(demo, "sample_batch", record)
        train_twin(method, DemoArguments(**TINY))
    assert seen["softmax"] == seen["asentmax"]
    assert len(seen["softmax"]) == 12
    assert {length for _, length, _ in seen["softmax"]} <= set(range(4, 9))
    assert all("stream" not in dict(options) for _, _, options in seen["softmax"])  # "train" by default


def test_answer_loss_counts_every_label_wherever_the_rows_have_theirs() -> None:
    model = build_twin("asentmax", DemoArguments(**TINY))
    batch = sample_batch(build_task("two_back"), 8, 20)
    batch["labels"][0, :10] = IGNORED
    batch["labels"][1:, 15:] = IGNORED
    torch.testing.assert_close(demo._answer_loss(model, batch), model(**batch).loss)


def test_alpha_arrives_and_is_what_the_config_says() -> None:
    model, loss = train_twin("asentmax", DemoArguments(**TINY))
    assert model.config.entmax_alpha == 1.5
    assert 0 < loss < 20
    assert any(bool(w.any()) for name, w in model.named_parameters() if ".query_scale." in name)


def test_twins_learn() -> None:
    args = DemoArguments(**TINY | {"steps": 150, "batch_size": 32, "learning_rate": 1e-2, "hidden_size": 32})
    for method in ("softmax", "asentmax"):
        _, loss = train_twin(method, args)
        assert loss < 0.7, method  # guessing one of three values costs 1.1


def test_demo_leaves_what_it_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    options = [f"--{name}={value}" for name, value in TINY.items() if name != "lengths"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options, "--lengths", "8", "16", "--output_dir", str(tmp_path)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out

    results = json.loads((tmp_path / "results.json").read_text())
    assert [(row["method"], row["seed"], row["length"], row["samples"]) for row in results] == [
        (method, 0, length, 20) for method in ("softmax", "asentmax") for length in (8, 16)
    ]
    assert all(0 <= row["low"] <= row["accuracy"] <= row["high"] <= 100 for row in results)
    assert (tmp_path / "results.md").read_text().strip() in printed
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
    card = (tmp_path / "README.md").read_text()
    assert "ladder.png" in card
    assert "max_retrieval" in card
    assert load_task("max_retrieval", tmp_path) == MaxRetrieval(priorities=6, values=3)

    kinds = {folder: AutoModelForCausalLM.from_pretrained(folder).config for folder in (tmp_path, tmp_path / "softmax")}
    assert [config.entmax_alpha for config in kinds.values()] == [1.5, 1.0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("5:v2 0:v0 ?").input_ids == [3 + 1 + 5 * 3 + 2, 3 + 1, 0]
    assert printed.count("-> v") == 3
    assert "right: v" in printed


def test_comparison_table_puts_the_twins_side_by_side() -> None:
    rows = [
        {"method": method, "length": 1024, "accuracy": share, "low": share - 1, "high": share + 1, "samples": 9}
        for method, share in (("softmax", 40.0), ("asentmax", 99.0))
    ]
    assert (
        comparison_table(rows).splitlines()[-1] == "|  1,024 | 40.0 (39.0 to 41.0) | 99.0 (98.0 to 100.0) |       9 |"
    )


def test_longer_sources_get_fewer_samples() -> None:
    assert [samples_at(length, 500) for length in (32, 512, 1024, 2048, 65536)] == [500, 500, 250, 125, 50]
    assert samples_at(65536, 20) == 20


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"train_length": 1}, {"hidden_size": 15}])
def test_demo_refuses_bad_settings(wrong: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        run_demo(DemoArguments(**TINY | wrong, output_dir=str(tmp_path / "demo")))
    assert not (tmp_path / "demo").exists()
