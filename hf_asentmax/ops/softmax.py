"""Softmax attention without scale and slopes, by PyTorch's fused kernels; with them the Triton kernels compute it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# All of SDPA's kernels but the one that writes out T x N scores.
_FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def is_fused(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether SDPA has a fused kernel for these, by shapes and strides: what PyTorch offers for the question
    (``torch.backends.cuda.can_use_flash_attention``) can't be compiled."""
    dims = query.shape[-1], value.shape[-1]
    if max(dims) > 128 or 0 in (*query.shape, *key.shape) or any(x.stride(-1) != 1 for x in (query, key, value)):
        return False
    if query.dtype == torch.float32:
        return query.shape[1] == key.shape[1] and dims[0] % 4 == 0 and dims[1] % 4 == 0
    return query.dtype in (torch.float16, torch.bfloat16) and dims[0] == dims[1] and dims[0] % 8 == 0


def fused_softmax_attention(query: Tensor, key: Tensor, value: Tensor, *, scaling: float, is_causal: bool) -> Tensor:
    """Attention with ``p_i = softmax(scaling * <q_i, k_j>)`` over all keys, or those up to i, of what :func:`is_fused`
    says: by flash attention or cuDNN for 16 bits, by the memory-efficient kernel for float32.

    Args:
        query: (B, H, T, D).
        key: (B, H_kv, N, D), H a multiple of H_kv.
        value: (B, H_kv, N, D_v).
        scaling: factor of the products.
        is_causal: query i sees the keys up to i; T = N then.

    Returns:
        (B, H, T, D_v) in the dtype of ``query``.

    Raises:
        RuntimeError: by PyTorch, with its words: a GPU is too old for a fused kernel (compute capability below 8.0).
    """
    grouped = query.shape[1] != key.shape[1]
    with torch.autocast(query.device.type, enabled=False), sdpa_kernel(_FUSED):
        return scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scaling, enable_gqa=grouped)
