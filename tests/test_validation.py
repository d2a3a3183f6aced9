"""Is a checkpoint folder whole? What is wrong is named, file and remedy."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_asentmax.validation import check_checkpoint, read_safetensors_header

WEIGHTS = "model.safetensors"


def test_header_gives_every_tensor(checkpoint: Path) -> None:
    entries = read_safetensors_header(checkpoint / WEIGHTS)
    content = (checkpoint / WEIGHTS).read_bytes()
    tensors = load_file(checkpoint / WEIGHTS)
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        entry = entries[name]
        assert (entry.dtype, entry.shape) == ("F32", tuple(tensor.shape))
        assert content[entry.start : entry.end] == tensor.numpy().tobytes()


def test_header_of_odd_shapes_and_dtypes_is_accepted(tmp_path: Path) -> None:
    tensors = {
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(1.0, dtype=torch.float64),
        "byte": torch.zeros(3, dtype=torch.uint8),
        "half": torch.zeros(3, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / WEIGHTS)
    assert read_safetensors_header(tmp_path / WEIGHTS).keys() == tensors.keys()


def rewrite_header(path: Path, change: Any) -> None:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "no header": lambda path: os.truncate(path, 100),
    "empty": lambda path: os.truncate(path, 0),
    "a page": lambda path: path.write_bytes(b"<html>404 Not Found</html>"),
    "zeros": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
    "not JSON": lambda path: path.write_bytes(struct.pack("<Q", 20) + b"{" * 100),
    "a list": lambda path: path.write_bytes(struct.pack("<Q", 2) + b"[]"),
    "wrong dtype": lambda path: rewrite_header(path, lambda h: h["lm_head.weight"].update(dtype="F16")),
    "unknown dtype": lambda path: rewrite_header(path, lambda h: h["lm_head.weight"].update(dtype="F12")),
    "wrong shape": lambda path: rewrite_header(path, lambda h: h["lm_head.weight"].update(shape=[1])),
    "wrong offsets": lambda path: rewrite_header(path, lambda h: h["lm_head.weight"].update(data_offsets=[0, 4])),
    "no offsets": lambda path: rewrite_header(path, lambda h: h["lm_head.weight"].pop("data_offsets")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_with_the_remedy(checkpoint: Path, damage: str) -> None:
    DAMAGES[damage](checkpoint / WEIGHTS)
    with pytest.raises(
        ValueError, match=f"{re.escape(str(checkpoint / WEIGHTS))} must be .*; download or save it again"
    ):
        check_checkpoint(checkpoint)


def test_a_truncated_checkpoint_does_not_load_and_is_named(checkpoint: Path) -> None:
    DAMAGES["truncated"](checkpoint / WEIGHTS)
    with pytest.raises(ValueError, match=f"{WEIGHTS} must be a complete safetensors file"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_pickled_weights_do_not_load_unless_asked_for(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    (checkpoint / WEIGHTS).unlink()
    torch.save(model.state_dict(), checkpoint / "pytorch_model.bin")
    for chosen in ({}, {"use_safetensors": None}, {"use_safetensors": True}):
        with pytest.raises(OSError, match=WEIGHTS):
            AutoModelForCausalLM.from_pretrained(checkpoint, **chosen)
    again = AutoModelForCausalLM.from_pretrained(checkpoint, use_safetensors=False)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())


def test_whole_shards_are_accepted(shards: Path) -> None:
    config, files = check_checkpoint(shards)
    assert config["model_type"] == "asentmax_llama"
    assert len(files) > 2
    assert all(name.endswith(f"-of-{len(files):05}.safetensors") for name in files)


def test_a_missing_shard_is_named(shards: Path) -> None:
    missing = sorted(shards.glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(missing))):
        check_checkpoint(shards)


def test_a_truncated_shard_is_named(shards: Path) -> None:
    shard = sorted(shards.glob("*.safetensors"))[1]
    DAMAGES["truncated"](shard)
    with pytest.raises(ValueError, match=re.escape(str(shard))):
        check_checkpoint(shards)


def test_a_shard_without_its_tensor_is_named(shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["absent.weight"] = min(content["weight_map"].values())
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"model-00001-of-\d+.safetensors must hold absent.weight"):
        check_checkpoint(shards)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": {"a": 1}}']
)
def test_a_broken_index_is_named(shards: Path, content: str) -> None:
    index = shards / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(index))):
        check_checkpoint(shards)


def test_a_folder_without_weights_or_config_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere must be a checkpoint folder"):
        check_checkpoint(tmp_path / "nowhere")
    (checkpoint / WEIGHTS).rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="must hold model.safetensors or model.safetensors.index.json"):
        check_checkpoint(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json must be JSON"):
        check_checkpoint(checkpoint)
    (checkpoint / "config.json").rename(checkpoint / "adapter_config.json")
    with pytest.raises(FileNotFoundError, match=r"config.json must be there.*this is an adapter"):
        check_checkpoint(checkpoint)
