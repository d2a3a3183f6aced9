"""OLMo 2: q and k normalised over all heads at once; no norm before a layer: r reads the residual stream."""

from __future__ import annotations

from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention

from hf_asentmax.attention import ASEntmaxMixin


class ASEntmaxOlmo2Attention(ASEntmaxMixin, Olmo2Attention):
    """`Olmo2Attention` with ASEntmax in place of softmax."""
