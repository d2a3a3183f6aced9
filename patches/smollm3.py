"""SmolLM3: some layers without rotary positions; windows on some layers."""

from __future__ import annotations

from transformers.models.smollm3.modeling_smollm3 import SmolLM3Attention

from hf_asentmax.attention import ASEntmaxMixin


class ASEntmaxSmolLM3Attention(ASEntmaxMixin, SmolLM3Attention):
    """`SmolLM3Attention` with ASEntmax in place of softmax."""
