"""Llama 2, 3, 3.x, SmolLM, SmolLM2: plain rotary attention."""

from __future__ import annotations

from transformers.models.llama.modeling_llama import LlamaAttention

from hf_asentmax.attention import ASEntmaxMixin


class ASEntmaxLlamaAttention(ASEntmaxMixin, LlamaAttention):
    """`LlamaAttention` with ASEntmax in place of softmax."""
