"""`softmax_attention`, a GPU's path for alpha = 1, as far as a CPU can tell: arithmetic, masks, what goes where.

FlexAttention is traced as on a GPU and then runs by PyTorch's dense definition of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense_reference import dense_attention
from helpers import TOLERANCE
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask

from hf_asentmax import entmax_attention
from hf_asentmax.ops import attention, softmax
from hf_asentmax.ops.attention import checked_intervals
from hf_asentmax.ops.intervals import key_intervals
from hf_asentmax.ops.softmax import softmax_attention, takes_softmax


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """FlexAttention with gradients on a CPU. Counts the compilations."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(softmax._flex_attention, fullgraph=True, backend=counter)
    monkeypatch.setattr(softmax, "_compiled_flex", lambda: function)
    monkeypatch.setattr(
        flex_attention, "_validate_device", lambda *tensors: None
    )  # "no backward on CPU": not by its kernel
    return counter


def ints(*values: int) -> Tensor:
    return torch.tensor(values)


# Sizes: B batch, H heads, K key/value heads, T queries, N keys, D and V head dims; "scale" and "alibi" ask for a query
# scale (of both signs, from 0 to 20) and slopes; the rest are masks of `entmax_attention`.
BASE: dict[str, Any] = {"B": 2, "H": 4, "K": 2, "T": 63, "N": 63, "D": 16, "V": 16}
CASES: dict[str, dict[str, Any]] = {
    "one_token": {"T": 1, "N": 1, "scale": True},
    "one_of_many": {"T": 1, "N": 300, "scale": True, "alibi": True},
    "length_17": {"T": 17, "N": 17, "H": 8, "K": 1, "scale": True},
    "length_111": {"T": 111, "N": 111, "K": 4, "scale": True, "alibi": True},
    "blocks": {"T": 300, "N": 300, "D": 24, "V": 17, "scale": True},
    "chunk_of_a_longer_text": {"T": 140, "N": 290, "alibi": True},
    "window": {"T": 300, "N": 300, "window": 50},
    "window_1": {"window": 1, "scale": True},
    "left_padding": {"T": 270, "N": 270, "key_start": ints(0, 140), "scale": True, "alibi": True},
    "right_padding": {"T": 270, "N": 270, "key_length": ints(270, 100), "scale": True},
    "padding_to_nothing": {"key_start": ints(63, 10), "key_length": ints(0, 0), "scale": True, "alibi": True},
    "offset_by_row": {"T": 10, "N": 200, "query_offset": ints(20, 190), "window": 30, "scale": True},
    "packed": {"B": 1, "T": 300, "N": 300, "cu_seqlens": ints(0, 1, 20, 20, 150, 300), "scale": True, "alibi": True},
    "not_causal": {"T": 130, "N": 150, "is_causal": False, "scale": True},
}


def build(case: dict[str, Any], dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor | None, dict[str, Any]]:
    """The differentiable arguments, the slopes, and the masks."""
    case = {**BASE, **case}
    B, H, K, T, N, D, V = (case.pop(x) for x in "BHKTNDV")
    leaves = {
        "query": torch.randn(B, H, T, D, dtype=dtype),
        "key": torch.randn(B, K, N, D, dtype=dtype),
        "value": torch.randn(B, K, N, V, dtype=dtype),
    }
    if case.pop("scale", False):
        scale = torch.randn(B, H, T)
        scale[:, 0] *= 1e-3
        scale[:, 1, ::3] = 0.0
        scale[:, -1] = 1 + 3 * torch.rand(B, T)
        leaves["query_scale"] = scale
    slopes = torch.linspace(0.0, 0.5, H) if case.pop("alibi", False) else None
    return leaves, slopes, case


def run(
    function: Callable[..., Tensor], leaves: dict[str, Tensor], weight: Tensor, **options: Any
) -> dict[str, Tensor]:
    """The output and every gradient by name."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    out = function(**leaves, **options)
    gradients = torch.autograd.grad(out, list(leaves.values()), weight)
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def assert_near(ours: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Within the tolerance of the dtype, of the largest entry: gradients add up many terms of either sign."""
    assert ours.keys() == expected.keys()
    for name, x in expected.items():
        assert ours[name].dtype == (torch.float32 if name == "query_scale" else dtype)
        largest = x.abs().max().clamp(min=1.0)
        torch.testing.assert_close(ours[name].double() / largest, x / largest, **TOLERANCE[dtype])


def exact(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() for name, x in leaves.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("compiled")
def test_softmax_attention_equals_the_dense_reference(case: str) -> None:
    leaves, slopes, masks = build(CASES[case], torch.float32)
    query = leaves["query"]
    first, last = key_intervals(query.shape[2], leaves["key"].shape[2], **masks)
    weight = torch.randn(*query.shape[:3], leaves["value"].shape[-1])
    ours = run(softmax_attention, leaves, weight, first=first, last=last, scaling=0.25, alibi_slopes=slopes)
    options = {"alpha": 1.0, "scaling": 0.25, "alibi_slopes": slopes, **masks}
    expected = run(dense_attention, exact(leaves), weight.double(), **options)
    assert_near(ours, expected, torch.float32)
    unseen = (first >= last).expand(len(query), -1)
    for name in ("out", "query", "query_scale"):
        if name in ours:
            assert (ours[name].transpose(1, 2)[unseen] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("compiled")
def test_softmax_attention_of_16_bits(dtype: torch.dtype) -> None:
    leaves, slopes, masks = build(CASES["left_padding"], dtype)
    assert slopes is not None
    slopes = slopes.to(dtype)
    first, last = key_intervals(270, 270, **masks)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):  # no say in an attention given its tensors
        out = softmax_attention(**leaves, first=first, last=last, scaling=0.25, alibi_slopes=slopes)
    expected = dense_attention(**exact(leaves), alpha=1.0, scaling=0.25, alibi_slopes=slopes, **masks)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, check_dtype=False, **TOLERANCE[dtype])


@given(
    st.floats(min_value=-1e4, max_value=1e4, width=32, allow_subnormal=False),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_softmax_attention_splits_the_scale_without_rounding_the_query(scale: float, dtype: torch.dtype) -> None:
    query = torch.randn(1, 1, 1, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    scaled, factor = softmax._split_scale(query, torch.full((1, 1, 1), scale))
    product = scaled.double() * factor.double()[..., None]
    assert scaled.dtype == dtype
    assert (scaled.abs() <= query.abs()).all()
    least = torch.finfo(dtype).tiny * max(abs(factor.item()), 1.0)  # what float16 holds no further below
    torch.testing.assert_close(product, query.double() * scale, rtol=2e-7, atol=least)


@st.composite
def random_intervals(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    queries, keys = draw(st.integers(1, 400)), draw(st.integers(1, 400))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    if draw(st.booleans()):  # smooth ones, so that blocks are full
        last = (torch.arange(queries) + keys - queries + 1).clamp(min=0)[None].repeat(2, 1)
        first = (last - torch.tensor([[10**6], [draw(st.integers(1, 400))]])).clamp(min=0)
    else:
        first, last = torch.randint(0, keys + 1, (2, 2, queries), generator=generator)
    return first.int(), last.int(), keys


@given(random_intervals())
def test_softmax_attention_block_mask_covers_what_is_seen(intervals: tuple[Tensor, Tensor, int]) -> None:
    first, last, keys = intervals
    mask = softmax._block_mask(first, last, keys)
    j = torch.arange(keys)
    seen = (first[..., None] <= j) & (j < last[..., None])
    padding = (0, -keys % 128, 0, -first.shape[1] % 128)
    blocks = torch.nn.functional.pad(seen, padding).unflatten(1, (-1, 128)).unflatten(3, (-1, 128))
    whole = BlockMask.from_kv_blocks(mask.full_kv_num_blocks, mask.full_kv_indices).to_dense()[:, 0].bool()
    either = mask.to_dense()[:, 0].bool()  # partial or full
    assert torch.equal(whole, blocks.all(4).all(2))
    assert (either | ~blocks.any(4).any(2)).all()
    assert mask.shape == (2, 1, *seen.shape[1:])
    assert max(x.numel() for x in mask.as_tuple() if isinstance(x, Tensor)) <= 2 * 4 * 4


# Head dims (D, D_v), heads, dtype; what computes them: "sdpa" where the intervals are known, "flex", or neither.
ROUTES: list[tuple[tuple[int, int], tuple[int, int], torch.dtype, str | None]] = [
    ((64, 64), (8, 2), torch.bfloat16, "sdpa"),
    ((128, 128), (4, 4), torch.float16, "sdpa"),
    ((64, 32), (4, 4), torch.float32, "sdpa"),
    ((64, 64), (8, 2), torch.float32, "flex"),  # the memory-efficient kernel knows no groups
    ((64, 32), (4, 4), torch.bfloat16, "flex"),  # flash attention wants D = D_v
    ((60, 60), (4, 4), torch.bfloat16, "flex"),
    ((65, 65), (4, 4), torch.float32, "flex"),
    ((256, 256), (4, 2), torch.bfloat16, "flex"),
    ((256, 256), (4, 2), torch.float32, None),
    ((192, 192), (4, 2), torch.bfloat16, None),
    ((8, 8), (4, 2), torch.bfloat16, None),
    ((64, 8), (4, 2), torch.bfloat16, None),
    ((64, 64), (4, 2), torch.float64, None),
]


@pytest.mark.parametrize(("dims", "heads", "dtype", "route"), ROUTES, ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
def test_softmax_attention_chooses_by_shape(
    dims: tuple[int, int],
    heads: tuple[int, int],
    dtype: torch.dtype,
    route: str | None,
    is_causal: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[str] = []

    monkeypatch.setattr(softmax, "scaled_dot_product_attention", lambda *_, **__: called.append("sdpa"))
    monkeypatch.setattr(softmax, "_flex", lambda *_: called.append("flex"))
    query = torch.randn(2, heads[0], 9, dims[0], dtype=dtype)
    key, value = (torch.randn(2, heads[1], 9, dim, dtype=dtype) for dim in dims)
    assert takes_softmax(query, key, value) == (route is not None)
    if route is None:
        return
    first, last = key_intervals(9, 9, is_causal=is_causal)
    for unknown in ({}, {"query_scale": torch.ones(2, heads[0], 9)}, {"alibi_slopes": torch.ones(heads[0])}):
        softmax_attention(query, key, value, first, last, scaling=0.3, **unknown)
        softmax_attention(query, key, value, first, last, scaling=0.3, is_causal=is_causal, **unknown)
    strided = query.transpose(-1, -2).contiguous().transpose(-1, -2)
    softmax_attention(strided, key, value, first, last, scaling=0.3, is_causal=is_causal)
    assert called == ["flex", route, *["flex"] * 5]


@pytest.mark.parametrize("masks", [{}, {"is_causal": False}], ids=str)
@pytest.mark.parametrize(("heads", "dtype"), [(2, torch.bfloat16), (4, torch.float32)], ids=str)
def test_softmax_attention_by_sdpa_equals_the_dense_reference(
    heads: int, dtype: torch.dtype, masks: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softmax, "_flex", None)
    leaves, _, _ = build({"K": heads}, dtype)
    first, last, is_causal = checked_intervals(*leaves.values(), None, None, **masks)
    weight = torch.randn_like(leaves["query"])
    ours = run(softmax_attention, leaves, weight, first=first, last=last, scaling=0.25, is_causal=is_causal)
    expected = run(dense_attention, exact(leaves), weight.double(), alpha=1.0, scaling=0.25, **masks)
    assert_near(ours, expected, dtype)


@pytest.mark.parametrize("tokens", [(0, 5), (5, 0), (0, 0)])
def test_softmax_attention_leaves_empty_tensors_to_the_operator(tokens: tuple[int, int]) -> None:
    query, key = torch.zeros(1, 2, tokens[0], 16), torch.zeros(1, 2, tokens[1], 16)
    assert not takes_softmax(query, key, key)


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


def test_softmax_attention_is_not_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "softmax_attention", None)
    query = torch.randn(1, 2, 9, 16)
    expected = dense_attention(query, query, query, alpha=1.0)
    out = entmax_attention(query, query, query, alpha=1.0)
    torch.testing.assert_close(out, expected, check_dtype=False, **TOLERANCE[torch.float32])


def test_softmax_attention_of_many_lengths_is_compiled_a_few_times(compiled: CompileCounterWithBackend) -> None:
    for length in (130, 140, 150, 256, 300, 33, 9, 20, 310):
        leaves, slopes, _ = build({"T": length, "N": length, "scale": True, "alibi": True}, torch.float32)
        first, last = key_intervals(length, length)
        out = softmax_attention(**leaves, first=first, last=last, scaling=0.25, alibi_slopes=slopes)
        expected = dense_attention(**exact(leaves), alpha=1.0, scaling=0.25, alibi_slopes=slopes)
        torch.testing.assert_close(out, expected, check_dtype=False, **TOLERANCE[torch.float32])
    assert compiled.frame_count == 3  # the first length on its own, then any of several blocks, any of one


def test_softmax_attention_takes_any_scaling(compiled: CompileCounterWithBackend) -> None:
    leaves, _, _ = build({"T": 5, "N": 5}, torch.float32)
    first, last = key_intervals(5, 5)
    for scaling in (0.2, 0.25, 0.3, 0.25):
        out = softmax_attention(**leaves, first=first, last=last, scaling=scaling)
        expected = dense_attention(**exact(leaves), alpha=1.0, scaling=scaling)
        torch.testing.assert_close(out, expected, check_dtype=False, **TOLERANCE[torch.float32])
    assert compiled.frame_count == 3  # a constant of the kernel


@pytest.mark.usefixtures("compiled")
@torch._dynamo.config.patch(recompile_limit=1)
def test_softmax_attention_may_be_compiled_often() -> None:
    first, last = key_intervals(5, 5)
    for dim in (16, 17, 18):
        query = torch.randn(1, 1, 5, dim)
        softmax_attention(query, query, query, first, last, scaling=0.3)


@pytest.mark.parametrize("is_causal", [True, None])
@pytest.mark.usefixtures("compiled")
def test_softmax_attention_compiles_within_a_model(is_causal: bool | None) -> None:
    leaves, _, _ = build({"H": 2}, torch.float32)
    first, last = key_intervals(63, 63)
    options = {"first": first, "last": last, "scaling": 0.25, "is_causal": is_causal}
    weight = torch.randn(2, 2, 63, 16)
    function = torch.compile(softmax_attention, fullgraph=True, backend="aot_eager")
    ours, expected = run(function, leaves, weight, **options), run(softmax_attention, leaves, weight, **options)
    for name, x in expected.items():
        torch.testing.assert_close(ours[name], x, **TOLERANCE[torch.float32])
