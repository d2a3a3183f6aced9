"""scripts/finetune.py and scripts/pretrain.py as a user runs them, killed runs included."""

from __future__ import annotations

import json
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_tokens, tiny_config
from processes import run_python
from safetensors.torch import load_file
from training_setup import tiny_texts, tiny_tokenizer, write_model, write_texts
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from hf_asentmax import ASEntmaxForCausalLM, patch_model

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"

# Runs a script and kills its own process: at the beginning of a step, or with the weights of a checkpoint written and
# the rest not.
KILLED = """
import os, runpy, signal, sys
from hf_asentmax.training import ASEntmaxTrainer

moment, step = sys.argv[1].split(":")
method = {"step": "training_step", "save": "_save_optimizer_and_scheduler"}[moment]
original = getattr(ASEntmaxTrainer, method)

def kill_then(self, *args, **kwargs):
    if self.state.global_step == int(step):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)

setattr(ASEntmaxTrainer, method, kill_then)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A softmax model with its tokenizer in native/, its config.json, and texts in a.jsonl and b.jsonl."""
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "native")
    write_texts(folder / "a.jsonl", tiny_texts(20))
    write_texts(folder / "b.jsonl", tiny_texts(20, seed=1))
    return folder


def command(script: str, inputs: Path, output: Path, *options: str) -> list[str]:
    source = {
        "finetune": ["--model", str(inputs / "native")],
        "pretrain": ["--config", str(inputs / "native" / "config.json"), "--tokenizer", str(inputs / "native")],
    }[script]
    shared = """--sequence_length 16 --per_device_train_batch_size 4 --max_steps 8 --save_steps 2 --logging_steps 2
        --learning_rate 1e-2 --query_scale_learning_rate 5e-2 --disable_tqdm true --use_cpu true"""
    data = ["--data", str(inputs / "a.jsonl"), "--output_dir", str(output)]
    return [str(SCRIPTS / f"{script}.py"), *source, *data, *shared.split(), *options]


def run(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(arguments[0], run_name="__main__")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*model.safetensors")
    return load_file(path)


@pytest.mark.parametrize(
    ("moments", "options", "set_aside"),
    [
        (["step:5"], ["--streaming", "--shuffle_buffer", "5"], []),
        (["save:8"], ["--gradient_accumulation_steps", "2"], ["incomplete-checkpoint-8"]),
        (["step:1", "step:3"], ["--lora_r", "2", "--lora_dropout", "0.2", "--gradient_checkpointing"], []),
    ],
    ids=["between checkpoints, streamed", "within a checkpoint, second epoch", "twice, adapter"],
)
def test_finetune_killed_and_run_again_ends_with_the_same_weights(
    moments: list[str],
    options: list[str],
    set_aside: list[str],
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(monkeypatch, command("finetune", inputs, tmp_path / "whole", *options))
    arguments = command("finetune", inputs, tmp_path / "killed", *options)
    for moment in moments:
        killed = run_python("-c", KILLED, moment, *arguments)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not list((tmp_path / "killed").glob("*model.safetensors"))
    run(monkeypatch, arguments)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)  # bit by bit
    assert [path.name for path in (tmp_path / "killed").glob("incomplete-*")] == set_aside
    results = [json.loads((tmp_path / name / "results.json").read_text("utf-8")) for name in ("whole", "killed")]
    assert [result["steps"] for result in results] == [8, 8]
    assert [result["loss"] for result in results] == [results[0]["loss"]] * 2


def test_evaluation_data_that_fill_no_batch_are_refused_before_training(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--eval_data", str(inputs / "b.jsonl"), "--max_eval_rows", "3", "--dataloader_drop_last"]
    arguments = command("finetune", inputs, tmp_path, *options)
    with pytest.raises(ValueError, match=r"must fill a batch of 8 rows.*got 3; lower per_device_eval_batch_size"):
        run(monkeypatch, arguments)
    assert not list(tmp_path.glob("*model.safetensors"))
    run(monkeypatch, [*arguments, "--per_device_eval_batch_size", "3"])
    assert "eval_loss" in json.loads((tmp_path / "results.json").read_text("utf-8"))


def test_finetune_run_again_when_finished_trains_no_further(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command("finetune", inputs, tmp_path, "--eval_data", str(inputs / "b.jsonl"), "--streaming")
    run(monkeypatch, arguments)
    table = capsys.readouterr().out
    before, results = weights(tmp_path), json.loads((tmp_path / "results.json").read_text("utf-8"))
    run(monkeypatch, arguments)
    assert all(torch.equal(before[name], weight) for name, weight in weights(tmp_path).items())
    again = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert again["steps"] == results["steps"] == 8
    assert again["perplexity"] == results["perplexity"]
    assert results["entmax_alpha"] == 1.5
    assert {"support_size", "zero_share", "eval_loss", "loss", "train_loss", "settings", "log"} <= set(results)
    assert "perplexity" in table
    assert f"\nmodel, tokenizer and results.json: {tmp_path}\n" in table
    with pytest.raises(ValueError, match=r"learning_rate '0\.01' then, '0\.02' now"):
        run(monkeypatch, [*arguments, "--learning_rate", "2e-2"])


def test_finetune_saves_a_model_that_loads_and_can_be_trained_on(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, command("finetune", inputs, tmp_path / "a", "--alpha", "1.8", "--query_scaling", "static"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert isinstance(model, ASEntmaxForCausalLM)
    assert model.config.entmax_alpha == 1.8
    assert any(weight.abs().max() > 0 for name, weight in weights(tmp_path / "a").items() if ".query_scale." in name)
    assert AutoTokenizer.from_pretrained(tmp_path / "a").get_vocab() == tiny_tokenizer().get_vocab()
    tokens = model.generate(random_tokens(1, 4), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 8)
    on = ["--model", str(tmp_path / "a"), "--max_steps", "1"]
    with pytest.raises(ValueError, match="attention must be 'asentmax_static' as .* has it, got 'entmax'"):
        run(monkeypatch, command("finetune", inputs, tmp_path / "c", "--attention", "entmax", *on))
    with pytest.raises(ValueError, match="query_scaling must be 'static' as .* has it, got 'adaptive'"):
        run(monkeypatch, command("finetune", inputs, tmp_path / "b", *on, "--query_scaling", "adaptive"))
    run(monkeypatch, command("finetune", inputs, tmp_path / "c", *on))
    assert json.loads((tmp_path / "c" / "config.json").read_text("utf-8"))["entmax_alpha"] == 1.8


def test_finetune_softmax_twin_trains_as_the_softmax_model_does(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, command("finetune", inputs, tmp_path / "twin", "--attention", "softmax"))
    # The softmax model itself: converting it is left out.
    monkeypatch.setattr("hf_asentmax.runs.patch_model", lambda model, **settings: model)
    monkeypatch.setattr("hf_asentmax.training.set_alpha", lambda *arguments, **options: None)
    run(monkeypatch, command("finetune", inputs, tmp_path / "native", "--attention", "softmax"))
    twin, native = weights(tmp_path / "twin"), weights(tmp_path / "native")
    assert twin.keys() == native.keys()
    assert json.loads((tmp_path / "native" / "config.json").read_text("utf-8"))["model_type"] == "llama"
    assert json.loads((tmp_path / "twin" / "config.json").read_text("utf-8"))["entmax_alpha"] == 1.0
    for name, weight in twin.items():
        torch.testing.assert_close(weight, native[name], rtol=1e-3, atol=1e-4)


def test_finetune_missing_data_stops_before_anything_is_built(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the model must not be loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", never)
    arguments = command("finetune", inputs, tmp_path / "run", "--data", str(tmp_path / "none.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl.*check the path"):
        run(monkeypatch, arguments)
    arguments = command("finetune", inputs, tmp_path / "run", "--text_column", "body")
    with pytest.raises(ValueError, match="set --text_column"):
        run(monkeypatch, arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["softmax config", "asentmax config"])
def test_pretrain_builds_what_the_config_and_options_say(
    kind: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--max_steps", "2", "--positions", "nape"]
    if kind == "asentmax config":
        config = patch_model(
            AutoModelForCausalLM.from_config(tiny_config("qwen3")), alpha=1.3, positions="nape", query_scaling="log"
        ).config
        config.save_pretrained(tmp_path / "config")
        options += ["--config", str(tmp_path / "config")]
    for name in ("a", "b"):
        run(monkeypatch, command("pretrain", inputs, tmp_path / name, *options))
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "a").config
    expected = {
        "softmax config": ("asentmax_llama", 1.5, "adaptive", "nape", 1.0, 16),
        "asentmax config": ("asentmax_qwen3", 1.3, "log", "nape", config.query_scale_delta, 512),
    }[kind]
    names = ("model_type", "entmax_alpha", "query_scaling", "positions", "query_scale_delta", "query_scale_length")
    assert tuple(getattr(config, name) for name in names) == expected
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("script", ["finetune", "pretrain"])
def test_softmax_by_transformers_itself_trains_as_ours_at_alpha_1(
    script: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--max_steps", "2", "--attention", "softmax"]
    run(monkeypatch, command(script, inputs, tmp_path / "ours", *options))
    options += ["--attn_implementation", "sdpa"]
    run(monkeypatch, command(script, inputs, tmp_path / "stock", *options))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert type(model) is LlamaForCausalLM
    ours, stock = weights(tmp_path / "ours"), weights(tmp_path / "stock")
    assert ours.keys() == stock.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, stock[name], rtol=1e-3, atol=1e-4)
    for other in (["--attention", "asentmax"], ["--positions", "nape"]):
        with pytest.raises(ValueError, match="attn_implementation must go with attention 'softmax' and positions"):
            run(monkeypatch, command(script, inputs, tmp_path / "other", *options, *other))


def test_pretrain_refuses_a_tokenizer_that_is_too_large(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_config("llama", vocab_size=8).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"at least the tokenizer's 31 tokens, got 8"):
        run(monkeypatch, command("pretrain", inputs, tmp_path / "run", "--config", str(tmp_path / "small")))


def test_recipe_of_the_language_model_has_the_size_of_its_name() -> None:
    config = AutoConfig.from_pretrained(SCRIPTS.parent / "recipes" / "llama-42m.json")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters(exclude_embeddings=True) == 42_477_312
    assert (config.eos_token_id, config.pad_token_id) == (0, 1)  # as train_tokenizer numbers them


@pytest.mark.parametrize("script", ["finetune", "pretrain"])
def test_script_help_teaches(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, [str(SCRIPTS / f"{script}.py"), "--help"])
    shown = capsys.readouterr().out
    for word in ("examples:", "--attention", "--alpha_fraction", "--streaming", "accelerate launch", "sparsemax"):
        assert word in shown
