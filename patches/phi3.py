"""Phi-3, Phi-3.5, Phi-4: q, k and v in one projection; rotary on a part of the dims; a sliding window."""

from __future__ import annotations

from transformers.models.phi3.modeling_phi3 import Phi3Attention

from hf_asentmax.attention import ASEntmaxMixin


class ASEntmaxPhi3Attention(ASEntmaxMixin, Phi3Attention):
    """`Phi3Attention` with ASEntmax in place of softmax."""
