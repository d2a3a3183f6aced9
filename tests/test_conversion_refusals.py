"""What conversion refuses, with nothing written and the source as it was."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from hf_asentmax.conversion import convert_checkpoint


def change_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


PROBLEMS: dict[str, tuple[Any, type[Exception], str]] = {
    "family": (lambda d: change_config(d, model_type="gpt2"), ValueError, "model_type in .* must be one of llama"),
    "converted": (lambda d: change_config(d, model_type="asentmax_llama"), ValueError, "which is ASEntmax"),
    "class": (lambda d: change_config(d, architectures=["MyLlama"]), ValueError, "must name a class of transformers"),
    "head": (
        lambda d: change_config(d, architectures=["LlamaForQuestionAnswering"]),
        ValueError,
        "model must be one of",
    ),
    "quantized": (lambda d: change_config(d, quantization_config={"bits": 4}), ValueError, "got quantized ones"),
    "dropout": (lambda d: change_config(d, attention_dropout=0.1), ValueError, "attention_dropout must be 0"),
    "shape": (lambda d: change_config(d, vocab_size=65), ValueError, r"must have shape \(65, 32\)"),
    "lacking": (drop_tensor, ValueError, "lacks model.layers.1.mlp.up_proj.weight"),
    "truncated": (
        lambda d: os.truncate(d / "model.safetensors", 5000),
        ValueError,
        "model.safetensors must be a complete",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), FileNotFoundError, "must hold model.safetensors or"),
    "no config": (lambda d: (d / "config.json").unlink(), FileNotFoundError, "config.json must be there"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_conversion_refuses_a_bad_source(problem: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "native")
    spoil, error, message = PROBLEMS[problem]
    spoil(tmp_path / "native")
    before = {path.name: path.read_bytes() for path in (tmp_path / "native").iterdir()}
    with pytest.raises(error, match=message):
        convert_checkpoint(tmp_path / "native", tmp_path / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["native"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "native").iterdir()} == before


def test_conversion_refuses_another_family_and_names_a_bad_shard(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="got 'gpt2'; other families are not supported"):
        convert_checkpoint(tmp_path / "gpt2", tmp_path / "converted")
    tiny_model("llama").save_pretrained(tmp_path / "native", max_shard_size="20KB")
    shard = sorted((tmp_path / "native").glob("*.safetensors"))[2]
    os.truncate(shard, shard.stat().st_size - 8)
    with pytest.raises(ValueError, match=re.escape(str(shard))):
        convert_checkpoint(tmp_path / "native", tmp_path / "converted")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(shard))):
        convert_checkpoint(tmp_path / "native", tmp_path / "converted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt2", "native"]


@pytest.mark.parametrize(
    "settings", [{"alpha": 2.5}, {"alpha": 0.5}, {"query_scaling": "cubic"}, {"positions": "xpos"}]
)
def test_conversion_refuses_a_bad_setting(settings: dict[str, Any], tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "native")
    with pytest.raises(ValueError, match="must be"):
        convert_checkpoint(tmp_path / "native", tmp_path / "converted", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


def test_conversion_refuses_a_target_with_content(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "native")
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "native", tmp_path / "file"):
        with pytest.raises(FileExistsError, match="must be a new or empty folder"):
            convert_checkpoint(tmp_path / "native", target)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("source", ["nowhere/to be found", "someone/not-cached", "./no-such-folder"])
def test_conversion_of_a_source_out_of_reach_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="source must be a checkpoint folder or a Hub id"):
        convert_checkpoint(source, tmp_path / "converted")
    assert list(tmp_path.iterdir()) == []
