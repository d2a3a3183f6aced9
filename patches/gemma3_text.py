"""Gemma 3 (text): windows with a rotary base of their own on most layers; q and k normalised; own score scale."""

from __future__ import annotations

from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention

from hf_asentmax.attention import ASEntmaxMixin


class ASEntmaxGemma3TextAttention(ASEntmaxMixin, Gemma3Attention):
    """`Gemma3Attention` with ASEntmax in place of softmax."""
