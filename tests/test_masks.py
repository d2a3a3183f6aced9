"""`asentmax_mask`, the intervals that a model hands to its layers, against the dense mask of Transformers itself."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from helpers import random_tokens, tiny_config
from hypothesis import example, given, settings
from test_patching import entmax_model, native_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    create_causal_mask,
    create_sliding_window_causal_mask,
    or_masks,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from hf_asentmax import patch_model
from hf_asentmax.attention import ATTENTION_NAME, asentmax_mask
from hf_asentmax.masks import check_intervals, once

CREATE = st.sampled_from([create_causal_mask, create_sliding_window_causal_mask])


def as_mask(intervals: Tensor, kv_length: int) -> Tensor:
    """bool (B, 1, T, N) from intervals (B, 1, T, 2)."""
    j = torch.arange(kv_length)
    return (j >= intervals[..., :1]) & (j < intervals[..., 1:])


def check(**arguments: Any) -> None:
    """Compare with Transformers' own mask, and n_i with its row sums."""
    dense = sdpa_mask(**arguments, allow_is_causal_skip=False, device="cpu")
    intervals = asentmax_mask(**arguments, allow_is_causal_skip=True, dtype=torch.float32, device="cpu")
    assert intervals.dtype == torch.int32
    assert intervals.shape == (arguments["batch_size"], 1, arguments["q_length"], 2)
    assert torch.equal(as_mask(intervals, arguments["kv_length"]), dense)
    n = (intervals[..., 1] - intervals[..., 0]).clamp(min=0)
    assert torch.equal(n, dense.sum(-1))


def padding(*real: tuple[int, int], width: int) -> Tensor:
    """bool (B, width): True from the first to the last (excluded) of each pair."""
    j = torch.arange(width)
    return torch.stack([(j >= a) & (j < b) for a, b in real])


WINDOW_4 = sliding_window_causal_mask_function(4)
CHUNK_4 = chunked_causal_mask_function(4, torch.tensor([0, 2]))
CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "one_token": {"q_length": 1, "kv_length": 1},
    "decode": {"q_length": 1, "q_offset": 9},
    "chunk": {"q_length": 3, "q_offset": 7},
    "left_padding": {"attention_mask": padding((0, 10), (4, 10), width=10)},
    "right_padding": {"attention_mask": padding((0, 10), (0, 3), width=10)},
    "both_paddings": {"attention_mask": padding((1, 9), (3, 4), width=10)},
    "nothing_but_padding": {"attention_mask": padding((0, 10), (0, 0), width=10)},
    "left_padding_decode": {"q_length": 1, "q_offset": 9, "attention_mask": padding((0, 10), (9, 10), width=10)},
    "window": {"mask_function": WINDOW_4},
    "window_1": {"mask_function": sliding_window_causal_mask_function(1)},
    "window_larger_than_text": {"mask_function": sliding_window_causal_mask_function(99)},
    "window_left_padding": {"mask_function": WINDOW_4, "attention_mask": padding((0, 10), (5, 10), width=10)},
    "window_right_padding": {"mask_function": WINDOW_4, "attention_mask": padding((0, 10), (0, 3), width=10)},
    "window_decode": {"mask_function": WINDOW_4, "q_length": 1, "q_offset": 9},
    "chunked": {"mask_function": CHUNK_4},
    # A sliding cache that has dropped its first keys: keys start at position 6.
    "sliding_cache": {"mask_function": WINDOW_4, "q_length": 1, "q_offset": 9, "kv_offset": 6, "kv_length": 4},
    "sliding_cache_chunk": {"mask_function": WINDOW_4, "q_length": 3, "q_offset": 9, "kv_offset": 6, "kv_length": 6},
    "sliding_cache_left_padding": {
        "mask_function": WINDOW_4,
        "q_length": 2,
        "q_offset": 9,
        "kv_offset": 6,
        "kv_length": 5,
        "attention_mask": padding((0, 11), (8, 11), width=11),
    },
    "sliding_cache_padding_gone": {
        "mask_function": WINDOW_4,
        "q_length": 1,
        "q_offset": 9,
        "kv_offset": 6,
        "kv_length": 4,
        "attention_mask": padding((0, 10), (2, 10), width=10),
    },
    # A static cache is longer than what it holds, and its query offset is a tensor.
    "static_prefill": {"q_length": 4, "kv_length": 16, "q_offset": torch.tensor(0)},
    "static_decode": {"q_length": 1, "kv_length": 16, "q_offset": torch.tensor(9)},
    "static_left_padding": {
        "q_length": 1,
        "kv_length": 16,
        "q_offset": torch.tensor(9),
        "attention_mask": padding((0, 10), (4, 10), width=10),
    },
    "static_mask_of_full_length": {
        "q_length": 4,
        "kv_length": 16,
        "q_offset": torch.tensor(0),
        "attention_mask": padding((0, 4), (2, 4), width=16),
    },
    "static_sliding": {
        "mask_function": WINDOW_4,
        "q_length": 1,
        "kv_length": 4,
        "q_offset": torch.tensor(9),
        "kv_offset": torch.tensor(6),
    },
    "static_sliding_left_padding": {
        "mask_function": WINDOW_4,
        "q_length": 1,
        "kv_length": 4,
        "q_offset": torch.tensor(9),
        "kv_offset": torch.tensor(6),
        "attention_mask": padding((0, 10), (8, 10), width=10),
    },
    "longer_mask_than_keys": {"q_length": 3, "kv_length": 3, "attention_mask": padding((0, 5), (1, 5), width=5)},
}


@pytest.mark.parametrize("case", CASES)
def test_mask_equals_that_of_transformers(case: str) -> None:
    arguments = {"batch_size": 2, "q_length": 10, "kv_length": 10, "mask_function": causal_mask_function, **CASES[case]}
    check(**arguments)


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    """Any cache with any padding: queries of which the last is the last real position, after keys dropped or kept."""
    batch, q_length, seen = draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.integers(0, 12))
    total = seen + q_length
    arguments: dict[str, Any] = {"batch_size": batch, "q_length": q_length, "q_offset": seen, "kv_length": total}
    window = draw(st.none() | st.integers(1, 9))
    if window is not None:
        arguments["mask_function"] = sliding_window_causal_mask_function(window)
    cache = draw(st.sampled_from(["dynamic", "static", *(["sliding"] if window else [])]))
    if cache == "static":
        arguments["kv_length"] = total + draw(st.integers(0, 6))
    elif cache == "sliding" and window is not None:
        arguments["kv_offset"] = max(seen - window + 1, 0)
        arguments["kv_length"] = total - arguments["kv_offset"]
    if draw(st.booleans()):
        edges = st.tuples(st.integers(0, total), st.integers(0, total)).map(sorted)
        width = draw(st.sampled_from([total, total + 3]))
        arguments["attention_mask"] = padding(*(draw(edges) for _ in range(batch)), width=width)
    if draw(st.booleans()):
        arguments["q_offset"] = torch.tensor(seen)
    return arguments


@given(batches())
@settings(max_examples=300)
@example({"batch_size": 1, "q_length": 1, "q_offset": 0, "kv_length": 1})
def test_mask_equals_that_of_transformers_in_any_combination(arguments: dict[str, Any]) -> None:
    check(**arguments)


@st.composite
def documents(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    """Lengths of the documents of each row, more than one in some row, and a window."""
    total = draw(st.integers(2, 12))
    lengths = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = sorted(draw(st.sets(st.integers(1, total - 1), max_size=5)))
        lengths.append([b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)])
    if all(len(x) == 1 for x in lengths):
        lengths[0] = [1, total - 1]
    return lengths, draw(st.integers(1, 13))


def by_model(
    create: Callable, batch: int, tokens: int, *, window: int, cache: Any = None, **inputs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Transformers' dense mask of a model with that window, and ours, each as its model would be given it."""
    config = tiny_config("mistral", sliding_window=window)
    embeddings, inputs = torch.zeros(batch, tokens, 32), {"attention_mask": None, **inputs}
    config._attn_implementation = "sdpa"
    dense = create(config, embeddings, past_key_values=cache, allow_is_causal_skip=False, **inputs)
    config._attn_implementation = ATTENTION_NAME
    return dense, create(config, embeddings, past_key_values=cache, **inputs)


@given(documents(), CREATE)
@example(([[3, 1, 6], [2, 2, 6]], 4), create_causal_mask)
@example(([[10], [1] * 10], 4), create_sliding_window_causal_mask)
def test_mask_of_packed_documents_equals_that_of_transformers(
    case: tuple[list[list[int]], int], create: Callable
) -> None:
    lengths, window = case
    position_ids = torch.stack([torch.cat([torch.arange(x) for x in row]) for row in lengths])
    batch, tokens = position_ids.shape
    dense, intervals = by_model(create, batch, tokens, window=window, position_ids=position_ids)
    assert torch.equal(as_mask(intervals, tokens), dense)
    assert torch.equal(intervals[..., 1] - intervals[..., 0], dense.sum(-1))


@pytest.mark.parametrize("create", [create_causal_mask, create_sliding_window_causal_mask], ids=["causal", "sliding"])
@pytest.mark.parametrize("kind", ["dynamic", "dynamic_sliding", "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left_padding"])
def test_mask_follows_the_caches_of_transformers(create: Callable, kind: str, padded: bool) -> None:
    config = tiny_config("mistral", sliding_window=4 if create is create_sliding_window_causal_mask else None)
    if kind == "static":
        cache: Any = StaticCache(config=config, max_cache_len=16)
    else:
        cache = DynamicCache(config=config) if kind == "dynamic_sliding" else DynamicCache()
    seen = 0
    for tokens in (6, 1, 1, 3, 1):
        seen += tokens
        mask = padding((0, seen), (2, seen), width=seen) if padded else None
        dense, intervals = by_model(create, 2, tokens, window=4, cache=cache, attention_mask=mask)
        assert torch.equal(as_mask(intervals, dense.shape[-1]), dense)
        for layer in range(config.num_hidden_layers):
            keys, _ = cache.update(torch.zeros(2, 2, tokens, 8), torch.zeros(2, 2, tokens, 8), layer)
        assert keys.shape[2] == dense.shape[-1]


HOLE = torch.tensor([[True, True, False, True]])


def test_mask_with_a_hole_in_the_padding_raises() -> None:
    with pytest.raises(ValueError, match="attention_mask must .* hole .* pad each row on one side"):
        asentmax_mask(batch_size=1, q_length=4, kv_length=4, attention_mask=HOLE)


def test_mask_with_a_hole_in_the_padding_raises_in_decode_or_honours_it() -> None:
    # As a right-padded prompt is continued: the third key is padding, the fourth is the new token itself.
    arguments = {"batch_size": 1, "q_length": 1, "kv_length": 4, "q_offset": 3, "attention_mask": HOLE}
    try:
        intervals = asentmax_mask(**arguments)
    except ValueError:
        return
    assert torch.equal(as_mask(intervals, 4), sdpa_mask(**arguments, allow_is_causal_skip=False))


def later_key(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key <= query + 1


REFUSED: dict[str, dict[str, Any]] = {
    "bidirectional": {"mask_function": bidirectional_mask_function},
    "bidirectional_window": {"mask_function": sliding_window_bidirectional_mask_function(3)},
    "later_key": {"mask_function": or_masks(causal_mask_function, later_key)},
    "custom": {"mask_function": and_masks(causal_mask_function, later_key), "use_vmap": True},
}


@pytest.mark.parametrize("case", REFUSED)
def test_mask_that_is_not_causal_or_custom_raises(case: str) -> None:
    with pytest.raises(NotImplementedError, match="asentmax attention must be causal.* got a"):
        asentmax_mask(batch_size=1, q_length=5, kv_length=5, **REFUSED[case])


def test_once_computes_anew_for_another_input_or_after_a_write() -> None:
    owner, calls = torch.zeros(3), []

    def compute() -> int:
        calls.append(1)
        return len(calls)

    one, other = object(), object()
    assert [once(owner, "x", compute, one) for _ in range(3)] == [1, 1, 1]
    assert once(owner, "y", compute, one) == 2
    assert once(owner, "x", compute, other) == 3
    owner.add_(1)
    assert once(owner, "x", compute, one) == 4
    with torch.inference_mode():
        assert once(owner, "x", compute, one) == 5  # a gradient can't go through what is made here
        temporary = torch.zeros(3)
        assert [once(temporary, "x", compute, one) for _ in range(2)] == [6, 7]  # its writes are not counted
    assert once(torch.zeros(3), "x", compute, one) == 8


@pytest.mark.parametrize("positions", ["rope", "nape"])
def test_what_layers_share_goes_with_the_forward(positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Any] = []

    def note(*arguments: Any) -> Tensor:
        intervals = check_intervals(*arguments)
        masks.append(weakref.ref(intervals))
        return intervals

    monkeypatch.setattr("hf_asentmax.attention.check_intervals", note)
    model = entmax_model(positions=positions)
    ids = torch.arange(12)[None]
    gc.disable()  # no cycle either, which would hold on to a GPU's memory
    try:
        model(ids, position_ids=torch.tensor([[*range(5), *range(7)]])).logits.sum().backward()
        assert len(masks) == 2
        assert all(mask() is None for mask in masks)
    finally:
        gc.enable()


class Operations(TorchDispatchMode):
    """Counts operations: what the host of a GPU has to launch or to note."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_decoding_adds_few_operations_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the attention itself: on a GPU generate() with a growing cache waits for the host."""
    monkeypatch.setattr("hf_asentmax.ops.attention.attend", lambda query, *_: query)

    def operations(layers: int, **settings: Any) -> int:
        model = native_model("llama", num_hidden_layers=layers).bfloat16()
        if settings:
            patch_model(model, alpha=1.5, **settings)
        cache = model(torch.arange(9)[None], use_cache=True).past_key_values
        with Operations() as counted:
            model(torch.tensor([[3]]), past_key_values=cache)
        return counted.count

    softmax, *ours = (
        operations(3, **settings) - operations(2, **settings)
        for settings in ({}, {"positions": "rope"}, {"positions": "nape"})
    )
    assert softmax > 50
    assert all(count - softmax <= 21 for count in ours), (softmax, ours)


def test_compiled_mask_with_a_hole_raises() -> None:
    model = entmax_model()
    tokens, mask = random_tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    mask[0, :2] = 0
    expected = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(compiled(tokens, attention_mask=mask).logits, expected)
    mask[0, 4] = 0
    with pytest.raises(RuntimeError, match="attention_mask must hide keys only before and after"):
        compiled(tokens, attention_mask=mask)


@pytest.mark.parametrize("shape", [(9,), (2, 9, 9)])
def test_mask_of_other_dimensions_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"attention_mask must be 2-D \(batch, tokens\), got \("):
        entmax_model()(random_tokens(2, 9), attention_mask=torch.ones(shape, dtype=torch.int64))
