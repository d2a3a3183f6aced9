"""Qwen3: q and k normalised; windows on some layers."""

from __future__ import annotations

from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from hf_asentmax.attention import ASEntmaxMixin


class ASEntmaxQwen3Attention(ASEntmaxMixin, Qwen3Attention):
    """`Qwen3Attention` with ASEntmax in place of softmax."""
