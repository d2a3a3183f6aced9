"""The Triton kernels in Triton's interpreter: the public path on CPU tensors, as it runs on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import triton
import triton.language as tl
from dense_reference import dense_entmax, dense_scores
from helpers import random_tokens, tiny_model
from hypothesis import given, settings
from kernel_cases import BASE, CASES, assert_equals_dense, assert_weights_are_right, build, exact, ints, run
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from triton.runtime.errors import OutOfResources

from hf_asentmax import entmax_attention, patch_model
from hf_asentmax.ops import operators, triton_backward, triton_candidates, triton_forward, triton_launch
from hf_asentmax.ops.attention import attention_from_intervals
from hf_asentmax.ops.triton_candidates import _raise_bound
from hf_asentmax.ops.triton_launch import Config, Problem, launch
from hf_asentmax.ops.triton_short import LONGEST, serves_short, serves_short_backward

OPS = torch.ops.hf_asentmax
USES_KERNELS = operators.uses_kernels

# In float16 a tile is twice as wide as in float32, so what depends on tiles and dims. Not in bfloat16: interpreted, it
# has no product of matrices.
HALF_CASES = (
    "length_170",
    "one_token",
    "length_63",
    "length_64",
    "length_200",
    "decode",
    "groups_of_4",
    "head_dim_24",
    "head_dim_80",
    "negative_scaling",
    "sparsemax",
    "alpha_1.25",
    "alpha_1.25_longer",
    "alpha_1.25_padding_to_nothing",
    "softmax_groups_of_4",
    "softmax_alibi_that_hides_tiles",
    "softmax_padding_to_nothing",
    "softmax_one_huge_key",
    "learned_alpha_by_head",
    "scale_with_zeros",
    "alibi_that_hides_tiles",
    "both_paddings",
    "padding_to_nothing",
    "window_40",
    "packed",
    "not_causal",
    "identical_keys",
    "one_huge_key",
    "a_key_above_many_equal_ones",
    "scores_of_-1e4",
    "transposed_and_strided",
)


def keys(case: str) -> int:
    return {**BASE, **CASES[case]}["N"]


def serves(query: Tensor) -> bool:
    return query.dtype != torch.float64


@pytest.fixture(autouse=True)
def kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`uses_kernels` without the question for a GPU."""
    monkeypatch.setattr(operators, "uses_kernels", serves)


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert torch.equal(x, other[name]), name


SLOW = ("groups_of_130",)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES]
)
@pytest.mark.usefixtures("nan_in_empty")
def test_kernels_equal_the_dense_reference(case: str) -> None:
    leaves, options = build(CASES[case], torch.float32)
    assert_equals_dense(run(entmax_attention, leaves, options), leaves, options)


@pytest.mark.parametrize("case", HALF_CASES)
@pytest.mark.usefixtures("nan_in_empty")
def test_kernels_in_float16_equal_the_dense_reference(case: str) -> None:
    leaves, options = build(CASES[case], torch.float16)
    assert_equals_dense(run(entmax_attention, leaves, options), leaves, options)


@pytest.mark.parametrize("case", [case for case in HALF_CASES if keys(case) <= max(LONGEST.values())])
@pytest.mark.usefixtures("nan_in_empty")
def test_kernels_of_long_sequences_in_float16_equal_the_dense_reference(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_forward, "serves_short", lambda problem: False)
    monkeypatch.setattr(triton_backward, "serves_short_backward", lambda problem: False)
    leaves, options = build(CASES[case], torch.float16)
    assert_equals_dense(run(entmax_attention, leaves, options), leaves, options)


@pytest.mark.parametrize("case", [case for case in CASES if keys(case) <= max(LONGEST.values()) and case not in SLOW])
@pytest.mark.usefixtures("nan_in_empty")
def test_kernels_of_short_sequences_in_float32_equal_the_dense_reference(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_forward, "serves_short", lambda problem: True)
    monkeypatch.setattr(triton_backward, "serves_short_backward", lambda problem: True)
    leaves, options = build(CASES[case], torch.float32)
    assert_equals_dense(run(entmax_attention, leaves, options), leaves, options)


@pytest.mark.parametrize(
    ("alpha", "keys", "dim", "dtype", "forward", "backward"),
    [
        (1.5, 256, 64, torch.bfloat16, True, False),
        (1.5, 129, 16, torch.bfloat16, True, False),
        (1.5, 257, 64, torch.bfloat16, False, False),
        (1.5, 256, 65, torch.float16, False, False),
        (1.5, 64, 256, torch.float16, True, False),
        (1.5, 64, 64, torch.float16, True, True),
        (1.5, 64, 64, torch.float32, False, False),
        (1.5, 0, 64, torch.float16, False, False),
        (1.3, 128, 128, torch.float16, True, False),
        (1.3, 128, 32, torch.bfloat16, True, True),
        (1.3, 128, 33, torch.bfloat16, True, False),
        (1.25, 256, 64, torch.float16, True, False),
        (1.25, 128, 32, torch.float16, True, True),
        (2.0, 129, 64, torch.float16, False, False),
        (1.0, 128, 64, torch.float16, True, False),
        (1.0, 129, 16, torch.float16, False, False),
    ],
)
def test_one_pass_is_for_short_sequences(
    alpha: float, keys: int, dim: int, dtype: torch.dtype, forward: bool, backward: bool
) -> None:
    k = torch.zeros(1, 1, keys, dim, dtype=dtype)
    for queries in (1, 2):
        intervals = torch.zeros(1, queries, dtype=torch.int32)
        q = torch.zeros(1, 1, queries, dim, dtype=dtype)
        problem = Problem(q, k, k, intervals, intervals, None, None, None, alpha, 1.0)
        assert serves_short(problem) is (forward and queries > 1)
        assert serves_short_backward(problem) is (backward and queries > 1)


@pytest.mark.usefixtures("nan_in_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels_take_any_intervals(dtype: torch.dtype) -> None:
    leaves, options = build({"B": 2, "H": 1, "T": 70, "N": 70, "scale": 1, "slopes": (0.1,), "alpha": (1.4,)}, dtype)
    first, last = torch.randint(0, 71, (2, 2, 70), dtype=torch.int32)  # in no order, and many of them empty

    def attention(**arguments: Any) -> Tensor:
        return attention_from_intervals(first=first, last=last, **arguments)

    ours = run(attention, leaves, options)
    expected = run(attention, *exact(leaves, options))  # float64 goes to the reference
    for name, x in expected.items():
        assert (ours[name] - x).norm() <= (1e-5 if dtype == torch.float32 else 4e-3) * x.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("nan_in_empty")
def test_kernels_give_exact_zeros_where_no_key_is_seen(dtype: torch.dtype) -> None:
    leaves, options = build({"B": 2, "key_start": ints(0, 40), "scale": 1, "alpha": (1.3,)}, dtype)
    result = run(entmax_attention, leaves, options)
    for name in ("out", "query", "query_scale"):
        assert (result[name][1, :, :40] == 0).all()
        assert (result[name][1, :, 40:] != 0).any()
    for name in ("key", "value"):
        assert (result[name][1, :, :40] == 0).all()


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, Any], float, int]:
    """A case whose values are the identity, a factor of its scores, and a seed."""
    queries, more_keys = draw(st.integers(1, 40)), draw(st.integers(0, 40))
    groups, kv_heads, batch = draw(st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 1, 2)]))
    N = queries + more_keys
    case: dict[str, Any] = {"B": batch, "H": groups * kv_heads, "K": kv_heads, "T": queries, "N": N, "V": N}
    exponent = draw(st.floats(1.02, 2.0))
    case["alpha"] = draw(st.sampled_from([1.0, 1.25, 1.5, 2.0, exponent, (exponent,)]))
    case["scale"] = draw(st.sampled_from([None, 1, -1, 0]))
    if draw(st.booleans()):
        case["slopes"] = (draw(st.floats(0.01, 2.0)),)
    if draw(st.booleans()):
        case["window"] = draw(st.integers(1, N + 1))
    if draw(st.booleans()):
        start, length = draw(st.integers(0, N)), draw(st.integers(0, N))
        case["key_start"], case["key_length"] = (torch.full((batch,), x) for x in (start, min(length, N - start)))
    if draw(st.booleans()):
        case["query_offset"] = draw(st.integers(0, N))
    return case, draw(st.sampled_from([0.01, 1.0, 10.0, 300.0])), draw(st.integers(0, 1000))


@settings(max_examples=12)
@given(problems())
def test_kernels_weights_have_mass_1_and_the_exact_support(problem: tuple[dict[str, Any], float, int]) -> None:
    case, factor, seed = problem
    torch.manual_seed(seed)
    leaves, options = build(case, torch.float32)
    with torch.no_grad():
        leaves["key"].mul_(factor)
        leaves["value"].copy_(torch.eye(case["N"]).expand_as(leaves["value"]))
    for short in (False, True):
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(triton_forward, "serves_short", lambda problem, short=short: short)
            weights = entmax_attention(**leaves, **options)
        assert_weights_are_right(weights, leaves, options)


@pytest.mark.parametrize("alpha", [1.0, 1.2, 1.25, 1.5, 2.0])
def test_kernels_keep_mass_1_over_many_near_equal_keys(alpha: float) -> None:
    query, key = torch.randn(1, 1, 1, 16), 1e-4 * torch.randn(1, 1, 2000, 16)
    out = entmax_attention(query, key, torch.ones(1, 1, 2000, 16), alpha=alpha)
    assert (out - 1).abs().max() < 1e-5


@pytest.mark.parametrize("case", [{}, {"scale": 1, "slopes": (0.1,), "alpha": (1.3,)}, {"alpha": 2.0}, {"alpha": 1.0}])
def test_kernels_give_nan_for_a_nan_query_alone(case: dict[str, Any]) -> None:
    leaves, options = build({**case, "T": 100, "N": 100}, torch.float32)
    expected = entmax_attention(**leaves, **options).detach()
    leaves["query"].detach()[0, 1, 70, 3] = torch.nan
    out = entmax_attention(**leaves, **options).detach()
    assert out[0, 1, 70].isnan().all()
    out[0, 1, 70] = expected[0, 1, 70]
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "name", ["alibi_that_hides_tiles", "window_40", "packed", "length_111", "softmax_alibi_that_hides_tiles"]
)
def test_kernels_mark_every_tile_with_support(name: str) -> None:
    leaves, options = build(CASES[name], torch.float32)
    tiles: list[Tensor] = []

    def spy(problem: Any, save: bool) -> tuple[Tensor, ...]:
        result = kernel_forward(problem, save)
        tiles.append(result[3])
        return result

    kernel_forward = triton_forward.kernel_forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_forward, "kernel_forward", spy)
        entmax_attention(**leaves, **options)
    arguments, options = exact(leaves, options)
    alpha = arguments.pop("alpha", options.pop("alpha", 1.5))
    alpha = alpha.reshape(-1, 1, 1) if isinstance(alpha, Tensor) else alpha
    del arguments["value"]
    p = dense_entmax(dense_scores(**arguments, **options), alpha).detach().float()  # softmax is 0 where float32 ends
    queries, keys = (-(-n // 32) for n in p.shape[-2:])
    padded = torch.nn.functional.pad(p, (0, keys * 32 - p.shape[-1], 0, queries * 32 - p.shape[-2]))
    supported = padded.unflatten(-1, (keys, 32)).unflatten(-3, (queries, 32)).amax((-1, -3)) > 0
    marked = ((tiles[0][..., None] >> torch.arange(32)) & 1).flatten(-2)[..., :keys].bool()
    assert tiles[0].dtype == torch.int32
    assert not (supported & ~marked).any()
    assert (marked & ~supported).sum() <= 0.1 * marked.sum()


@triton.jit
def _raise_bound_of_hidden(scale_ptr, bound_ptr, ALPHA: tl.constexpr, EXPONENT: tl.constexpr):
    rows = tl.arange(0, 16)
    best = tl.full((16, 1, 16), -1.0e30, tl.float32)
    bound, _ = _raise_bound(best, tl.load(scale_ptr + rows), tl.load(bound_ptr + rows), EXPONENT, 2, ALPHA, True)
    tl.store(bound_ptr + rows, bound)


@pytest.mark.parametrize(("constant", "exponent"), [(0, 0.4), (1, 0.5), (2, 1.0), (3, 1.0), (4, 0.25)])
def test_kernels_leave_the_bound_of_a_query_that_has_seen_no_key(constant: int, exponent: float) -> None:
    scale = torch.rand(16) + 0.1
    hidden = -1e30 * scale
    bound = torch.where(
        torch.arange(16) % 2 == 0, hidden, hidden.nextafter(torch.tensor(-torch.inf))
    )  # as a GPU rounds
    raised = bound.clone()
    _raise_bound_of_hidden[(1,)](scale, raised, ALPHA=constant, EXPONENT=exponent)
    torch.testing.assert_close(raised, bound)


@pytest.mark.parametrize("value", [1.25, 1.5, 2.0])
def test_kernels_give_the_same_for_an_alpha_as_float_and_as_tensor(value: float) -> None:
    leaves, options = build({"scale": 1, "slopes": (0.0, 0.1), "alpha": value}, torch.float32)
    by_float = run(entmax_attention, leaves, options)
    by_tensor = run(entmax_attention, leaves, options | {"alpha": torch.full((2,), value)})
    for name, x in by_float.items():
        assert (by_tensor[name] - x).norm() <= 1e-5 * x.norm(), name


def test_kernels_take_wider_scales_and_alphas() -> None:
    leaves, options = build({"T": 20, "N": 20, "scale": 1, "alpha": (1.3, 1.6)}, torch.float32)
    expected = run(entmax_attention, leaves, options)
    for name in ("query_scale", "alpha"):
        leaves[name] = leaves[name].detach().double().requires_grad_()
    result = run(entmax_attention, leaves, options)
    assert result["query_scale"].dtype == result["alpha"].dtype == torch.float64
    for name, x in expected.items():
        torch.testing.assert_close(result[name].to(x), x, rtol=0, atol=0)


def test_kernels_give_only_the_gradients_asked_for() -> None:
    leaves, options = build({"H": 1, "T": 20, "N": 20, "scale": 1, "alpha": (1.5,)}, torch.float32)
    every = run(entmax_attention, leaves, options)
    weight = torch.randn(every["out"].shape, generator=torch.Generator().manual_seed(1))
    for name in leaves:
        inputs = {other: x.detach().clone() for other, x in leaves.items()}
        inputs[name].requires_grad_()
        (gradient,) = torch.autograd.grad(entmax_attention(**inputs, **options), inputs[name], weight)
        assert torch.equal(gradient, every[name])


def test_kernels_take_a_broadcast_query_scale_and_gradient() -> None:
    leaves, options = build({"T": 20, "N": 20}, torch.float32)
    head = torch.rand(1, 2, 1, requires_grad=True)
    entmax_attention(**leaves, **options, query_scale=head.expand(1, 2, 20)).sum().backward()  # a gradient of stride 0
    full = head.detach().expand(1, 2, 20).clone().requires_grad_()
    out = entmax_attention(**leaves, **options, query_scale=full)
    (expected,) = torch.autograd.grad(out, full, torch.ones_like(out))
    torch.testing.assert_close(head.grad, expected.sum((0, 2), keepdim=True), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("tokens", "keys"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.usefixtures("nan_in_empty")
def test_kernels_of_empty_tensors_are_differentiable(tokens: int, keys: int) -> None:
    sizes = {"T": tokens, "N": keys, "scale": 1, "slopes": (0.0, 0.1), "alpha": (1.3,), "query_offset": 0}
    result = run(entmax_attention, *build(sizes, torch.float32))
    assert result["out"].shape == (1, 2, tokens, 16)
    assert all((x == 0).all() for x in result.values())


# Operator arguments


def operator_arguments(leaves: dict[str, Tensor], options: dict[str, Any]) -> tuple[Any, ...]:
    """All arguments of the operator but the last, for queries at the end of the keys."""
    queries, keys = leaves["query"].shape[2], leaves["key"].shape[2]
    last = torch.arange(keys - queries + 1, keys + 1, dtype=torch.int32)[None]
    return (
        *(leaves[name] for name in ("query", "key", "value")),
        torch.zeros_like(last),
        last,
        leaves.get("query_scale"),
        options.get("alibi_slopes"),
        leaves.get("alpha"),
        options.get("alpha", 0.0),
        0.6,
    )


# A dtype and a case; few tokens, for `opcheck` runs each of them many times.
OPERATOR_CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "everything": (
        torch.float16,
        {"layout": ("transposed",), "scale": 1, "slopes": (0.0, 0.1), "alpha": (1.2, 2.0), "V": 24},
    ),
    "strided": (torch.float32, {"layout": ("transposed", "strided"), "K": 2, "scale": 1}),
}


@pytest.mark.parametrize("case", OPERATOR_CASES)
def test_kernels_operators_pass_opcheck(case: str) -> None:
    dtype, sizes = OPERATOR_CASES[case]
    leaves, options = build({"T": 5, "N": 7} | sizes, dtype)
    inputs = operator_arguments(leaves, options)
    opcheck(OPS.entmax_attention.default, (*inputs, True))
    constants = tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
    opcheck(OPS.entmax_attention.default, (*constants, False))
    out, *saved = OPS.entmax_attention(*constants, True)
    grad = torch.randn_like(out)
    opcheck(OPS.entmax_attention_backward.default, (grad, *constants, *saved, "alpha" in leaves))


def test_kernels_without_a_gradient_keep_nothing_for_one() -> None:
    leaves, options = build({"T": 20, "N": 20, "H": 1, "scale": 1}, torch.float32)
    arguments = operator_arguments({name: x.detach() for name, x in leaves.items()}, options)
    out, _, mean, tiles = OPS.entmax_attention(*arguments, False)
    assert mean.numel() == tiles.numel() == 0
    assert torch.equal(out, OPS.entmax_attention(*arguments, True)[0])
    asked: list[bool] = []

    def spy(problem: Any, save: bool) -> tuple[Any, ...]:
        asked.append(save)
        return kernel_forward(problem, save)

    kernel_forward = triton_forward.kernel_forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_forward, "kernel_forward", spy)
        entmax_attention(**leaves, **options)
        with torch.no_grad():
            entmax_attention(**leaves, **options)
        entmax_attention(**{name: x.detach() for name, x in leaves.items()}, **options)
    assert asked == [True, False, False]


def test_kernels_backward_needs_a_differentiable_forward() -> None:
    leaves, options = build({"T": 5, "N": 5}, torch.float32)
    arguments = operator_arguments({name: x.detach() for name, x in leaves.items()}, options)
    out, *saved = OPS.entmax_attention(*arguments, False)
    with pytest.raises(RuntimeError, match="differentiable must be True"):
        OPS.entmax_attention_backward(out, *arguments, *saved, False)


@pytest.mark.parametrize("name", ["query_scale", "packed", "slopes"])
def test_kernels_compile_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()
    more = {"query_scale": {"scale": 1, "alpha": (1.3,)}, "packed": {"cu_seqlens": ints(0, 3, 9)}}
    leaves, options = build({"T": 9, "N": 9} | more.get(name, {"slopes": (0.0, 0.1)}), torch.float32)
    compiled = torch.compile(entmax_attention, fullgraph=True, backend="aot_eager")
    assert_same_bits(run(compiled, leaves, options), run(entmax_attention, leaves, options))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_kernels_under_gradient_checkpointing_give_the_same_bits(use_reentrant: bool) -> None:
    leaves, options = build({"T": 20, "N": 20, "scale": 1, "alpha": (1.3,)}, torch.float32)
    names = list(leaves)

    def layer(*inputs: Tensor) -> Tensor:
        return entmax_attention(**dict(zip(names, inputs, strict=True)), **options)

    def checkpointed(**inputs: Tensor) -> Tensor:
        out: Tensor = checkpoint(layer, *inputs.values(), use_reentrant=use_reentrant)
        return out

    def gradients(function: Callable[..., Tensor]) -> dict[str, Tensor]:
        inputs = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
        function(**inputs).square().sum().backward()
        return {name: x.grad for name, x in inputs.items() if x.grad is not None}

    expected = gradients(lambda **inputs: layer(*inputs.values()))
    assert expected.keys() == leaves.keys()
    assert_same_bits(gradients(checkpointed), expected)


def test_kernels_of_a_checkpoints_own_code_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(
        tiny_model("llama", num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1),
        positions="nape",
        alpha_learned=True,
    )
    folder = tmp_path / "own_code"
    model.save_pretrained(folder)
    theirs = get_class_from_dynamic_module("modeling_asentmax_llama.ASEntmaxLlamaForCausalLM", str(folder))
    assert theirs is not type(model)
    code = sys.modules[theirs.__module__]
    monkeypatch.setattr(code, "uses_kernels", serves)
    called: list[bool] = []

    def spy(problem: Any, save: bool) -> tuple[Any, ...]:
        called.append(save)
        return kernel_forward(problem, save)

    kernel_forward = code.kernel_forward
    monkeypatch.setattr(code, "kernel_forward", spy)
    tokens = random_tokens(1, 20)

    def results(model: PreTrainedModel) -> dict[str, Tensor]:
        model(tokens, labels=tokens).loss.backward()
        return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}

    expected = results(model)
    assert called == []
    assert_same_bits(results(theirs.from_pretrained(folder)), expected)
    assert called == [True]


# What the kernels serve, and the bounds of it


def test_kernels_serve_up_to_32_bits_on_a_gpu() -> None:
    with FakeTensorMode():
        for dtype, served in (
            (torch.float16, True),
            (torch.bfloat16, True),
            (torch.float32, True),
            (torch.float64, False),
        ):
            assert USES_KERNELS(torch.empty(1, device="cuda", dtype=dtype)) == served
            assert not USES_KERNELS(torch.empty(1, dtype=dtype))


@pytest.mark.parametrize("name", ["query", "value"])
def test_kernels_refuse_a_head_dim_of_257_by_the_limit(name: str) -> None:
    sizes = {"query": {"D": 257}, "value": {"V": 257}}[name]
    leaves, options = build({"T": 5, "N": 5} | sizes, torch.float32)
    with pytest.raises(ValueError, match=f"head dim of {name} must be at most 256 .*got 257"):
        entmax_attention(**leaves, **options)


def test_kernels_refuse_more_heads_than_a_grid_takes() -> None:
    query, key = torch.zeros(65_536, 1, 1, 1), torch.zeros(65_536, 1, 1, 1)
    with pytest.raises(ValueError, match="batch times heads must be at most 65535 .*got 65536; split"):
        entmax_attention(query, key, key)


def test_kernels_refuse_more_heads_in_a_group_than_their_lists_can_name() -> None:
    query, key = torch.zeros(1, 257, 1, 16), torch.zeros(1, 1, 1, 16)
    with pytest.raises(ValueError, match="heads of query must be at most 256 for each head of key .*got 257; repeat"):
        entmax_attention(query, key, key)


@pytest.mark.parametrize(("heads", "kv_heads", "lists"), [(4, 2, 4), (3, 1, 2)])
def test_kernels_in_several_launches_give_the_same_bits(
    heads: int, kv_heads: int, lists: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, options = build({"H": heads, "K": kv_heads, "T": 20, "N": 40, "scale": 1}, torch.float32)
    launched: list[str] = []

    def spy(kernel: Any, *arguments: Any) -> None:
        launched.append(kernel.__name__)
        launch(kernel, *arguments)

    for module in (triton_candidates, triton_forward, triton_backward):
        monkeypatch.setattr(module, "launch", spy)
    expected = run(entmax_attention, leaves, options)
    once = len(launched)
    launched.clear()
    monkeypatch.setattr(triton_launch, "_LISTS_AT_ONCE", lists)  # a head has two pairs of tiles
    assert_same_bits(run(entmax_attention, leaves, options), expected)
    assert len(launched) >= once + 2


class StandIn:
    """A kernel that needs more shared memory than there is, unless it has few stages."""

    __name__ = "stand_in"

    def __init__(self, most_stages: int) -> None:
        self.most_stages = most_stages
        self.tried: list[tuple[int, int, tuple[int, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def start(*_: Any, num_stages: int, num_warps: int, **constants: Any) -> None:
            self.tried.append((num_warps, num_stages, grid))
            if num_stages > self.most_stages:
                raise OutOfResources(1 << 20, 232_448, "shared memory")

        return start


CONFIGS = (Config(8, 3, {"ROWS": 2}), Config(4, 2, {}), Config(4, 1, {}))


@pytest.mark.parametrize(("most_stages", "fits"), [(3, 0), (2, 1), (1, 2)])
def test_launch_goes_on_to_the_first_configuration_that_fits(
    most_stages: int, fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_launch, "_fitting", {})
    kernel = StandIn(most_stages)
    for _ in range(2):
        launch(kernel, (5, 7), CONFIGS, {"DIM": 64}, (), torch.zeros(1))
    tried = [(8, 3, (3, 7, 1)), (4, 2, (5, 7, 1)), (4, 1, (5, 7, 1))][: fits + 1]
    assert kernel.tried == [*tried, tried[-1]]  # the second launch starts with the one that fitted
    launch(kernel, (5, 7), CONFIGS, {"DIM": 128}, (), torch.zeros(1))
    assert kernel.tried[len(tried) + 1] == tried[0]  # another problem, another choice


def test_launch_says_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "_fitting", {})
    with pytest.raises(RuntimeError, match=r"must be .*shared memory.*'DIM': 256.*float32.*232448.*; use"):
        launch(StandIn(0), (5, 7), CONFIGS, {"DIM": 256}, (), torch.zeros(1))
