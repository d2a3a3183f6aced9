"""Qwen2, Qwen2.5: biases on q, k and v; windows on some layers."""

from __future__ import annotations

from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from hf_asentmax.attention import ASEntmaxMixin


class ASEntmaxQwen2Attention(ASEntmaxMixin, Qwen2Attention):
    """`Qwen2Attention` with ASEntmax in place of softmax."""
