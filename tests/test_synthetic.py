"""Training on generated tasks: data without files, any method, and a killed run that goes on exactly."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_asentmax import METHODS
from hf_asentmax.methods import method_name
from hf_asentmax.synthetic import SIZES, TaskStream, build_synthetic_model
from hf_asentmax.tasks import TASKS, build_task, load_task, sample_training_batch

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_synthetic.py"
SMALL = (1, 32, 2, 64)


def train(folder: Path, *options: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    sizes = ("--sizes", *map(str, SMALL), "--per_device_train_batch_size", "8", "--use_cpu", "--disable_tqdm", "true")
    ladder = ("--lengths", "8", "--samples", "5", "--min_length", "4", "--max_length", "8", "--logging_steps", "5")
    arguments = ["train_synthetic.py", *sizes, *ladder, "--output_dir", str(folder), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def test_task_stream_gives_the_training_stream_in_turns_to_the_processes() -> None:
    task = build_task("copy", symbols=4)
    streams = [TaskStream(task, 3, (4, 9), seed=5, process=process, processes=2) for process in range(2)]
    drawn = [list(islice(stream, 3)) for stream in streams]
    for index in range(6):
        expected = sample_training_batch(task, 3, (4, 9), seed=5, index=index)
        found = drawn[index % 2][index // 2]
        assert all(torch.equal(found[name], x) for name, x in expected.items())
    streams[1].begin = lambda: 2
    resumed = next(iter(streams[1]))
    assert torch.equal(resumed["input_ids"], drawn[1][2]["input_ids"])


@pytest.mark.parametrize("method", METHODS)
def test_synthetic_models_are_of_the_method_and_the_paper_s_sizes(method: str) -> None:
    task = build_task("copy")
    config = build_synthetic_model(task, method, positions="nope", length=20).config
    assert method_name(config) == method
    found = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size)
    assert found == SIZES["copy"]
    assert (config.head_dim, config.vocab_size, config.positions) == (16, task.vocab_size, "nope")
    assert config.max_position_embeddings == 41  # source, separator, copy


def test_synthetic_models_refuse_an_unknown_family() -> None:
    with pytest.raises(ValueError, match="family must be one of llama, .*'gpt2'"):
        build_synthetic_model(build_task("copy"), "softmax", family="gpt2")


@pytest.mark.parametrize("task", sorted(TASKS))
def test_train_synthetic_trains_every_task(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = ("--min_length", "32", "--max_length", "40", "--lengths", "40")
    results = train(tmp_path, "--task", task, "--max_steps", "5", *lengths, monkeypatch=monkeypatch)
    assert results["steps"] == 5
    assert load_task(task, tmp_path) == build_task(task)
    rows = json.loads((tmp_path / "validation" / "results.json").read_text())
    assert [row["length"] for row in rows] == [40]


def test_train_synthetic_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = ("--task", "max_retrieval", "--task_options", '{"priorities": 8, "values": 3}', "--samples", "200")
    options = ("--max_steps", "400", "--per_device_train_batch_size", "64", "--learning_rate", "1e-2")
    train(tmp_path, *task, *options, monkeypatch=monkeypatch)
    (row,) = json.loads((tmp_path / "validation" / "results.json").read_text())
    assert row["accuracy"] > 70  # chance: 33


def test_train_synthetic_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--task", "copy", "--max_steps", "20", "--save_steps", "10", "--seed", "3", "--alpha_start", "1")
    train(tmp_path / "whole", *options, monkeypatch=monkeypatch)
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", killed)
    for name in ("model.safetensors", "results.json"):
        (killed / name).unlink()
    shutil.rmtree(killed / "checkpoint-20")
    results = train(killed, *options, monkeypatch=monkeypatch)
    assert results["steps"] == 20
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(weights[name], x) for name, x in expected.items())


def test_train_synthetic_names_wrong_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="sizes must be layers, width, heads and MLP width.*32, 0"):
        train(tmp_path, "--sizes", "1", "32", "0", "64", monkeypatch=monkeypatch)
