"""ASEntmax attention for Hugging Face Transformers: exact zeros that hold at long context (arXiv 2506.16640)."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from .blocks import read_in_blocks
from .configuration_asentmax import (
    ASEntmaxGemma2Config,
    ASEntmaxGemma3TextConfig,
    ASEntmaxGraniteConfig,
    ASEntmaxLlamaConfig,
    ASEntmaxMistralConfig,
    ASEntmaxOlmo2Config,
    ASEntmaxPhi3Config,
    ASEntmaxQwen2Config,
    ASEntmaxQwen3Config,
    ASEntmaxSmolLM3Config,
)
from .methods import METHODS
from .modeling_asentmax import (
    ASEntmaxGemma2ForCausalLM,
    ASEntmaxGemma2ForSequenceClassification,
    ASEntmaxGemma2ForTokenClassification,
    ASEntmaxGemma2Model,
    ASEntmaxGemma3TextForCausalLM,
    ASEntmaxGemma3TextForSequenceClassification,
    ASEntmaxGemma3TextModel,
    ASEntmaxGraniteForCausalLM,
    ASEntmaxGraniteModel,
    ASEntmaxLlamaForCausalLM,
    ASEntmaxLlamaForSequenceClassification,
    ASEntmaxLlamaForTokenClassification,
    ASEntmaxLlamaModel,
    ASEntmaxMistralForCausalLM,
    ASEntmaxMistralForSequenceClassification,
    ASEntmaxMistralForTokenClassification,
    ASEntmaxMistralModel,
    ASEntmaxOlmo2ForCausalLM,
    ASEntmaxOlmo2ForSequenceClassification,
    ASEntmaxOlmo2Model,
    ASEntmaxPhi3ForCausalLM,
    ASEntmaxPhi3ForSequenceClassification,
    ASEntmaxPhi3ForTokenClassification,
    ASEntmaxPhi3Model,
    ASEntmaxQwen2ForCausalLM,
    ASEntmaxQwen2ForSequenceClassification,
    ASEntmaxQwen2ForTokenClassification,
    ASEntmaxQwen2Model,
    ASEntmaxQwen3ForCausalLM,
    ASEntmaxQwen3ForSequenceClassification,
    ASEntmaxQwen3ForTokenClassification,
    ASEntmaxQwen3Model,
    ASEntmaxSmolLM3ForCausalLM,
    ASEntmaxSmolLM3ForSequenceClassification,
    ASEntmaxSmolLM3ForTokenClassification,
    ASEntmaxSmolLM3Model,
)
from .ops.attention import entmax, entmax_attention
from .ops.baselines import adaptive_temperature_attention, topk_attention
from .patching import patch_model, set_alpha, unpatch_model
from .scaling import QueryScale

ASEntmaxConfig = ASEntmaxLlamaConfig
ASEntmaxModel = ASEntmaxLlamaModel
ASEntmaxForCausalLM = ASEntmaxLlamaForCausalLM

try:
    __version__ = version("hf_asentmax")
except PackageNotFoundError:  # used from a source tree that isn't installed
    __version__ = "0+unknown"

__all__ = [
    "METHODS",
    "ASEntmaxConfig",
    "ASEntmaxForCausalLM",
    "ASEntmaxGemma2Config",
    "ASEntmaxGemma2ForCausalLM",
    "ASEntmaxGemma2ForSequenceClassification",
    "ASEntmaxGemma2ForTokenClassification",
    "ASEntmaxGemma2Model",
    "ASEntmaxGemma3TextConfig",
    "ASEntmaxGemma3TextForCausalLM",
    "ASEntmaxGemma3TextForSequenceClassification",
    "ASEntmaxGemma3TextModel",
    "ASEntmaxGraniteConfig",
    "ASEntmaxGraniteForCausalLM",
    "ASEntmaxGraniteModel",
    "ASEntmaxLlamaConfig",
    "ASEntmaxLlamaForCausalLM",
    "ASEntmaxLlamaForSequenceClassification",
    "ASEntmaxLlamaForTokenClassification",
    "ASEntmaxLlamaModel",
    "ASEntmaxMistralConfig",
    "ASEntmaxMistralForCausalLM",
    "ASEntmaxMistralForSequenceClassification",
    "ASEntmaxMistralForTokenClassification",
    "ASEntmaxMistralModel",
    "ASEntmaxModel",
    "ASEntmaxOlmo2Config",
    "ASEntmaxOlmo2ForCausalLM",
    "ASEntmaxOlmo2ForSequenceClassification",
    "ASEntmaxOlmo2Model",
    "ASEntmaxPhi3Config",
    "ASEntmaxPhi3ForCausalLM",
    "ASEntmaxPhi3ForSequenceClassification",
    "ASEntmaxPhi3ForTokenClassification",
    "ASEntmaxPhi3Model",
    "ASEntmaxQwen2Config",
    "ASEntmaxQwen2ForCausalLM",
    "ASEntmaxQwen2ForSequenceClassification",
    "ASEntmaxQwen2ForTokenClassification",
    "ASEntmaxQwen2Model",
    "ASEntmaxQwen3Config",
    "ASEntmaxQwen3ForCausalLM",
    "ASEntmaxQwen3ForSequenceClassification",
    "ASEntmaxQwen3ForTokenClassification",
    "ASEntmaxQwen3Model",
    "ASEntmaxSmolLM3Config",
    "ASEntmaxSmolLM3ForCausalLM",
    "ASEntmaxSmolLM3ForSequenceClassification",
    "ASEntmaxSmolLM3ForTokenClassification",
    "ASEntmaxSmolLM3Model",
    "QueryScale",
    "adaptive_temperature_attention",
    "entmax",
    "entmax_attention",
    "patch_model",
    "read_in_blocks",
    "set_alpha",
    "topk_attention",
    "unpatch_model",
]
