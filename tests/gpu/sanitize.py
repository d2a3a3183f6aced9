"""A few small forwards and backwards, for CUDA's own checks of memory and races:

    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
    compute-sanitizer --tool racecheck python tests/gpu/sanitize.py

Exits with 0 if all results are finite; compute-sanitizer then says what it found (`--error-exitcode 1`).
"""

from __future__ import annotations

import os
import sys

# Each tensor an allocation of its own, so that reading past its end is an error. Read when torch is imported.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

from hf_asentmax import entmax_attention

# batch, heads, key/value heads, queries, keys; the last is one that the kernels of a step of generation serve
SHAPES = (
    (1, 1, 1, 1, 1),
    (1, 2, 1, 17, 17),
    (2, 4, 1, 70, 70),
    (1, 2, 2, 1, 131),
    (1, 2, 1, 65, 200),
    (2, 4, 2, 3, 300),
)


def check(dtype: torch.dtype, dim: int, *, everything: bool, alpha: float = 1.5) -> None:
    """Each shape forward and backward and forward alone, with and without a window and padding."""
    for batch, heads, kv_heads, queries, keys in SHAPES:
        leaves = {
            "query": torch.randn(batch, heads, queries, dim, dtype=dtype),
            "key": torch.randn(batch, kv_heads, keys, dim, dtype=dtype),
            "value": torch.randn(batch, kv_heads, keys, dim, dtype=dtype),
        }
        options = {}
        if everything:
            leaves["query_scale"] = torch.rand(batch, heads, queries)
            if alpha > 1:
                leaves["alpha"] = torch.linspace(1.2, alpha, heads)
            options["alibi_slopes"] = torch.linspace(0.5, 0.0, heads)
        leaves = {name: x.cuda().requires_grad_() for name, x in leaves.items()}
        options = {name: x.cuda() for name, x in options.items()} | ({"alpha": alpha} if "alpha" not in leaves else {})
        masks = {"window": 20, "key_start": torch.full((batch,), 5), "key_length": torch.full((batch,), keys - 5)}
        for mask in ({}, masks):
            mask = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in mask.items()}
            out = entmax_attention(**leaves, **options, **mask)
            gradients = torch.autograd.grad(out, list(leaves.values()), torch.randn_like(out))
            with torch.no_grad():
                alone = entmax_attention(**leaves, **options, **mask)
            if not all(bool(x.isfinite().all()) for x in (out, alone, *gradients)):
                sys.exit(f"results must be finite, got others for {dtype}, {tuple(out.shape)}, {mask}")


def main() -> None:
    torch.manual_seed(0)
    check(torch.bfloat16, 64, everything=False)
    check(torch.bfloat16, 64, everything=True)
    check(torch.bfloat16, 64, everything=True, alpha=1.0)
    check(torch.float32, 16, everything=True)
    check(torch.float16, 24, everything=False)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
