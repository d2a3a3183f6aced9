"""Which checkpoints a run goes on from, and adapters with their base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_tokens, tiny_model
from safetensors.torch import load_file
from training_setup import arguments, rows, tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_asentmax import patch_model, set_alpha
from hf_asentmax.adapters import add_lora
from hf_asentmax.checkpoints import checkpoint_problem, claim_output_dir, last_complete_checkpoint
from hf_asentmax.training import AlphaSchedule, ASEntmaxTrainer


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the complete checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    ASEntmaxTrainer(patch_model(tiny_model("llama")), arguments(folder), train_dataset=rows()).train()
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGE: dict[str, Any] = {
    "no state": lambda folder: (folder / "trainer_state.json").unlink(),
    "half a state": lambda folder: truncate(folder / "trainer_state.json"),
    "another step's state": lambda folder: shutil.copy(
        folder.parent / "checkpoint-2" / "trainer_state.json", folder / "trainer_state.json"
    ),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "half the weights": lambda folder: truncate(folder / "model.safetensors"),
    "no header": lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64),
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "half the optimizer": lambda folder: truncate(folder / "optimizer.pt"),
    "no random state": lambda folder: (folder / "rng_state.pth").unlink(),
    "a missing shard": lambda folder: (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "model-00002-of-00002.safetensors"}}', encoding="utf-8"
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_checkpoint_that_is_not_whole_is_set_aside_for_the_one_before(
    damage: str, run_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-4")
    DAMAGE[damage](folder / "checkpoint-4")
    assert last_complete_checkpoint(folder, set_aside=False) == str(folder / "checkpoint-2")
    assert (folder / "checkpoint-4").is_dir()
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-2")
    assert sorted(path.name for path in folder.glob("*checkpoint-*")) == ["checkpoint-2", "incomplete-checkpoint-4"]


def test_checkpoint_of_several_processes_needs_every_random_state(run_folder: Path) -> None:
    assert checkpoint_problem(run_folder / "checkpoint-2") is None
    assert checkpoint_problem(run_folder / "checkpoint-2", world_size=2) == "rng_state_0.pth is missing"


def test_no_complete_checkpoint_means_from_the_start(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_folder / "checkpoint-2", folder / "checkpoint-2")
    (folder / "checkpoint-2" / "scheduler.pt").unlink()
    assert last_complete_checkpoint(folder) is None
    assert last_complete_checkpoint(tmp_path / "none") is None


def test_output_dir_belongs_to_one_run(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert claim_output_dir(folder, {"lr": 1.0}) is None
    assert claim_output_dir(folder, {"lr": 2.0}, resume="never") is None  # nothing was saved yet
    for step in (2, 4):
        shutil.copytree(run_folder / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    assert claim_output_dir(folder, {"lr": 2.0}) == str(folder / "checkpoint-4")
    assert claim_output_dir(folder, {"lr": 2.0}, resume=str(folder / "checkpoint-2")) == str(folder / "checkpoint-2")
    with pytest.raises(ValueError, match=r"lr 2\.0 then, 3\.0 now; give them as they were"):
        claim_output_dir(folder, {"lr": 3.0})
    with pytest.raises(ValueError, match="must hold no run with --resume never"):
        claim_output_dir(folder, {"lr": 2.0}, resume="never")
    with pytest.raises(ValueError, match="checkpoint must be complete, got .*checkpoint-8"):
        claim_output_dir(folder, {"lr": 2.0}, resume=str(folder / "checkpoint-8"))
    assert json.loads((folder / "settings.json").read_text(encoding="utf-8")) == {"lr": 2.0}


def test_adapter_checkpoints_carry_the_base_they_were_computed_with(tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    model = add_lora(patch_model(tiny_model("llama"), alpha=1.0), str(tmp_path), r=2, tokenizer=tiny_tokenizer())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lora_A" in name for name in trained)
    assert any(".query_scale." in name for name in trained)
    assert all("lora_" in name or ".query_scale." in name for name in trained)
    schedule = AlphaSchedule(1.5, start=1.0, fraction=1.0)
    args = arguments(tmp_path, save_steps=3)
    trainer = ASEntmaxTrainer(model, args, train_dataset=rows(), callbacks=[schedule], query_scale_learning_rate=1e-1)
    trainer.train()
    trainer.save_model()
    tokens = random_tokens(1, 12)
    with torch.no_grad():
        expected = model(tokens).logits
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(tokens).logits, expected, rtol=0, atol=0)
        assert loaded.config.entmax_alpha == 1.5
        midway = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
        assert midway.config.entmax_alpha == 1.25
        base = load_file(tmp_path / "base" / "model.safetensors")
        assert all(
            torch.equal(base[name], w)
            for name, w in load_file(tmp_path / "checkpoint-3" / "base" / "model.safetensors").items()
        )
        set_alpha(midway, 1.5)
        assert not torch.equal(midway(tokens).logits, expected)  # the weights differ, too
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), type(model.get_base_model()))


def test_adapter_without_a_converted_base_is_refused_before_training(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    tiny_model("llama").save_pretrained(tmp_path / "softmax")
    for name in ("", str(tmp_path / "softmax")):
        model = patch_model(tiny_model("llama"))
        model.name_or_path = name
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        with pytest.raises(RuntimeError, match="call save_adapter_base"):
            ASEntmaxTrainer(adapted, arguments(tmp_path / "run"), train_dataset=rows())
