"""Mistral: a sliding window."""

from __future__ import annotations

from transformers.models.mistral.modeling_mistral import MistralAttention

from hf_asentmax.attention import ASEntmaxMixin


class ASEntmaxMistralAttention(ASEntmaxMixin, MistralAttention):
    """`MistralAttention` with ASEntmax in place of softmax."""
