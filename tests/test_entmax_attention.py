"""`entmax_attention` against the dense float64 reference, and everything that it promises beside the numbers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from dense_reference import dense_attention, dense_entmax
from helpers import PRINT_PEAK_MEMORY, TOLERANCE
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.library import opcheck

from hf_asentmax import entmax, entmax_attention
from hf_asentmax.ops import reference
from hf_asentmax.ops.attention import attention_from_intervals
from hf_asentmax.ops.baselines import adaptive_temperature_attention, topk_attention

OPS = torch.ops.hf_asentmax
GRADIENTS = ("query", "key", "value", "query_scale", "alpha")


def ints(*values: int) -> Tensor:
    return torch.tensor(values)


def slopes(heads: int) -> Tensor:
    return torch.linspace(0.0, 0.5, heads)  # one head without a bias


# Sizes: B batch, H heads, K key/value heads, T queries, N keys, D and V head dims. "scale" and "alibi" ask for a random
# query scale and slopes; a tuple alpha is a learned tensor; the rest goes to `entmax_attention` as it is. No alpha lies
# between 1.5 and 2: there gradients at the edge of the support (slope p^(2-alpha)) are ill-conditioned in float32.
BASE: dict[str, Any] = {"B": 2, "H": 4, "K": 2, "T": 63, "N": 63, "D": 12, "V": 12}
CASES: dict[str, dict[str, Any]] = {
    "one_token": {"T": 1, "N": 1},
    "length_63": {},
    "length_111": {"T": 111, "N": 111, "B": 1},
    "decode": {"T": 1, "N": 111},
    "chunk_of_a_longer_text": {"T": 20, "N": 111, "scale": True},
    "multi_query": {"K": 1},
    "multi_head": {"K": 4, "D": 5},
    "groups_of_4": {"H": 8, "K": 2, "T": 20, "N": 20},
    "wide_values": {"D": 7, "V": 19},
    "narrow_values": {"D": 24, "V": 1, "scale": True},
    "softmax": {"alpha": 1.0, "scale": True, "alibi": True},
    "softmax_as_int": {"alpha": 1, "T": 20, "N": 20},
    "alpha_1.3": {"alpha": 1.3, "scale": True},
    "sparsemax": {"alpha": 2.0, "scale": True, "alibi": True},
    "learned_alpha": {"alpha": (1.4,), "scale": True},
    "learned_alpha_by_head": {"alpha": (1.02, 1.3, 1.5, 2.0), "alibi": True, "scale": True},
    "scaling": {"scaling": 0.4, "alpha": 1.3},
    "alibi": {"alibi": True},
    "alibi_past_the_keys": {"alibi": True, "T": 20, "N": 30, "query_offset": 25},
    "window_1": {"window": 1},
    "window_8": {"window": 8, "scale": True, "alpha": (1.4,)},
    "window_larger_than_text": {"window": 10**6, "alibi": True},
    "left_padding": {"key_start": ints(0, 17), "scale": True, "alpha": 1.3},
    "right_padding": {"key_length": ints(63, 40), "scale": True, "alpha": (1.5,)},
    "both_paddings": {"key_start": ints(5, 0), "key_length": ints(50, 63), "scale": True, "alibi": True},
    "padding_to_nothing": {"key_start": ints(63, 10), "key_length": ints(0, 0), "scale": True, "alpha": (1.2,)},
    "window_in_padding": {
        "window": 5,
        "key_start": ints(9, 0),
        "key_length": ints(30, 63),
        "alpha": (1.5, 1.1, 2.0, 1.4),
    },
    "offset": {"T": 10, "N": 30, "query_offset": 3, "scale": True, "alibi": True},
    "offset_tensor": {"T": 10, "N": 30, "query_offset": torch.tensor(11), "window": 4},
    "offset_by_row": {"T": 10, "N": 30, "query_offset": ints(20, 0), "scale": True, "alibi": True, "alpha": (1.3,)},
    "offset_and_padding": {"T": 1, "N": 30, "query_offset": ints(29, 12), "key_start": ints(0, 4), "scale": True},
    "offset_past_the_keys": {"T": 10, "N": 12, "query_offset": 9, "window": 4, "alpha": (1.5,)},
    "packed": {"B": 1, "cu_seqlens": ints(0, 1, 20, 20, 50, 63), "scale": True, "alpha": (1.5, 1.2, 1.05, 2.0)},
    "packed_window": {"B": 1, "cu_seqlens": ints(0, 30, 63).int(), "window": 7, "alibi": True},
    "packed_not_causal": {"B": 1, "cu_seqlens": ints(0, 0, 30, 63), "is_causal": False},
    "not_causal": {"is_causal": False, "T": 20, "N": 7, "scale": True, "alpha": (1.3,)},
    "not_causal_padded": {"is_causal": False, "key_start": ints(3, 0), "key_length": ints(63, 0), "scale": True},
}


def build(case: dict[str, Any], dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The differentiable arguments (leaves), and the others."""
    case = {**BASE, **case}
    B, H, K, T, N, D, V = (case.pop(x) for x in "BHKTNDV")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {
        "query": torch.randn(B, H, T, D, dtype=dtype),
        "key": 2 * torch.randn(B, K, N, D, dtype=dtype),
        "value": torch.randn(B, K, N, V, dtype=dtype),
    }
    if case.pop("scale", False):
        leaves["query_scale"] = 0.2 + 2 * torch.rand(B, H, T, dtype=wide)
    if case.pop("alibi", False):
        case["alibi_slopes"] = slopes(H)
    alpha = case.pop("alpha", 1.5)
    if isinstance(alpha, tuple):
        leaves["alpha"] = torch.tensor(alpha[0] if len(alpha) == 1 else alpha, dtype=wide)
    else:
        case["alpha"] = alpha
    return {name: x.requires_grad_() for name, x in leaves.items()}, case


def run(
    function: Callable[..., Tensor], leaves: dict[str, Tensor], options: dict[str, Any], weight: Tensor | None = None
) -> dict[str, Tensor]:
    """The output and every gradient by name, for a fixed gradient of the output."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    out = function(**leaves, **options)
    if weight is None:
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(out, list(leaves.values()), weight.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(
            ours[name].double(), x.double(), **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("nan_in_empty")
def test_entmax_attention_equals_the_dense_reference(case: str, dtype: torch.dtype) -> None:
    leaves, options = build(CASES[case], dtype)
    weight = torch.randn(*leaves["query"].shape[:3], leaves["value"].shape[-1]).to(dtype)
    ours = run(entmax_attention, leaves, options, weight)
    exact = {name: x.detach().double() for name, x in leaves.items()}
    expected = run(dense_attention, exact, options, weight.double())
    assert ours["out"].dtype == dtype
    assert all(ours[name].dtype == x.dtype and ours[name].shape == x.shape for name, x in leaves.items())
    assert_same(ours, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 1.9])
def test_entmax_attention_gradcheck(alpha: float) -> None:
    case = {"B": 2, "H": 2, "K": 1, "T": 4, "N": 6, "D": 3, "V": 2, "alpha": (alpha,) if alpha > 1 else alpha}
    leaves, options = build({**case, "scale": True, "alibi": True, "key_start": ints(0, 2)}, torch.float64)
    names = list(leaves)
    assert torch.autograd.gradcheck(
        lambda *x: entmax_attention(**dict(zip(names, x, strict=True)), **options), tuple(leaves.values())
    )


def test_entmax_attention_alpha_by_head_equals_float_alphas() -> None:
    leaves, options = build({"scale": True, "alibi": True, "alpha": (1.0, 1.5, 2.0, 1.25)}, torch.float64)
    alpha = leaves.pop("alpha").detach()
    by_head = entmax_attention(**leaves, **options, alpha=alpha)
    for head, value in enumerate(alpha.tolist()):
        one = entmax_attention(**leaves, **options, alpha=value)
        torch.testing.assert_close(by_head[:, head], one[:, head], rtol=0, atol=2e-5 if value == 1 else 1e-12)


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0, torch.tensor(1.4)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.usefixtures("nan_in_empty")
def test_entmax_attention_row_without_keys_gives_zeros_everywhere(dtype: torch.dtype, alpha: float | Tensor) -> None:
    leaves, options = build({"T": 20, "N": 20, "scale": True, "key_start": ints(0, 8)}, dtype)
    if isinstance(alpha, Tensor):
        leaves["alpha"] = alpha.clone().requires_grad_()
        del options["alpha"]
    else:
        options["alpha"] = alpha
    result = run(entmax_attention, leaves, options)
    assert all(x.isfinite().all() for x in result.values())
    for name in ("out", "query", "query_scale"):
        assert (result[name][1, :, :8] == 0).all()
        assert (result[name][1, :, 8:] != 0).any()
    assert (result["key"][1, :, :8] == 0).all()
    assert (result["value"][1, :, :8] == 0).all()


@pytest.mark.parametrize("alpha", [1.5, torch.tensor(1.5)], ids=["float", "tensor"])
def test_entmax_attention_batch_that_sees_nothing_gives_zeros(alpha: float | Tensor) -> None:
    leaves, options = build({"T": 9, "N": 9, "scale": True, "key_length": ints(0, 0)}, torch.float32)
    del options["alpha"]
    if isinstance(alpha, Tensor):
        leaves["alpha"] = alpha.clone().requires_grad_()
    result = run(entmax_attention, leaves, options)
    assert all((x == 0).all() for x in result.values())


@pytest.mark.parametrize(("tokens", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_entmax_attention_of_empty_tensors_is_differentiable(tokens: int, keys: int) -> None:
    leaves, options = build({"T": tokens, "N": keys, "scale": True, "is_causal": False}, torch.float32)
    result = run(entmax_attention, leaves, options)
    assert result["out"].shape == (2, 4, tokens, 12)
    assert all((x == 0).all() for x in result.values())


@pytest.mark.parametrize("scale", [1e4, -1e4, 0.0])
def test_entmax_attention_extreme_scores_stay_finite(scale: float) -> None:
    leaves, options = build({"alpha": (1.5,)}, torch.float32)
    leaves["query_scale"] = torch.full((2, 4, 63), scale, requires_grad=True)
    ours = run(entmax_attention, leaves, options)
    assert all(x.isfinite().all() for x in ours.values())
    expected = run(dense_attention, {name: x.detach().double() for name, x in leaves.items()}, options)
    torch.testing.assert_close(ours["out"].double(), expected["out"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("keys", [4096, 131_072])
@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
def test_entmax_attention_keeps_mass_1_over_many_near_equal_keys(alpha: float, keys: int) -> None:
    query, key = torch.randn(1, 1, 1, 4), 1e-4 * torch.randn(1, 1, keys, 4)
    out = entmax_attention(query, key, torch.ones(1, 1, keys, 1), alpha=alpha)
    assert abs(out.item() - 1) < 1e-5


@pytest.mark.parametrize(
    "name", ["left_padding", "window_in_padding", "packed", "offset_by_row", "learned_alpha_by_head"]
)
@pytest.mark.parametrize("elements", [1, 700, 1500])
def test_entmax_attention_row_chunks_change_nothing(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, options = build(CASES[name], torch.float64)
    whole = run(entmax_attention, leaves, options)
    sizes, chunks = [], reference._chunks

    def spy(*arguments: Any) -> list[tuple[slice, slice]]:
        found = chunks(*arguments)
        sizes.extend(rows.stop - rows.start for rows, _ in found)
        return found

    monkeypatch.setitem(reference._CHUNK_ELEMENTS, "cpu", elements)
    monkeypatch.setattr(reference, "_chunks", spy)
    assert_same(run(entmax_attention, leaves, options), whole, rtol=0, atol=1e-12)
    assert len(sizes) > 2  # forward and backward, of several chunks each
    assert sum(sizes) == 2 * leaves["query"].shape[2]
    assert elements > 1 or set(sizes) == {1}


def test_entmax_attention_chunks_hold_no_more_scores_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reference._CHUNK_ELEMENTS, "cpu", 4000)
    last = torch.arange(1, 201)[None].expand(3, -1)
    chunks = reference._chunks((last - 50).clamp(min=0), last, 3, 4)
    assert [row for rows, _ in chunks for row in range(rows.start, rows.stop)] == list(range(200))
    assert all((rows.stop - rows.start) * (keys.stop - keys.start) * 12 <= 4000 for rows, keys in chunks)
    assert all(keys.start == max(rows.start - 49, 0) and keys.stop == rows.stop for rows, keys in chunks)


@pytest.mark.parametrize("elements", [1, 900, 1 << 18])
def test_attention_from_intervals_takes_any_intervals(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reference._CHUNK_ELEMENTS, "cpu", elements)
    leaves, _ = build({"T": 40, "N": 30}, torch.float64)
    first, last = torch.randint(0, 31, (2, 2, 40), dtype=torch.int32)  # in no order, and many of them empty
    j = torch.arange(30)
    hidden = (j < first[..., None]) | (j >= last[..., None])

    def by_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
        scores = query @ key.transpose(-1, -2) * 12**-0.5
        return dense_entmax(scores.masked_fill(hidden[:, None], -torch.inf), 1.5) @ value

    def by_intervals(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention_from_intervals(query, key, value, first, last, alpha=1.5)

    assert_same(run(by_intervals, leaves, {}), run(by_mask, leaves, {}), **TOLERANCE[torch.float64])


def test_entmax_attention_weights_equal_what_the_attention_applies() -> None:
    leaves, options = build({"T": 20, "N": 20, "V": 20, "scale": True, "alibi": True, "alpha": 1.3}, torch.float64)
    query, key, scale = (leaves[x].detach() for x in ("query", "key", "query_scale"))
    identity = torch.eye(20, dtype=torch.float64).expand(2, 2, 20, 20)
    last = torch.arange(1, 21, dtype=torch.int32)[None]
    weights = reference.attention_weights(
        query, key, torch.zeros_like(last), last, scale, options["alibi_slopes"], 1.3, 12**-0.5
    )
    out = entmax_attention(query, key, identity, query_scale=scale, **options)
    torch.testing.assert_close(out, weights, rtol=0, atol=1e-12)
    assert (weights.triu(1) == 0).all()
    assert (weights.tril() == 0).any()


def test_entmax_attention_accepts_any_memory_layout() -> None:
    leaves, options = build({"scale": True, "T": 20, "N": 20}, torch.float64)
    expected = run(entmax_attention, leaves, options)
    other = {name: x.detach().transpose(0, 1).contiguous().transpose(0, 1) for name, x in leaves.items()}
    padded = {name: torch.cat([x.detach(), x.detach()], -1)[..., : x.shape[-1]] for name, x in leaves.items()}
    for layout in (other, padded):
        assert not layout["query"].is_contiguous()
        inputs = {name: x.requires_grad_() for name, x in layout.items()}
        out = entmax_attention(**inputs, **options)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
        gradients = torch.autograd.grad(out, list(inputs.values()), weight)
        assert_same({"out": out.detach(), **dict(zip(inputs, gradients, strict=True))}, expected, rtol=0, atol=1e-12)


def test_entmax_attention_broadcast_query_scale_and_gradient() -> None:
    leaves, options = build({"T": 9, "N": 9}, torch.float64)
    head = torch.rand(1, 4, 1, dtype=torch.float64, requires_grad=True)
    entmax_attention(**leaves, **options, query_scale=head.expand(2, 4, 9)).sum().backward()  # a gradient of stride 0
    full = head.detach().expand(2, 4, 9).clone().requires_grad_()
    (expected,) = torch.autograd.grad(entmax_attention(**leaves, **options, query_scale=full).sum(), full)
    torch.testing.assert_close(head.grad, expected.sum((0, 2), keepdim=True), rtol=0, atol=1e-12)


def test_entmax_attention_gives_only_the_gradients_asked_for() -> None:
    leaves, options = build({"T": 9, "N": 9, "scale": True, "alpha": (1.5,)}, torch.float64)
    every = run(entmax_attention, leaves, options)
    weight = torch.randn(2, 4, 9, 12, generator=torch.Generator().manual_seed(1)).double()
    for name in GRADIENTS:
        inputs = {other: x.detach().clone() for other, x in leaves.items()}
        inputs[name].requires_grad_()
        (gradient,) = torch.autograd.grad(entmax_attention(**inputs, **options), inputs[name], weight)
        torch.testing.assert_close(gradient, every[name], rtol=0, atol=1e-12)


# A dtype, whether the tensors are transposed as the projections of a model give them, and a case.
OPERATOR_CASES: dict[str, tuple[torch.dtype, bool, dict[str, Any]]] = {
    "plain": (torch.float32, False, {}),
    "everything": (torch.float32, True, {"scale": True, "alibi": True, "alpha": (1.1, 1.5, 1.7, 2.0)}),
    "bfloat16": (torch.bfloat16, True, {"alpha": (1.4,), "V": 3, "scale": True}),
    "float16": (torch.float16, False, {"K": 1, "alpha": 1.3}),
}


@pytest.mark.parametrize("case", OPERATOR_CASES)
def test_entmax_attention_operators_pass_opcheck(case: str) -> None:
    dtype, transposed, sizes = OPERATOR_CASES[case]
    leaves, options = build({"T": 5, "N": 7, "D": 3, "V": 4} | sizes, dtype)
    if transposed:
        for name in ("query", "key", "value"):
            x = leaves[name].detach()
            leaves[name] = x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    last = torch.arange(3, 8, dtype=torch.int32)[None]
    value = options.get("alpha", 0.0)
    inputs = (
        *(leaves[name] for name in ("query", "key", "value")),
        torch.zeros_like(last),
        last,
        leaves.get("query_scale"),
        options.get("alibi_slopes"),
        leaves.get("alpha"),
        value,
        0.6,
    )
    opcheck(OPS.entmax_attention.default, (*inputs, True))
    constants = tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
    out, *saved = OPS.entmax_attention(*constants, True)
    grad = torch.randn_like(out)
    opcheck(OPS.entmax_attention_backward.default, (grad, *constants, *saved, "alpha" in leaves))


def compiled_nodes(counter: Any) -> list[str]:
    return [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]


def test_entmax_attention_compiles_to_one_node_for_every_alpha_tensor() -> None:
    torch._dynamo.reset()
    leaves, options = build({"T": 9, "N": 9, "scale": True, "alibi": True, "key_start": ints(0, 3)}, torch.float32)
    del options["alpha"]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(entmax_attention, fullgraph=True, backend=counter)
    for alpha in (1.1, 1.5, 1.9):
        inputs = {**leaves, "alpha": torch.tensor(alpha)}
        assert_same(run(compiled, inputs, options), run(entmax_attention, inputs, options), rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1
    nodes = compiled_nodes(counter)
    assert sum("entmax" in name for name in nodes) == 1
    assert not any("matmul" in name or "softmax" in name for name in nodes)


@pytest.mark.parametrize("name", ["window_8", "offset_by_row", "packed", "packed_not_causal", "both_paddings"])
def test_entmax_attention_compiles_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()
    leaves, options = build(CASES[name], torch.float32)
    compiled = torch.compile(entmax_attention, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, leaves, options), run(entmax_attention, leaves, options), rtol=1e-6, atol=1e-6)


def test_entmax_attention_compiles_once_for_every_length() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(entmax_attention, fullgraph=True, backend=counter, dynamic=True)
    for length in (9, 14, 33):
        leaves, _ = build({"T": length, "N": length, "scale": True}, torch.float32)
        assert_same(run(compiled, leaves, {}), run(entmax_attention, leaves, {}), rtol=1e-6, atol=1e-6)
    assert sum("entmax" in name for name in compiled_nodes(counter)) == 1


def test_entmax_attention_exports_as_one_node() -> None:
    class Layer(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return entmax_attention(query, key, value, window=4)

    inputs = tuple(x.detach() for x in build({"T": 9, "N": 9}, torch.float32)[0].values())
    program = torch.export.export(Layer(), inputs)
    assert sum("entmax_attention" in str(node.target) for node in program.graph.nodes) == 1
    torch.testing.assert_close(program.module()(*inputs), entmax_attention(*inputs, window=4))


def test_entmax_attention_double_backward_raises() -> None:
    leaves, options = build({"T": 5, "N": 5}, torch.float64)
    out = entmax_attention(**leaves, **options)
    (gradient,) = torch.autograd.grad(out.square().sum(), leaves["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad(gradient.square().sum(), leaves["query"])


Q, K = torch.zeros(2, 4, 5, 3), torch.zeros(2, 2, 7, 3)
ONE = {"query": Q[:1], "key": K[:1, :, :5], "value": K[:1, :, :5]}
# Arguments that replace good ones; the error; what it must name: the argument first, then parts of rule and value.
BAD: dict[str, tuple[dict[str, Any], Any, tuple[str, ...]]] = {
    "query_dims": ({"query": Q[0]}, ValueError, ("query", "(batch, heads, tokens, head dim)", "(4, 5, 3)")),
    "key_dims": ({"key": K[0]}, ValueError, ("key", "(2, 7, 3)")),
    "value_dims": ({"value": K[0]}, ValueError, ("value", "(2, 7, 3)")),
    "query_integer": ({"query": Q.long()}, TypeError, ("query", "floating point", "int64")),
    "key_dtype": ({"key": K.half()}, ValueError, ("key", "float32", "float16")),
    "value_dtype": ({"value": K.double()}, ValueError, ("value", "float32", "float64")),
    "value_device": ({"value": K.to("meta")}, ValueError, ("value", "cpu", "meta")),
    "key_batch": ({"key": K[:1], "value": K[:1]}, ValueError, ("key", "(2, 4, 5, 3)", "(1, 2, 7, 3)")),
    "key_head_dim": ({"key": K[..., :2]}, ValueError, ("key", "(2, 2, 7, 2)")),
    "key_heads": ({"key": torch.zeros(2, 3, 7, 3)}, ValueError, ("key", "divisor of 4", "(2, 3, 7, 3)")),
    "more_key_heads": ({"key": torch.zeros(2, 8, 7, 3)}, ValueError, ("key", "divisor of 4", "(2, 8, 7, 3)")),
    "no_key_heads": ({"key": K[:, :0], "value": K[:, :0]}, ValueError, ("key", "divisor of 4", "(2, 0, 7, 3)")),
    "value_tokens": ({"value": K[:, :, :6]}, ValueError, ("value", "(2, 2, 7)", "(2, 2, 6, 3)")),
    "value_heads": ({"value": K[:, :1]}, ValueError, ("value", "(2, 2, 7)", "(2, 1, 7, 3)")),
    "scale_shape": ({"query_scale": torch.ones(2, 4)}, ValueError, ("query_scale", "(2, 4, 5)", "(2, 4)")),
    "scale_dtype": ({"query_scale": Q[..., 0].half()}, ValueError, ("query_scale", "float32", "float16")),
    "slopes_shape": ({"alibi_slopes": torch.ones(2)}, ValueError, ("alibi_slopes", "(4,)", "(2,)")),
    "slopes_learned": ({"alibi_slopes": torch.ones(4, requires_grad=True)}, ValueError, ("alibi_slopes", "detach")),
    "slopes_negative": ({"alibi_slopes": -torch.ones(4)}, ValueError, ("alibi_slopes", "negative", "[-1.0, ")),
    "slopes_not_causal": (
        {"alibi_slopes": torch.ones(4), "is_causal": False},
        ValueError,
        ("alibi_slopes", "is_causal"),
    ),
    "window_not_causal": ({"window": 3, "is_causal": False}, ValueError, ("window", "is_causal")),
    "window_zero": ({"window": 0}, ValueError, ("window", "positive", "0")),
    "window_float": ({"window": 2.5}, ValueError, ("window", "positive int", "2.5")),
    "window_bool": ({"window": True}, ValueError, ("window", "positive int", "True")),
    "offset_negative": ({"query_offset": -1}, ValueError, ("query_offset", "-1")),
    "offset_float": ({"query_offset": 1.5}, (ValueError, TypeError), ("query_offset", "int", "1.5")),
    "offset_float_tensor": ({"query_offset": torch.tensor(1.5)}, ValueError, ("query_offset", "integer", "float32")),
    "offset_bool_tensor": ({"query_offset": torch.tensor(True)}, ValueError, ("query_offset", "integer", "bool")),
    "offset_shape": ({"query_offset": ints(1, 2, 3)}, ValueError, ("query_offset", "(2,)", "(3,)")),
    "offset_missing": ({"key": K[:, :, :4], "value": K[:, :, :4]}, ValueError, ("key", "5", "4")),
    "start_shape": ({"key_start": ints(0)}, ValueError, ("key_start", "(2,)", "(1,)")),
    "start_float": ({"key_start": torch.zeros(2)}, ValueError, ("key_start", "integer", "float32")),
    "start_bool": ({"key_start": torch.tensor([True, False])}, ValueError, ("key_start", "integer", "bool")),
    "length_shape": ({"key_length": torch.tensor(3)}, ValueError, ("key_length", "(2,)", "()")),
    "length_float": ({"key_length": torch.ones(2)}, ValueError, ("key_length", "integer", "float32")),
    "documents_batch": ({"cu_seqlens": ints(0, 7)}, ValueError, ("cu_seqlens", "B = 1", "B = 2")),
    "documents_cache": (
        {"query": Q[:1], "key": K[:1], "value": K[:1], "cu_seqlens": ints(0, 7)},
        ValueError,
        ("cu_seqlens", "T = N", "T = 5", "N = 7"),
    ),
    "documents_offset": (
        {**ONE, "cu_seqlens": ints(0, 5), "query_offset": 0},
        ValueError,
        ("cu_seqlens", "query_offset"),
    ),
    "documents_start": (
        {**ONE, "cu_seqlens": ints(0, 5), "key_start": ints(0)},
        ValueError,
        ("cu_seqlens", "key_start"),
    ),
    "documents_length": (
        {**ONE, "cu_seqlens": ints(0, 5), "key_length": ints(5)},
        ValueError,
        ("cu_seqlens", "key_length"),
    ),
    "documents_short": ({**ONE, "cu_seqlens": ints(0, 4)}, ValueError, ("cu_seqlens", "5", "[0, 4]")),
    "documents_late": ({**ONE, "cu_seqlens": ints(1, 5)}, ValueError, ("cu_seqlens", "0", "[1, 5]")),
    "documents_fall": ({**ONE, "cu_seqlens": ints(0, 4, 3, 5)}, ValueError, ("cu_seqlens", "rise", "[0, 4, 3, 5]")),
    "documents_float": ({**ONE, "cu_seqlens": ints(0, 5).float()}, ValueError, ("cu_seqlens", "integer", "float32")),
    "documents_dims": ({**ONE, "cu_seqlens": ints(0, 5)[None]}, ValueError, ("cu_seqlens", "(1, 2)")),
    "documents_one_bound": ({**ONE, "cu_seqlens": ints(0)}, ValueError, ("cu_seqlens", "(1,)")),
    "alpha_small": ({"alpha": 0.5}, ValueError, ("alpha", "1.0", "0.5")),
    "alpha_large": ({"alpha": 2.1}, ValueError, ("alpha", "2.0", "2.1")),
    "alpha_text": ({"alpha": "1.5"}, TypeError, ("alpha", "str")),
    "alpha_integer_tensor": ({"alpha": torch.tensor(2)}, TypeError, ("alpha", "int64")),
    "alpha_tensor_large": ({"alpha": torch.tensor([1.5, 1.5, 2.5, 1.5])}, ValueError, ("alpha", "2.5")),
    "alpha_shape": ({"alpha": torch.full((2,), 1.5)}, ValueError, ("alpha", "(4,)", "(2,)")),
    "alpha_dims": ({"alpha": torch.full((1, 4, 1, 1), 1.5)}, ValueError, ("alpha", "(4,)", "(1, 4, 1, 1)")),
}


@pytest.mark.parametrize("case", BAD)
def test_entmax_attention_bad_input_raises_what_rule_and_value(case: str) -> None:
    change, error, words = BAD[case]
    with pytest.raises(error) as caught:
        entmax_attention(**{"query": Q, "key": K, "value": K, **change})
    message = str(caught.value)
    assert " must " in message
    assert all(word in message for word in words)


LONG_RUN = """
import torch
from hf_asentmax import entmax_attention
torch.set_num_threads(1)
q, k, v = (torch.randn(1, 8, 16_384, 64, requires_grad=True) for _ in range(3))
out = entmax_attention(q, k, v, query_scale=torch.ones(1, 8, 16_384, requires_grad=True))
out.backward(torch.randn_like(out))
assert all(x.grad.isfinite().all() for x in (q, k, v))
"""


@pytest.mark.slow
def test_entmax_attention_of_16384_tokens_fits_in_6_gb() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", LONG_RUN + PRINT_PEAK_MEMORY], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) < 6e9


@pytest.mark.parametrize("operation", ["attention", "entmax"])
def test_torch_func_differentiates_and_forward_mode_is_refused(operation: str) -> None:
    query, key, value = (torch.randn(2, 2, 5, 4, dtype=torch.float64) for _ in range(3))
    scale, alpha = torch.rand(2, 2, 5, dtype=torch.float64) + 0.5, torch.tensor([1.3, 1.6], dtype=torch.float64)

    def loss(query: Tensor, alpha: Tensor, scale: Tensor) -> Tensor:
        if operation == "entmax":
            return entmax(query * scale[..., None], alpha=alpha[:, None, None]).square().sum()
        return entmax_attention(query, key, value, is_causal=True, alpha=alpha, query_scale=scale).square().sum()

    inputs = (query, alpha, scale)
    expected = torch.autograd.grad(loss(*(leaves := [x.clone().requires_grad_() for x in inputs])), leaves)
    for ours, theirs in zip(torch.func.grad(loss, argnums=(0, 1, 2))(*inputs), expected, strict=True):
        assert torch.equal(ours, theirs)
    rows = torch.stack([query, 2 * query])
    each = torch.func.vmap(torch.func.grad(loss), (0, None, None))(rows, alpha, scale)
    assert torch.equal(each[0], expected[0])
    assert torch.equal(torch.func.vmap(loss, (0, None, None))(rows, alpha, scale)[1], loss(rows[1], alpha, scale))
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(lambda x: loss(x, alpha, scale), (query,), (key,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        loss(forward_ad.make_dual(query, key), alpha, scale)
    with pytest.raises(NotImplementedError, match="has no derivative"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x, alpha, scale).square().sum())(query)


def test_autocast_leaves_scores_and_sums_in_float32() -> None:
    query, key, value = (torch.randn(1, 2, 40, 16) for _ in range(3))
    for function in (
        partial(entmax_attention, alpha=1.5),
        partial(topk_attention, k=8),
        adaptive_temperature_attention,
    ):
        expected = function(query, 3 * key, value, is_causal=True)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(function(query, 3 * key, value, is_causal=True), expected)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    expected = torch.autograd.grad(entmax_attention(*leaves, is_causal=True).sum(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.autograd.grad(entmax_attention(*leaves, is_causal=True).sum(), leaves)
    assert all(map(torch.equal, ours, expected))


def test_small_integers_do_not_wrap_where_padding_begins_late() -> None:
    query, key, value = (torch.randn(1, 1, 300, 8) for _ in range(3))
    start, length = torch.tensor([200]), torch.tensor([100])
    expected = entmax_attention(query, key, value, is_causal=True, key_start=start, key_length=length)
    ours = entmax_attention(
        query, key, value, is_causal=True, key_start=start.to(torch.uint8), key_length=length.to(torch.uint8)
    )
    assert expected.ne(0).any()
    assert torch.equal(ours, expected)
