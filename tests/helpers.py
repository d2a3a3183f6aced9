"""Tiny models of every family and the tolerances that all tests share."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")

# Keyword arguments of `torch.testing.assert_close`, for a result against the same inputs in float64. Attention and
# its gradients (1 to 111 tokens, alpha 1 to 2) measured at most 2.3e-6 in float32, and half an eps in the 16-bit
# types, which compute in float32 and round once: four times as much is allowed.
TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1.6e-2},
}

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
_BY_FAMILY: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": 8}}


def tiny_config(family: str, **overrides: Any) -> PretrainedConfig:
    """The native (softmax) configuration of a family, at a size that tests in milliseconds."""
    return AutoConfig.for_model(family, **{**_SIZES, **_BY_FAMILY.get(family, {}), **overrides})


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A native causal language model of `tiny_config`, random weights by `seed`, in eval mode and float32."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=torch.float32).eval()


def random_tokens(*shape: int, vocab_size: int = 64, seed: int = 0) -> torch.Tensor:
    """Random token ids of `shape`, int64, none of them padding, end or begin."""
    return torch.randint(3, vocab_size, shape, generator=torch.Generator().manual_seed(seed))
