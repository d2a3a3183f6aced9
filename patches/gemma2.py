"""Gemma 2: windows on every other layer. Capped scores are refused: load it with `attn_logit_softcapping=None`."""

from __future__ import annotations

from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention

from hf_asentmax.attention import ASEntmaxMixin


class ASEntmaxGemma2Attention(ASEntmaxMixin, Gemma2Attention):
    """`Gemma2Attention` with ASEntmax in place of softmax."""
