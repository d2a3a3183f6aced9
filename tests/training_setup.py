"""A tiny tokenizer, corpus, model folder and Trainer arguments for the tests of data and training."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

from helpers import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainingArguments

from hf_asentmax.packing import PackedDataset, token_lists

SPECIAL = ["<pad>", "</s>", "<s>", "<unk>"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter; adds nothing by itself. Its ids fit the tiny models."""
    vocabulary = {symbol: i for i, symbol in enumerate(SPECIAL + list(string.ascii_lowercase + " "))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


def tiny_texts(count: int = 40, *, seed: int = 0) -> list[str]:
    """Random texts of 1 to 60 letters."""
    source = random.Random(seed)
    return ["".join(source.choices(string.ascii_lowercase, k=source.randint(1, 60))) for _ in range(count)]


def write_texts(path: Path, texts: list[str], column: str = "text") -> Path:
    """Write texts as a .jsonl file."""
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def write_model(folder: Path, family: str = "llama") -> Path:
    """Save a tiny softmax model with its tokenizer."""
    tiny_model(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def rows(length: int = 16) -> PackedDataset:
    """The tiny texts, packed."""
    tokenizer = tiny_tokenizer()
    return PackedDataset(token_lists(({"text": text} for text in tiny_texts()), tokenizer, "text"), length)


# Trainer arguments of a run of a few steps on the CPU, told to nobody.
TINY_RUN: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "use_cpu": True,
}


def arguments(output_dir: Path, **options: Any) -> TrainingArguments:
    """Four steps on the CPU, with a checkpoint every second one."""
    steps = {"max_steps": 4, "save_steps": 2, "logging_steps": 2}
    return TrainingArguments(str(output_dir), **{**TINY_RUN, **steps, **options})
