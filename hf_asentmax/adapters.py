"""LoRA adapters on ASEntmax models: the converted base goes with them, or they would be loaded onto softmax."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from .checkpoints import BASE, write_json

# What LoRA adapts by default: every projection of a decoder layer, in the names of all supported families.
LORA_TARGETS = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
)


def add_lora(
    model: PreTrainedModel,
    output_dir: str,
    *,
    r: int,
    lora_alpha: int | None = None,
    dropout: float = 0.0,
    target_modules: list[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Any:
    """Save the model into OUTPUT_DIR/base and put a LoRA adapter on it; the query scale is trained in full.

    Args:
        model: a causal language model, ASEntmax or not.
        output_dir: the run's folder.
        r: rank of the adapter.
        lora_alpha: its numerator; 2 r by default.
        dropout: dropout of the adapter's input.
        target_modules: last names of the linear layers to adapt; every projection of a decoder layer by default.
        tokenizer: saved with the base.

    Returns:
        The `peft.PeftModel`.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    save_adapter_base(model, Path(output_dir) / BASE, tokenizer)
    present = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    scale = any(".query_scale." in name for name, _ in model.named_parameters())
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=r,
        lora_alpha=2 * r if lora_alpha is None else lora_alpha,
        lora_dropout=dropout,
        target_modules=target_modules or [name for name in LORA_TARGETS if name in present],
        modules_to_save=["query_scale"] if scale else None,
    )
    return get_peft_model(model, config)


def _base(source: str) -> str:
    """Where the model is: the base that an adapter's folder names, else the source itself."""
    found = find_adapter_config_file(source)
    return source if found is None else json.loads(Path(found).read_text("utf-8"))["base_model_name_or_path"]


def load_config(source: str) -> PretrainedConfig:
    """The configuration of a model, or of the base that an adapter names.

    Args:
        source: folder or Hub id.

    Raises:
        OSError: there is no such model.
    """
    return AutoConfig.from_pretrained(_base(source))


def load_causal_model(source: str, *, config: PretrainedConfig | None = None, dtype: str = "float32") -> Any:
    """A causal language model; of an adapter its base, with the adapter merged into the weights.

    Args:
        source: folder or Hub id.
        config: takes the place of the model's own.
        dtype: name of the weights' dtype.

    Raises:
        ValueError: the adapter is one of prompt learning, which no weights hold.
        OSError: there is no such model.
    """
    base = _base(source)
    model: Any = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=getattr(torch, dtype))
    if base == source:
        return model
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(model, source)
    if adapted.active_peft_config.is_prompt_learning:
        raise ValueError(
            "the adapter must be one that merges into the weights, such as LoRA, got "
            f"{adapted.active_peft_config.peft_type.value} in {source}; use peft.AutoPeftModelForCausalLM"
        )
    return adapted.merge_and_unload()


def is_adapter(model: nn.Module) -> bool:
    """Whether the model is a PEFT model."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def save_adapter_base(
    model: PreTrainedModel, folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Save a converted model, whole or not at all, as the base that adapters made from it will name.

    Call it before `get_peft_model`. An adapter that names the softmax original instead would be loaded onto softmax.

    Args:
        model: an ASEntmax model without adapters.
        folder: where to; kept as it is where the folder exists already, as when a killed run is continued.
        tokenizer: saved with it.
    """
    folder = Path(folder).absolute()
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)
    model.name_or_path = str(folder)


def adapter_base(model: Any) -> Path:
    """The folder of the converted base that an adapter over an ASEntmax model names.

    Raises:
        RuntimeError: it names none, or one that is not ASEntmax: loaded later, it would compute softmax.
    """
    named = next(iter(model.peft_config.values())).base_model_name_or_path
    config = Path(named or "") / "config.json"
    try:
        converted = bool(named) and "entmax_alpha" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        converted = False
    if not converted:
        raise RuntimeError(
            f"the base of an adapter must be a folder with the converted model, got {named!r}; "
            "call save_adapter_base(model, folder) before get_peft_model"
        )
    return Path(named)


@contextmanager
def base_beside(model: Any, folder: str | os.PathLike[str]) -> Iterator[None]:
    """Put the converted base into FOLDER/base, by links where the disk can; within, the adapter names that as its base.

    Its config.json is written anew, since alpha may have moved on: adapter and base together compute what the model
    computes now.

    Args:
        model: a PEFT model over an ASEntmax base.
        folder: the folder that the adapter is about to be saved to.
    """
    source, target = adapter_base(model), Path(folder).absolute() / BASE
    if source != target:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, copy_function=_link_or_copy)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["entmax_alpha"] = model.config.entmax_alpha
    write_json(target / "config.json", config)
    adapter = next(iter(model.peft_config.values()))
    adapter.base_model_name_or_path = str(target)
    try:
        yield
    finally:
        adapter.base_model_name_or_path = str(source)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
