"""TRL's trainers on ASEntmax models: packed documents stay apart, and a preference is learned."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from helpers import TOLERANCE
from peft import AutoPeftModelForCausalLM, LoraConfig
from test_patching import entmax_model, native_model
from training_setup import TINY_RUN, tiny_texts, tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_asentmax import patch_model
from hf_asentmax.packing import CompletionDataset

CLOSE = TOLERANCE[torch.float32]
OPTIONS: dict[str, Any] = TINY_RUN | {
    "max_steps": 2,
    "logging_steps": 1,
    "bf16": False,
    "max_length": 48,
    "save_strategy": "no",
}


def texts() -> Dataset:
    return Dataset.from_dict({"text": tiny_texts(24)})


def preferences() -> Dataset:
    first, second = tiny_texts(12, seed=1), tiny_texts(12, seed=2)
    return Dataset.from_dict({"prompt": tiny_texts(12), "chosen": first, "rejected": second})


def sft_trainer(model: Any, folder: Path, **options: Any) -> Any:
    arguments = trl.SFTConfig(str(folder), packing=True, **(OPTIONS | options))
    return trl.SFTTrainer(model, arguments, train_dataset=texts(), processing_class=tiny_tokenizer())


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained_names(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
@torch.no_grad()
def test_trl_packed_documents_are_computed_as_if_alone(family: str, strategy: str, tmp_path: Path) -> None:
    """The rows are TRL's own: positions, bounds, ``seq_idx`` and several rows flattened into one."""
    model = entmax_model(family)
    trainer = sft_trainer(model, tmp_path, packing_strategy=strategy, max_length=64, per_device_train_batch_size=3)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    bounds = (batch["position_ids"][0] == 0).nonzero().flatten().tolist() + [batch["input_ids"].shape[1]]
    assert len(bounds) > 3
    model.eval()
    for use_cache in (False, True):
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        packed = model(**inputs, use_cache=use_cache).logits
        for start, end in zip(bounds, bounds[1:], strict=False):
            alone = model(batch["input_ids"][:, start:end]).logits
            torch.testing.assert_close(packed[:, start:end], alone, **CLOSE)


def test_trl_takes_written_samples_with_the_loss_on_the_completion(tmp_path: Path) -> None:
    """The labels are those of :class:`hf_asentmax.packing.CompletionDataset`."""
    samples = [
        {"prompt": "abc de", "completion": " fgh", "task": "a"},
        {"prompt": "bc", "completion": " d", "task": "b"},
    ]
    arguments = trl.SFTConfig(str(tmp_path), **OPTIONS)
    data = Dataset.from_list(samples)
    trainer = trl.SFTTrainer(entmax_model(), arguments, train_dataset=data, processing_class=tiny_tokenizer())
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = {tuple(ids[ids != -100].tolist()) for ids in batch["labels"]}
    rows = CompletionDataset(samples, tiny_tokenizer(), 16)
    assert theirs == {tuple(row["labels"][row["labels"] != -100].tolist()) for row in rows}


def test_trl_sft_loss_of_packed_documents_is_theirs(tmp_path: Path) -> None:
    """What is logged is the mean over the tokens of the documents, each computed alone by the model before."""
    model = entmax_model()
    trainer = sft_trainer(model, tmp_path, max_steps=1)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    bounds = (batch["position_ids"][0] == 0).nonzero().flatten().tolist() + [batch["input_ids"].shape[1]]
    total, count = 0.0, 0
    with torch.no_grad():
        for start, end in zip(bounds, bounds[1:], strict=False):
            tokens = batch["input_ids"][:, start:end]
            logits = model.eval()(tokens).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
            count += end - start - 1
    loss = trainer.compute_loss(model.train(), batch, num_items_in_batch=torch.tensor(count))
    torch.testing.assert_close(loss.item(), total / count, rtol=1e-5, atol=1e-5)


def test_trl_sft_trains_and_saves(tmp_path: Path) -> None:
    model = entmax_model()
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    trainer = sft_trainer(model, tmp_path)
    trainer.train()
    assert len(losses(trainer)) == 2
    assert trained_names(model, before) == set(before)
    trainer.save_model()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model.eval()(tokens).logits)


def test_trl_sft_of_an_adapter_takes_the_default_targets(tmp_path: Path) -> None:
    base = entmax_model()
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(task_type="CAUSAL_LM", r=2, modules_to_save=["query_scale"])
    arguments = trl.SFTConfig(str(tmp_path / "run"), packing=True, **OPTIONS)
    trainer = trl.SFTTrainer(
        base, arguments, train_dataset=texts(), processing_class=tiny_tokenizer(), peft_config=config
    )
    trainer.train()
    trainer.save_model()
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")
    assert again.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, trainer.model.eval()(tokens).logits)


def dpo_trainer(model: Any, folder: Path, **options: Any) -> Any:
    arguments = trl.DPOConfig(str(folder), **OPTIONS)
    return trl.DPOTrainer(
        model, args=arguments, train_dataset=preferences(), processing_class=tiny_tokenizer(), **options
    )


@pytest.mark.parametrize("through", ["folder", "saved", "ref_model", "adapter"])
def test_trl_dpo_starts_at_log_2_and_trains(through: str, tmp_path: Path) -> None:
    """Where the reference (the folder's, a copy, the base) computed anything but the model, it would not be log 2."""
    model = entmax_model()
    model.save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {}
    if through == "folder":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    elif through == "ref_model":
        options["ref_model"] = copy.deepcopy(model)
    elif through == "adapter":
        options["peft_config"] = LoraConfig(task_type="CAUSAL_LM", r=2, modules_to_save=["query_scale"])
    trainer = dpo_trainer(model, tmp_path / "run", **options)
    assert through == "adapter" or type(trainer.ref_model) is type(model)
    trained = {name: x for name, x in trainer.model.named_parameters() if x.requires_grad}
    before = {name: x.detach().clone() for name, x in trained.items()}
    trainer.train()
    first, second = losses(trainer)
    assert first == pytest.approx(math.log(2), abs=1e-4)
    assert abs(second - first) > 1e-4
    assert [name for name, x in trained.items() if torch.equal(x, before[name])] == []


def test_trl_dpo_does_not_take_the_softmax_original_for_reference(tmp_path: Path) -> None:
    native_model("llama").save_pretrained(tmp_path / "softmax")
    model = patch_model(AutoModelForCausalLM.from_pretrained(tmp_path / "softmax"))
    with pytest.raises(OSError, match="Repo id"):  # it asks for the model by its name, which patch_model takes away
        dpo_trainer(model, tmp_path / "run")
