"""The README's table of errors: each of them, provoked as a user would, begins as the table says."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import random_tokens, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from training_setup import arguments, rows, tiny_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from hf_asentmax import ASEntmaxConfig, patch_model
from hf_asentmax.checkpoints import claim_output_dir
from hf_asentmax.data import DataArguments, load_packed
from hf_asentmax.training import ASEntmaxTrainer

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
TOKENS = random_tokens(2, 9)
LORA = LoraConfig(task_type="CAUSAL_LM", r=2)


def patched() -> Any:
    return patch_model(tiny_model("llama"))


def saved(folder: Path) -> Path:
    patched().save_pretrained(folder)
    return folder


def replaced_attention(folder: Path) -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn = nn.Identity()
    patch_model(model)


def another_run(folder: Path) -> None:
    claim_output_dir(folder, {"seed": 0}, resume="auto", world_size=1)
    (folder / "checkpoint-5").mkdir()
    claim_output_dir(folder, {"seed": 1}, resume="auto", world_size=1)


def truncated(folder: Path) -> None:
    file = saved(folder) / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    AutoModelForCausalLM.from_pretrained(folder)


def wide_heads(folder: Path) -> None:
    from hf_asentmax.ops.triton_launch import Problem  # what a call on a GPU makes first

    x, interval = torch.zeros(1, 1, 4, 257), torch.zeros(1, 4, dtype=torch.int32)
    Problem(x, x, x, interval, interval, None, None, None, 1.5, 1.0)


def mask_with_a_hole(folder: Path) -> None:
    patched()(TOKENS, attention_mask=torch.ones_like(TOKENS).index_fill(1, torch.tensor([4]), 0))


def tokens_of_another_tokenizer(folder: Path) -> None:
    Dataset.from_dict({"input_ids": [[5, 31, 1]]}).to_parquet(str(folder / "tokens.parquet"))
    load_packed(DataArguments(data=str(folder / "tokens.parquet")), tiny_tokenizer(), seed=0)


# What the message column begins with -> what a user did, given an empty folder.
CAUSES: dict[str, Callable[[Path], Any]] = {
    "model must be one of ...": lambda folder: patch_model(
        GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=64))
    ),
    "model must have one attention module a layer ...": replaced_attention,
    "model must be patched before PEFT wraps it": lambda folder: patch_model(get_peft_model(tiny_model("llama"), LORA)),
    "an adapter must be saved with the name of a converted base": lambda folder: get_peft_model(
        patched(), LORA
    ).save_pretrained(folder),
    "the base of an adapter must be a folder with the converted model": lambda folder: ASEntmaxTrainer(
        get_peft_model(patched(), LORA), arguments(folder), train_dataset=rows()
    ),
    'attn_implementation must be "asentmax"': lambda folder: AutoModelForCausalLM.from_pretrained(
        saved(folder), attn_implementation="sdpa"
    ),
    'attn_implementation="asentmax" must be used by an ASEntmax model': lambda folder: LlamaForCausalLM.from_pretrained(
        saved(folder)
    )(TOKENS),
    "entmax_alpha must be between 1 (softmax) and 2 (sparsemax)": lambda folder: patch_model(
        tiny_model("llama"), alpha=2.5
    ),
    "attention_dropout must be 0 for ASEntmax": lambda folder: ASEntmaxConfig(attention_dropout=0.1),
    "attention_mask must be None or 2-D (batch, tokens)": lambda folder: patched()(
        TOKENS, attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    ),
    "attention_mask must hide keys only before and after ...": mask_with_a_hole,
    "the asentmax attention must be causal ...": lambda folder: patched()(TOKENS, is_causal=False),
    "continuous batching must run a softmax model": lambda folder: patched().generate_batch(
        inputs=TOKENS.tolist(), generation_config=GenerationConfig(max_new_tokens=2, eos_token_id=1, pad_token_id=0)
    ),
    "head dim of query must be at most 256 on a GPU": wide_heads,
    "... must be a complete safetensors file": truncated,
    "input_ids must be in ...": tokens_of_another_tokenizer,
    "settings must be those of the run in ... to go on with it": another_run,
}
if importlib.util.find_spec("triton") is None:  # where triton isn't, there are no kernels, and no such error
    del CAUSES["head dim of query must be at most 256 on a GPU"]


def documented() -> dict[str, list[str]]:
    """The messages of each row of the table, by the first; most rows have one."""
    section = README.split("## Errors and what to do\n")[1].split("\n## ")[0]
    cells = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    messages = [re.findall("`(.*?)`", cell) for cell in cells]
    return {found[0]: found for found in messages}


def test_errors_of_the_table_are_those_provoked_here() -> None:
    known = set(CAUSES) | {"head dim of query must be at most 256 on a GPU"}
    assert set(documented()) == known


@pytest.mark.parametrize("message", CAUSES)
def test_error_begins_as_the_table_says(message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)) as raised:
        CAUSES[message](tmp_path)
    patterns = [".*?".join(map(re.escape, begin.split("..."))) for begin in documented()[message]]
    assert re.match("|".join(patterns), str(raised.value)), raised.value
