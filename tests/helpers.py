"""Tiny models of every family and the tolerances that all tests share."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text", "granite", "olmo2", "phi3")

# Keyword arguments of `torch.testing.assert_close`, for a result against the same inputs in float64. Attention and
# its gradients (1 to 111 tokens, alpha 1 to 2) measured at most 2.3e-6 in float32, and half an eps in the 16-bit
# types, which compute in float32 and round once: four times as much is allowed.
TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1.6e-2},
}

# The end of a program in a process of its own: prints the most memory that it has had, in bytes. Linux's, since what
# `resource` says begins with the memory of the process that started this one.
PRINT_PEAK_MEMORY = """
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_MULTIPLIERS = {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 2.0}
# What a family does in its own way, and where its defaults would hide it: windows longer than a test's tokens, scores
# scaled as everywhere.
_BY_FAMILY: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": None},
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
    "granite": {"attention_multiplier": 0.25, **_MULTIPLIERS},
    "mistral": {"sliding_window": 8},
    "phi3": {"partial_rotary_factor": 0.5},
}
# A window of four tokens, on the layers that the family puts it on.
WINDOWS: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
    "mistral": {"sliding_window": 4},
    "phi3": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "smollm3": {"use_sliding_window": True, "sliding_window": 4},
}


def tiny_config(family: str, **overrides: Any) -> PretrainedConfig:
    """The native (softmax) configuration of a family, at a size that tests in milliseconds."""
    return AutoConfig.for_model(family, **{**_SIZES, **_BY_FAMILY.get(family, {}), **overrides})


def auto_classes(family: str) -> list[Any]:
    """The Auto classes of this package for which Transformers has a class of the family."""
    autos = (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification)
    return [auto for auto in autos if type(AutoConfig.for_model(family)) in auto._model_mapping]


# Every model class of every family, as (family, Auto class).
CLASSES = [(family, auto) for family in FAMILIES for auto in auto_classes(family)]


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A native causal language model of `tiny_config`, random weights by `seed`, in eval mode and float32."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=torch.float32).eval()


def random_tokens(*shape: int, vocab_size: int = 64, seed: int = 0) -> torch.Tensor:
    """Random token ids of `shape`, int64, none of them padding, end or begin."""
    return torch.randint(3, vocab_size, shape, generator=torch.Generator().manual_seed(seed))
