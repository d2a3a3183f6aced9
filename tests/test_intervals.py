"""The interval of keys that each query sees, against the mask spelled out entry by entry."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from dense_reference import visible_keys
from hypothesis import example, given, settings
from torch import Tensor

from hf_asentmax.ops.intervals import document_starts, key_intervals


def as_mask(first: Tensor, last: Tensor, batch: int, kv_length: int) -> Tensor:
    """bool (B, T, N) from intervals (B or 1, T)."""
    j = torch.arange(kv_length)
    mask = (j >= first[..., None]) & (j < last[..., None])
    return mask.expand(batch, -1, -1)


def check(batch: int, q_length: int, kv_length: int, rules: dict[str, Any]) -> None:
    first, last = key_intervals(q_length, kv_length, **rules)
    assert first.dtype == last.dtype == torch.int32
    assert first.shape == last.shape
    assert first.shape in ((1, q_length), (batch, q_length))
    assert first.is_contiguous()
    assert last.is_contiguous()
    mask = visible_keys(batch, q_length, kv_length, **rules)
    assert torch.equal(as_mask(first, last, batch, kv_length), mask)
    assert torch.equal((last - first).clamp(min=0).expand(batch, -1), mask.sum(-1))  # n_i


def row(values: st.SearchStrategy[int], batch: int) -> st.SearchStrategy[Tensor]:
    return st.lists(values, min_size=batch, max_size=batch).map(torch.tensor)


@st.composite
def padded(draw: st.DrawFn) -> tuple[int, int, int, dict[str, Any]]:
    """Batches with windows, offsets and padding on either side, in any combination."""
    batch, q_length, kv_length = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 12))
    rules: dict[str, Any] = {"is_causal": draw(st.booleans())}
    offsets = st.integers(0, 14)
    offset = draw(st.sampled_from(["none", "int", "scalar", "one", "rows"]))
    if offset == "none" and rules["is_causal"]:
        kv_length = max(kv_length, q_length)
    elif offset == "int":
        rules["query_offset"] = draw(offsets)
    elif offset == "scalar":
        rules["query_offset"] = torch.tensor(draw(offsets))
    elif offset == "one":
        rules["query_offset"] = torch.tensor([draw(offsets)])
    elif offset == "rows":
        rules["query_offset"] = draw(row(offsets, batch))
    if rules["is_causal"] and draw(st.booleans()):
        rules["window"] = draw(st.integers(1, 15))
    if draw(st.booleans()):
        rules["key_start"] = draw(row(st.integers(0, kv_length + 1), batch))
    if draw(st.booleans()):
        rules["key_length"] = draw(row(st.integers(0, kv_length + 3), batch))
    for name in ("key_start", "key_length"):
        if name in rules and draw(st.booleans()):
            rules[name] = rules[name].to(torch.int32)
    return batch, q_length, kv_length, rules


@given(padded())
@settings(max_examples=300)
@example((1, 1, 1, {}))
@example((2, 3, 3, {"key_start": torch.tensor([3, 0]), "key_length": torch.tensor([0, 0])}))
@example((1, 4, 3, {"is_causal": False}))
@example((1, 3, 5, {"query_offset": 9, "window": 2}))
def test_key_intervals_equal_the_explicit_mask(case: tuple[int, int, int, dict[str, Any]]) -> None:
    check(*case)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.booleans(), st.none() | st.integers(1, 7), st.booleans())
@settings(max_examples=100)
@example([0, 3, 0, 0, 2, 0], True, None, False)
@example([0, 3, 0, 0, 2, 0], False, None, True)
def test_key_intervals_keep_packed_documents_apart(
    lengths: list[int], is_causal: bool, window: int | None, short: bool
) -> None:
    tokens = sum(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32 if short else torch.int64)
    if tokens:
        rules = {"is_causal": is_causal, "window": window if is_causal else None, "cu_seqlens": bounds}
        check(1, tokens, tokens, rules)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_document_starts_is_the_start_of_the_document_of_each_position(lengths: list[int]) -> None:
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    expected = [int(bounds[d]) for d, length in enumerate(lengths) for _ in range(length)]
    for dtype in (torch.int32, torch.int64):
        positions = torch.arange(sum(lengths), dtype=dtype)
        starts = document_starts(bounds, positions)
        assert starts.tolist() == expected
        assert starts.dtype == dtype


@pytest.mark.parametrize("offset", [7, torch.tensor(7), torch.tensor([7, 7])], ids=["int", "scalar", "rows"])
def test_key_intervals_of_the_last_queries_equal_those_of_the_whole(offset: int | Tensor) -> None:
    padding = {"key_start": torch.tensor([0, 2]), "key_length": torch.tensor([9, 8]), "window": 5}
    whole = key_intervals(10, 10, **padding)
    tail = key_intervals(3, 10, query_offset=offset, **padding)
    assert all(torch.equal(a[:, 7:], b) for a, b in zip(whole, tail, strict=True))


def test_key_intervals_read_no_tensor_value() -> None:
    # On a GPU a read would wait for it; meta tensors have nothing to read.
    meta = {
        name: torch.zeros(2, dtype=torch.int64, device="meta") for name in ("query_offset", "key_start", "key_length")
    }
    first, last = key_intervals(3, 9, window=4, device="meta", **meta)
    assert first.shape == last.shape == (2, 3)
    bounds = torch.zeros(4, dtype=torch.int32, device="meta")
    for is_causal in (True, False):
        first, last = key_intervals(9, 9, cu_seqlens=bounds, is_causal=is_causal, device="meta")
        assert first.shape == last.shape == (1, 9)
