"""Plain softmax attention by SDPA's fused kernels: what goes there, and that it is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_reference import dense_attention
from helpers import TOLERANCE
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_asentmax import entmax_attention
from hf_asentmax.ops import attention
from hf_asentmax.ops.attention import attention_from_intervals, checked_intervals
from hf_asentmax.ops.intervals import key_intervals
from hf_asentmax.ops.softmax import fused_softmax_attention, is_fused


def ints(*values: int) -> Tensor:
    return torch.tensor(values)


# Head dims (D, D_v), heads (H, H_kv), dtype; whether a fused kernel takes them.
SHAPES: list[tuple[tuple[int, int], tuple[int, int], torch.dtype, bool]] = [
    ((64, 64), (8, 2), torch.bfloat16, True),
    ((128, 128), (4, 4), torch.float16, True),
    ((64, 32), (4, 4), torch.float32, True),
    ((64, 64), (8, 2), torch.float32, False),  # the memory-efficient kernel knows no groups
    ((64, 32), (4, 4), torch.bfloat16, False),  # flash attention wants D = D_v
    ((60, 60), (4, 4), torch.bfloat16, False),
    ((65, 65), (4, 4), torch.float32, False),
    ((256, 256), (4, 2), torch.bfloat16, False),
    ((64, 64), (4, 4), torch.float64, False),
]


@pytest.mark.parametrize(("dims", "heads", "dtype", "fused"), SHAPES, ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
def test_softmax_attention_is_fused_where_the_mask_is_plain(
    dims: tuple[int, int],
    heads: tuple[int, int],
    dtype: torch.dtype,
    fused: bool,
    is_causal: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[str] = []
    monkeypatch.setattr(attention, "fused_softmax_attention", lambda *_, **__: called.append("fused"))
    monkeypatch.setattr(attention, "attend", lambda *_: called.append("operator"))
    with FakeTensorMode():
        query = torch.empty(2, heads[0], 9, dims[0], dtype=dtype, device="cuda")
        key, value = (torch.empty(2, heads[1], 9, dim, dtype=dtype, device="cuda") for dim in dims)
        assert is_fused(query, key, value) == fused
        first, last = key_intervals(9, 9, is_causal=is_causal)
        more: list[dict[str, Any]] = [
            {"alpha": 1.5},
            {"alpha": torch.empty((), device="cuda")},
            {"query_scale": torch.empty(2, heads[0], 9, device="cuda")},
            {"alibi_slopes": torch.empty(heads[0], device="cuda")},
            {"is_causal": None},
        ]
        for options in more:
            attention_from_intervals(query, key, value, first, last, **{"alpha": 1.0, "is_causal": is_causal} | options)
        strided = torch.empty(2, heads[0], dims[0], 9, dtype=dtype, device="cuda").transpose(-1, -2)
        attention_from_intervals(strided, key, value, first, last, alpha=1.0, is_causal=is_causal)
        assert set(called) == {"operator"}
        attention_from_intervals(query, key, value, first, last, alpha=1.0, is_causal=is_causal)
    assert called[-1] == ("fused" if fused else "operator")


@pytest.mark.parametrize("masks", [{}, {"is_causal": False}], ids=str)
@pytest.mark.parametrize(("heads", "dtype"), [(2, torch.bfloat16), (4, torch.float32)], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_fused_softmax_attention_equals_the_dense_reference(
    heads: int, dtype: torch.dtype, masks: dict[str, Any], compiled: bool
) -> None:
    tensors = [torch.randn(2, h, 63, 16, dtype=dtype, requires_grad=True) for h in (4, heads, heads)]
    *_, is_causal = checked_intervals(*tensors, None, None, **masks)
    function = fused_softmax_attention
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    out = function(*tensors, scaling=0.25, is_causal=is_causal)
    weight = torch.randn_like(out)
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    expected = dense_attention(*doubles, alpha=1.0, scaling=0.25, **masks)
    for ours, exact in zip(
        (out, *torch.autograd.grad(out, tensors, weight)),
        (expected, *torch.autograd.grad(expected, doubles, weight.double())),
        strict=True,
    ):
        assert ours.dtype == dtype
        largest = exact.abs().max().clamp(min=1.0)  # gradients add up many terms of either sign
        torch.testing.assert_close(ours.double() / largest, exact / largest, **TOLERANCE[dtype])


def test_softmax_attention_leaves_empty_tensors_to_the_operator() -> None:
    for tokens, keys in ((0, 5), (5, 0), (0, 0)):
        query, key = torch.zeros(1, 2, tokens, 16), torch.zeros(1, 2, keys, 16)
        assert not is_fused(query, key, key)


KNOWN: list[tuple[int, int, dict[str, Any], bool | None]] = [
    (9, 9, {}, True),
    (1, 9, {}, False),
    (1, 1, {}, False),
    (4, 9, {}, None),  # SDPA would align the first query, not the last, with its key
    (9, 9, {"is_causal": False}, False),
    (4, 9, {"is_causal": False}, False),
    (9, 9, {"window": 3}, None),
    (9, 9, {"query_offset": 0}, None),
    (9, 9, {"key_start": ints(0, 2)}, None),
    (9, 9, {"key_length": ints(9, 2), "is_causal": False}, None),
]


@pytest.mark.parametrize(("queries", "keys", "masks", "known"), KNOWN, ids=str)
def test_softmax_attention_knows_plain_masks_from_their_arguments(
    queries: int, keys: int, masks: dict[str, Any], known: bool | None
) -> None:
    query, key = torch.zeros(2, 2, queries, 4), torch.zeros(2, 2, keys, 4)
    first, last, plain = checked_intervals(query, key, key, None, None, **masks)
    assert plain is known
    if plain is not None:
        i, j = torch.arange(queries)[:, None], torch.arange(keys)
        seen = (first[..., None] <= j) & (j < last[..., None])
        assert (seen == ((j <= i) if plain else torch.ones(queries, keys, dtype=torch.bool))).all()


def test_softmax_attention_of_a_cpu_is_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "fused_softmax_attention", None)
    query = torch.randn(1, 2, 9, 16)
    expected = dense_attention(query, query, query, alpha=1.0)
    out = entmax_attention(query, query, query, alpha=1.0)
    torch.testing.assert_close(out, expected, check_dtype=False, **TOLERANCE[torch.float32])
