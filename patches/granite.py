"""Granite 3: own score scale; multipliers of embeddings, residuals and logits."""

from __future__ import annotations

from transformers.models.granite.modeling_granite import GraniteAttention

from hf_asentmax.attention import ASEntmaxMixin


class ASEntmaxGraniteAttention(ASEntmaxMixin, GraniteAttention):
    """`GraniteAttention` with ASEntmax in place of softmax."""
