"""The implementations that are compared, one record each, and the float64 check that each must pass before it is timed.

``asentmax`` and ``adasplash`` (AdaSplash-2, openreview.net/forum?id=7qpvff2gWI) compute alpha-entmax with alpha = 1.5,
the others softmax: another function of the same inputs, at the speed that users have now.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..ops import reference
from ..ops.attention import entmax_attention
from .inputs import Case

ALPHA = {"entmax": 1.5, "softmax": 1.0}
# Relative Frobenius errors against float64 on the same inputs. Right ones in bfloat16 lie between 1e-3 and 5e-3.
TOLERANCE = {"output": 1e-2, "dq": 2e-2, "dk": 2e-2, "dv": 2e-2}

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # query, key, value -> output


@dataclass(frozen=True)
class Implementation:
    """One way to compute causal attention.

    Attributes:
        name: how it is asked for.
        computes: "entmax" or "softmax".
        build: makes the function of query, key and value for a case on a device.
        obstacle: why it can't serve a case; None if it can.
        context: what must hold around its calls.
    """

    name: str
    computes: str
    build: Callable[[Case, torch.device], Attention]
    obstacle: Callable[[Case], str | None] = lambda case: None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def _asentmax(case: Case, device: torch.device) -> Attention:
    return partial(entmax_attention, alpha=ALPHA["entmax"], alibi_slopes=case.slopes(device))


def _sdpa(case: Case, device: torch.device) -> Attention:
    return partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=case.heads != case.kv_heads)


def _sdpa_backend(name: str) -> AbstractContextManager[Any]:
    return sdpa_kernel(getattr(SDPBackend, name))


def _no_slopes(case: Case) -> str | None:
    return "has no slopes without an N x N bias" if case.nape else None


def causal_block_mask(tokens: int, device: torch.device) -> BlockMask:
    """The causal mask of FlexAttention from its definition; `create_block_mask` would evaluate all N x N pairs."""
    rows = torch.arange(math.ceil(tokens / 128), device=device, dtype=torch.int32)
    return BlockMask.from_kv_blocks(
        torch.ones_like(rows)[None, None],  # one block on the diagonal, which the rule cuts
        ((rows[:, None] + rows) % len(rows))[None, None],
        rows[None, None],  # and all before it whole
        rows.expand(len(rows), -1).contiguous()[None, None],
        BLOCK_SIZE=128,
        mask_mod=lambda b, h, q, k: q >= k,
        seq_lengths=(tokens, tokens),
    )


def _flex(case: Case, device: torch.device) -> Attention:
    torch._dynamo.reset()  # else its limit of recompilations falls on the ninth shape of a sweep
    functorch_config.donated_buffer = False  # a backward is timed several times for one forward
    slopes = case.slopes(device)
    bias = None if slopes is None else lambda score, b, h, q, k: score - slopes[h] * (q - k)
    mask = causal_block_mask(case.tokens, device)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return partial(compiled, score_mod=bias, block_mask=mask, enable_gqa=case.heads != case.kv_heads)


def _adasplash(case: Case, device: torch.device) -> Attention:
    from adasplash import adasplash_v2

    return partial(adasplash_v2, niter=1)  # its default


def _adasplash_obstacle(case: Case) -> str | None:
    if importlib.util.find_spec("adasplash") is None:
        return "is not installed; pip install 'hf_asentmax[bench]'"
    if case.nape:
        return "has no slopes"
    if case.tokens < 64 or case.tokens & (case.tokens - 1):
        return "takes only a power of two of tokens"
    return "takes only head dims 16, 32, 64, 128, 256" if case.head_dim not in (16, 32, 64, 128, 256) else None


IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        Implementation("asentmax", "entmax", _asentmax),
        Implementation("adasplash", "entmax", _adasplash, _adasplash_obstacle),
        Implementation("sdpa_cudnn", "softmax", _sdpa, _no_slopes, partial(_sdpa_backend, "CUDNN_ATTENTION")),
        Implementation("sdpa_flash", "softmax", _sdpa, _no_slopes, partial(_sdpa_backend, "FLASH_ATTENTION")),
        Implementation("flex", "softmax", _flex),
        Implementation("sdpa_math", "softmax", _sdpa, _no_slopes, partial(_sdpa_backend, "MATH")),
    )
}


class Inputs(NamedTuple):
    """Query (B, H, N, D), key and value (B, H_kv, N, D), and the gradient of the output (B, H, N, D)."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor


class Expected(NamedTuple):
    """Float64 results of some (batch row, key/value head) pairs, each with the query heads of its group."""

    pairs: list[tuple[int, int]]
    results: list[dict[str, Tensor]]


@torch.no_grad()
def expected_results(inputs: Inputs, slopes: Tensor | None, computes: str, *, max_scores: int = 1 << 32) -> Expected:
    """Output and gradients in float64, in row chunks.

    Args:
        inputs: the tensors.
        slopes: (H,) or None.
        computes: "entmax" or "softmax".
        max_scores: most scores to compute; beyond it fewer key/value heads are checked, evenly spread.
    """
    query, key, value, grad = inputs
    batch, heads, tokens, dim = query.shape
    kv_heads, alpha = key.shape[1], ALPHA[computes]
    group = heads // kv_heads
    step = max(1, math.ceil(batch * heads * tokens**2 / max_scores))
    pairs = [divmod(index, kv_heads) for index in range(0, batch * kv_heads, step)]
    chunk = max(1, (1 << 26 if query.is_cuda else 1 << 20) // (group * tokens))
    position = torch.arange(tokens, device=query.device)
    results = []
    for row, head in pairs:
        own = slice(head * group, (head + 1) * group)
        q, do = query[row, own].double(), grad[row, own].double()
        k, v = key[row, head].double(), value[row, head].double()
        out, dq, dk, dv = torch.empty_like(do), torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for start in range(0, tokens, chunk):
            rows, keys = slice(start, min(start + chunk, tokens)), slice(0, min(start + chunk, tokens))
            scores = q[:, rows] @ k[keys].T * dim**-0.5
            distance = position[rows, None] - position[keys]
            if slopes is not None:
                scores -= slopes[own, None, None].double() * distance
            p = reference.entmax_forward(scores.masked_fill_(distance < 0, -torch.inf), alpha)
            ds, _ = reference.entmax_backward(do[:, rows] @ v[keys].T, p, alpha, alpha_grad=False)
            ds *= dim**-0.5
            out[:, rows], dq[:, rows] = p @ v[keys], ds @ k[keys]
            dv[keys] += (p.transpose(1, 2) @ do[:, rows]).sum(0)
            dk[keys] += (ds.transpose(1, 2) @ q[:, rows]).sum(0)
        results.append({"output": out, "dq": dq, "dk": dk, "dv": dv})
    return Expected(pairs, results)


def relative_errors(found: dict[str, Tensor], expected: Expected) -> dict[str, float]:
    """``|found - expected| / |expected|`` in the Frobenius norm over the checked heads, by tensor.

    Args:
        found: "output" and "dq" (B, H, N, D), "dk" and "dv" (B, H_kv, N, D).
        expected: what :func:`expected_results` gave.
    """
    errors = {}
    for name, tensor in found.items():
        missed = total = torch.zeros((), dtype=torch.float64, device=tensor.device)
        for (row, head), results in zip(expected.pairs, expected.results, strict=True):
            right = results[name]
            group = right.shape[0] if right.dim() == 3 else 1
            own = tensor[row, head * group : (head + 1) * group].double().view_as(right)
            missed, total = missed + (own - right).square().sum(), total + right.square().sum()
        errors[name] = (missed / total).sqrt().item()
    return errors


def verdict(errors: dict[str, float]) -> str | None:
    """What is wrong with an implementation of these errors; None if nothing is. NaN is wrong."""
    wrong = [f"{name} {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE[name]]
    return f"wrong: relative error of {', '.join(wrong)}" if wrong else None
