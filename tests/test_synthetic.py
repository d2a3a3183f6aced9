"""Training on generated tasks: data without files, any method, and a killed run that goes on exactly."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from collections import Counter
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_asentmax import METHODS
from hf_asentmax.methods import method_name
from hf_asentmax.recall_tasks import CrowdedRecall
from hf_asentmax.synthetic import QUERY_NORM, SIZES, TaskStream, build_synthetic_model
from hf_asentmax.tasks import IGNORED, TASKS, build_task, load_task

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


def test_task_stream_mixes_lengths_behind_one_shape() -> None:
    stream = TaskStream(build_task("copy", symbols=4), 30, (4, 9), seed=5)
    batches = list(islice(stream, 2 * TaskStream.POOL))
    assert {batch[name].shape for batch in batches for name in batch} == {(30, 2 * 9 + 3)}
    rows = [row for batch in batches for row in zip(batch["input_ids"], batch["labels"], strict=True)]
    counts = Counter()
    for ids, labels in rows:
        length = (int((labels != IGNORED).sum())) - 1
        counts[length] += 1
        assert ids[1 : length + 1].tolist() == ids[length + 2 : 2 * length + 2].tolist()
        assert (labels[: length + 2] == IGNORED).all()
        assert labels[length + 2 : 2 * length + 3].tolist() == ids[length + 2 : 2 * length + 3].tolist()
        assert (labels[2 * length + 3 :] == IGNORED).all()
    assert set(counts) == set(range(4, 10))
    expected = len(rows) / 6
    assert max(abs(count - expected) for count in counts.values()) < 4 * expected**0.5
    longest = [int((batch["labels"] != IGNORED).sum(1).max()) for batch in batches]
    shortest = [int((batch["labels"] != IGNORED).sum(1).min()) for batch in batches]
    assert all(low < high for low, high in zip(shortest, longest, strict=True))  # within a batch, not batch by batch
    assert len({tuple(ids.tolist()) for ids, _ in rows}) > 0.7 * len(rows)  # some short ones are drawn again


def test_task_stream_steps_through_its_lengths() -> None:
    (batch,) = islice(TaskStream(build_task("flip_flop"), 50, (6, 10), seed=0), 1)
    ends = (batch["labels"] != IGNORED).int().argmax(1) + 2  # after the bit and <eos>
    assert set(ends.tolist()) == {8, 10, 12}


def test_task_stream_goes_on_where_a_run_left_off() -> None:
    def stream(**settings: int) -> TaskStream:
        return TaskStream(build_task("copy", symbols=4), 3, (4, 9), **({"seed": 5} | settings))

    drawn = list(islice(stream(), 20))
    for begin in (0, 3, 8, 13):
        resumed = stream()
        resumed.begin = lambda begin=begin: begin
        for expected, found in zip(drawn[begin:], islice(resumed, 7), strict=False):
            assert all(torch.equal(found[name], x) for name, x in expected.items())
    others = [stream(seed=6), stream(process=1, processes=2), stream(process=0, processes=2)]
    firsts = [drawn[0], *(next(iter(other)) for other in others)]
    assert torch.equal(firsts[0]["input_ids"], firsts[3]["input_ids"])  # process 0 begins as one process alone does
    for a, b in combinations(firsts[:3], 2):
        assert not torch.equal(a["input_ids"], b["input_ids"])


def test_task_stream_s_filler_changes_nothing() -> None:
    task = build_task("reverse", symbols=4)
    model = build_synthetic_model(task, "asentmax", length=9, sizes=SMALL).eval()
    (batch,) = islice(TaskStream(task, 6, (4, 9), seed=1), 1)
    with torch.no_grad():
        filled = model(batch["input_ids"]).logits
        for row, labels in enumerate(batch["labels"]):
            end = int((labels != IGNORED).nonzero().max()) + 1
            alone = model(batch["input_ids"][row : row + 1, :end]).logits[0]
            assert (filled[row, :end] - alone).abs().max() < 1e-5


@pytest.mark.parametrize("lengths", [(9, 4), (0, 4), (4,)])
def test_task_stream_names_wrong_lengths(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"training lengths must be a pair.*{re.escape(repr(lengths))}"):
        TaskStream(build_task("copy"), 3, lengths, seed=0)


@pytest.mark.parametrize("method", METHODS)
def test_synthetic_models_are_of_the_method_and_the_paper_s_sizes(method: str) -> None:
    task = build_task("copy")
    model = build_synthetic_model(task, method, positions="nope", length=20)
    config = model.config
    assert method_name(config) == method
    assert 0.9 < model.get_input_embeddings().weight.std().item() < 1.1
    found = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size)
    assert found == SIZES["copy"]
    assert (config.head_dim, config.vocab_size, config.positions) == (16, task.vocab_size, "nope")
    assert config.max_position_embeddings == 43  # <bos> source <sep> copy <eos>


@pytest.mark.parametrize(("family", "norms"), [("llama", 0), ("qwen3", 2)])
def test_synthetic_models_start_almost_even(family: str, norms: int) -> None:
    model = build_synthetic_model(build_task("copy"), "asentmax", family=family, sizes=(2, 64, 2, 8))
    starts = [p for name, p in model.named_parameters() if name.endswith("q_norm.weight")]
    assert len(starts) == norms
    assert all(bool((p == QUERY_NORM).all()) for p in starts)
    assert all(bool((p == 1).all()) for name, p in model.named_parameters() if name.endswith("k_norm.weight"))


def test_synthetic_models_of_gemma_2_s_layers_are_the_paper_s() -> None:
    task = build_task("reverse")
    model = build_synthetic_model(task, "asentmax", family="gemma2", length=20)
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (6, 256, 32)
    assert config.layer_types == ["full_attention"] * 6
    assert (config.final_logit_softcapping, config.query_pre_attn_scalar) == (None, 256)
    assert 0.018 < model.get_input_embeddings().weight.std().item() < 0.022  # times 16 in the model
    assert all(layer.self_attn.scaling == 1 / 16 for layer in model.model.layers)


def test_synthetic_models_refuse_an_unknown_family() -> None:
    with pytest.raises(ValueError, match="family must be one of llama, .*'gpt2'"):
        build_synthetic_model(build_task("copy"), "softmax", family="gpt2")


@pytest.mark.parametrize("task", sorted(TASKS))
def test_train_synthetic_trains_every_task(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = ("--min_length", "32", "--max_length", "40", "--lengths", "40")
    results = train(tmp_path, "--task", task, "--max_steps", "5", *lengths, monkeypatch=monkeypatch)
    assert results["steps"] == 5
    assert f"\nmodel and results.json: {tmp_path}\n" in capsys.readouterr().out  # there is no tokenizer
    assert load_task(task, tmp_path) == build_task(task)
    rows = json.loads((tmp_path / "validation" / "results.json").read_text())
    assert [row["length"] for row in rows] == [40]


def test_train_synthetic_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = ("--task", "max_retrieval", "--task_options", '{"priorities": 8, "values": 3}', "--samples", "200")
    options = ("--max_steps", "400", "--per_device_train_batch_size", "64", "--learning_rate", "1e-2")
    train(tmp_path, *task, *options, monkeypatch=monkeypatch)
    (row,) = json.loads((tmp_path / "validation" / "results.json").read_text())
    assert row["accuracy"] > 70  # chance: 33


def test_the_recipe_for_mqmtar_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its defaults on few words, one or two of which a sequence pairs: of one pair the model finds the value."""
    task = ("--task", "mqmtar", "--task_options", '{"symbols": 6, "words": 12, "queries": 1}')
    sizes = ("--sizes", "2", "64", "8", "128", "--per_device_train_batch_size", "64")
    lengths = ("--min_length", "8", "--max_length", "16", "--lengths", "12", "--samples", "200")
    budget = ("--max_steps", "250", "--learning_rate", "3e-3", "--save_strategy", "no")
    results = train(tmp_path, *task, *sizes, *lengths, *budget, monkeypatch=monkeypatch)
    (row,) = json.loads((tmp_path / "validation" / "results.json").read_text())
    assert row["accuracy"] > 95
    assert results["loss"] < 0.15  # 0.6 for a model that knows what an answer looks like and no more


def test_train_synthetic_begins_from_the_recipe_of_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def used(name: str, *options: str) -> dict[str, Any]:
        lengths = ("--min_length", "32", "--max_length", "40", "--lengths", "40", "--max_steps", "2")
        found = train(tmp_path / name, *lengths, *options, monkeypatch=monkeypatch)["settings"]
        return {name: found[name] for name in ("family", "learning_rate", "prune_tolerance", "attention")}

    reverse = {"family": "gemma2", "learning_rate": "0.0004", "prune_tolerance": 1e-5, "attention": "asentmax"}
    assert used("reverse", "--task", "reverse") == reverse
    assert used("own", "--task=reverse", "--family", "llama") == reverse | {"family": "llama"}
    copy = reverse | {"prune_tolerance": 0.0, "attention": "asentmax_learned_alpha"}
    assert used("copy", "--task", "copy") == copy
    assert used("twin", "--task", "copy", "--attention", "softmax") == copy | {"attention": "softmax"}
    plain = {"family": "qwen3", "learning_rate": "0.0005", "prune_tolerance": 0.0, "attention": "asentmax"}
    assert used("none", "--task", "two_back") == plain
    assert used("default") == plain | {"prune_tolerance": 1e-5}  # MQMTAR's
    assert set(runpy.run_path(str(SCRIPT))["RECIPES"]) <= set(TASKS)


def test_train_synthetic_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--task", "copy", "--max_steps", "20", "--save_steps", "10", "--seed", "3")
    options += ("--attention", "asentmax", "--alpha_start", "1")
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


def test_heads_cut_at_half_of_the_steps_stay_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--task", "copy", "--max_steps", "6", "--save_steps", "2", "--prune_tolerance", "1e9")
    options += ("--save_total_limit", "3", "--weight_decay", "0.1")
    weight = "model.layers.0.self_attn.o_proj.weight"
    results = train(tmp_path, *options, monkeypatch=monkeypatch)
    assert results["pruned_heads"] == {"model.layers.0.self_attn": [0, 1]}
    assert {"step": 3, "heads_cut": 2} in results["log"]
    assert load_file(tmp_path / "checkpoint-2" / "model.safetensors")[weight].all()
    expected = load_file(tmp_path / "model.safetensors")
    assert not expected[weight].any()
    for step in (4, 2):  # as if killed after the cut, then before it
        (tmp_path / "model.safetensors").unlink()
        shutil.rmtree(tmp_path / f"checkpoint-{step + 2}")
        assert train(tmp_path, *options, monkeypatch=monkeypatch)["pruned_heads"] == results["pruned_heads"]
        weights = load_file(tmp_path / "model.safetensors")
        assert all(torch.equal(weights[name], x) for name, x in expected.items())
        shutil.rmtree(tmp_path / "checkpoint-6")


def test_train_synthetic_trains_on_hard_negatives_and_judges_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--max_steps", "2", "--min_length", "32", "--max_length", "40", "--lengths", "40")
    plain, hard = (
        train(tmp_path / share, *options, "--hard_negatives", share, monkeypatch=monkeypatch) for share in ("0", "1")
    )
    assert plain["train_loss"] != hard["train_loss"]
    assert load_task(None, tmp_path / "1") == load_task(None, tmp_path / "0") == build_task("mqmtar")
    arguments = runpy.run_path(str(SCRIPT))["SyntheticArguments"]
    assert arguments(hard_negatives=0.5).training_task(build_task("mqmtar")) == CrowdedRecall(share=0.5)
    for wrong in ({"hard_negatives": 1.5}, {"hard_negatives": 0.5, "task": "copy"}):
        with pytest.raises(ValueError, match="hard_negatives must be in .* got"):
            arguments(**wrong)


def test_train_synthetic_names_wrong_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="sizes must be layers, width, heads and MLP width.*32, 0"):
        train(tmp_path, "--sizes", "1", "32", "0", "64", monkeypatch=monkeypatch)


@pytest.mark.parametrize("tolerance", ["-1e-6", "nan", "inf"])
def test_train_synthetic_names_a_wrong_tolerance_before_it_trains(
    tolerance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="prune_tolerance must be at least 0 and finite, got"):
        train(tmp_path / "run", f"--prune_tolerance={tolerance}", monkeypatch=monkeypatch)
    assert not (tmp_path / "run").exists()
