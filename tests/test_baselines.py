"""Top-k softmax and adaptive temperature against their dense definitions in float64, and what they promise beside."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense_reference import dense_entmax, dense_scores
from helpers import PRINT_PEAK_MEMORY, TOLERANCE
from hypothesis import given
from hypothesis import strategies as st
from test_entmax_attention import BAD, CASES, K, Q, assert_same, build, compiled_nodes, ints, run
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from hf_asentmax import adaptive_temperature_attention, entmax_attention, topk_attention
from hf_asentmax.ops import baselines, reference

OPS = torch.ops.hf_asentmax
MASKS = {name: case for name, case in CASES.items() if "alpha" not in name and not name.startswith("so")}


def arguments(case: dict[str, Any], dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Those of `entmax_attention` without alpha: the differentiable ones, the others."""
    leaves, options = build({**case, "alpha": 1.0}, dtype)
    del options["alpha"]
    return leaves, options


def values_of(query: Tensor, value: Tensor) -> Tensor:
    return value.double().repeat_interleave(query.shape[1] // value.shape[1], dim=1)


def dense_topk(query: Tensor, key: Tensor, value: Tensor, *, k: int, **options: Any) -> Tensor:
    scores = dense_scores(query, key, **options)
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
    others = torch.ones_like(scores, dtype=torch.bool).scatter(-1, best, False)
    return dense_entmax(scores.masked_fill(others, -torch.inf), 1.0) @ values_of(query, value)


def dense_temperature(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    scores = dense_scores(query, key, **options)
    p = dense_entmax(scores, 1.0)
    h = -(p * p.clamp_min(1e-300).log()).sum(-1, keepdim=True)
    factor = -0.037 * h**4 + 0.481 * h**3 - 2.3 * h**2 + 4.917 * h - 1.791
    factor = torch.where(h > 0.5, factor.clamp_min(1.0), 1.0)
    return dense_entmax(scores * factor, 1.0) @ values_of(query, value)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", MASKS)
@pytest.mark.usefixtures("nan_in_empty")
def test_topk_attention_equals_its_dense_definition(case: str, dtype: torch.dtype) -> None:
    leaves, options = arguments(MASKS[case], dtype)
    weight = torch.randn(*leaves["query"].shape[:3], leaves["value"].shape[-1]).to(dtype)
    ours = run(topk_attention, leaves, {**options, "k": 7}, weight)
    exact = {name: x.detach().double() for name, x in leaves.items()}
    expected = run(dense_topk, exact, {**options, "k": 7}, weight.double())
    assert ours["out"].dtype == dtype
    assert all(ours[name].dtype == x.dtype and ours[name].shape == x.shape for name, x in leaves.items())
    assert_same(ours, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", MASKS)
@pytest.mark.usefixtures("nan_in_empty")
def test_adaptive_temperature_equals_its_dense_definition(case: str, dtype: torch.dtype) -> None:
    leaves, options = arguments(MASKS[case], dtype)
    with torch.no_grad():
        out = adaptive_temperature_attention(**leaves, **options)
        expected = dense_temperature(**leaves, **options)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, check_dtype=False, **TOLERANCE[dtype])


@pytest.mark.parametrize("k", [1, 3, 100])
def test_topk_attention_gradcheck(k: int) -> None:
    case = {"B": 2, "H": 2, "K": 1, "T": 4, "N": 6, "D": 3, "V": 2}
    leaves, options = arguments({**case, "scale": True, "alibi": True, "key_start": ints(0, 2)}, torch.float64)
    names = list(leaves)
    assert torch.autograd.gradcheck(
        lambda *x: topk_attention(**dict(zip(names, x, strict=True)), **options, k=k), tuple(leaves.values())
    )


@pytest.mark.parametrize("k", [63, 10**6])
def test_topk_attention_of_all_keys_is_softmax(k: int) -> None:
    leaves, options = arguments(CASES["both_paddings"], torch.float64)
    expected = run(entmax_attention, leaves, {**options, "alpha": 1.0})
    assert_same(run(topk_attention, leaves, {**options, "k": k}), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["left_padding", "window_in_padding", "packed", "offset_by_row"])
@pytest.mark.parametrize("elements", [1, 1500])
def test_baselines_row_chunks_change_nothing(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, options = arguments(CASES[name], torch.float64)
    tempered = {key: x.detach() for key, x in leaves.items()}
    whole = run(topk_attention, leaves, {**options, "k": 4}), adaptive_temperature_attention(**tempered, **options)
    monkeypatch.setitem(reference._CHUNK_ELEMENTS, "cpu", elements)
    assert_same(run(topk_attention, leaves, {**options, "k": 4}), whole[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(adaptive_temperature_attention(**tempered, **options), whole[1], rtol=0, atol=1e-12)


def test_topk_attention_takes_the_first_of_equal_scores() -> None:
    query, key = torch.ones(1, 1, 1, 1), torch.tensor([0.0, 2.0, 1.0, 1.0, 1.0, 3.0, 1.0, 0.0])[None, None, :, None]
    weights = topk_attention(query, key, torch.eye(8)[None, None], k=4)[0, 0, 0]
    assert weights.nonzero().flatten().tolist() == [1, 2, 3, 5]
    assert weights[2] == weights[3]
    weights = topk_attention(query, torch.zeros_like(key), torch.eye(8)[None, None], k=3, window=6)[0, 0, 0]
    torch.testing.assert_close(weights, torch.tensor([0, 0, 1, 1, 1, 0, 0, 0]) / 3)


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, Any]]:
    tokens, keys = draw(st.integers(1, 20)), draw(st.integers(20, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    query = torch.randn(2, 2, tokens, 3, generator=generator)
    key = torch.randn(2, 1, keys, 3, generator=generator)
    if draw(st.booleans()):
        query, key = query.round(), key.round()  # many equal scores
    masks: dict[str, Any] = {"key_start": ints(0, draw(st.integers(0, keys)))}
    if draw(st.booleans()):
        masks["window"] = draw(st.integers(1, 40))
    return query, key, masks


@given(rows(), st.integers(1, 45))
def test_topk_attention_weights_of_min_k_n_keys_sum_to_1(row: tuple[Tensor, Tensor, dict[str, Any]], k: int) -> None:
    query, key, masks = row
    keys = key.shape[2]
    weights = topk_attention(query, key, torch.eye(keys).expand(2, 1, -1, -1), k=k, **masks)
    seen = dense_scores(query, key, **masks) > -torch.inf
    assert ((weights > 0) <= seen).all()
    assert torch.equal((weights > 0).sum(-1), seen.sum(-1).clamp(max=k))
    torch.testing.assert_close(weights.sum(-1), seen.any(-1).float())


@given(rows())
def test_adaptive_temperature_never_flattens(row: tuple[Tensor, Tensor, dict[str, Any]]) -> None:
    query, key, masks = row
    identity = torch.eye(key.shape[2]).expand(2, 1, -1, -1)
    weights = adaptive_temperature_attention(query, key, identity, **masks)
    softmax = entmax_attention(query, key, identity, alpha=1.0, **masks)
    seen = dense_scores(query, key, **masks) > -torch.inf
    torch.testing.assert_close(weights.sum(-1), seen.any(-1).float())
    assert (torch.special.entr(weights).sum(-1) <= torch.special.entr(softmax).sum(-1) + 1e-5).all()


def test_adaptive_temperature_factor_rises_to_about_two_and_a_half() -> None:
    # n keys of which one scores a: the weights have the entropy that the score chooses.
    keys = 200
    query, score = torch.ones(1, 1, 1, 1, dtype=torch.float64), 2.0
    key = torch.zeros(1, 1, keys, 1, dtype=torch.float64)
    key[:, :, -1] = score
    weights = adaptive_temperature_attention(query, key, torch.eye(keys, dtype=torch.float64)[None, None], scaling=1.0)
    factor = (weights[0, 0, 0, -1] / weights[0, 0, 0, 0]).log().item() / score
    p = torch.softmax(key.flatten(), 0)
    entropy = -(p * p.log()).sum().item()
    assert 4.5 < entropy < math.log(keys)
    expected = -0.037 * entropy**4 + 0.481 * entropy**3 - 2.3 * entropy**2 + 4.917 * entropy - 1.791
    assert factor == pytest.approx(expected, rel=1e-9)


def test_topk_attention_gives_only_the_gradients_asked_for() -> None:
    leaves, options = arguments({"T": 9, "N": 9, "scale": True}, torch.float64)
    every = run(topk_attention, leaves, {**options, "k": 3})
    weight = torch.randn(2, 4, 9, 12, generator=torch.Generator().manual_seed(1)).double()
    for name in leaves:
        inputs = {other: x.detach().clone() for other, x in leaves.items()}
        inputs[name].requires_grad_()
        (gradient,) = torch.autograd.grad(topk_attention(**inputs, **options, k=3), inputs[name], weight)
        torch.testing.assert_close(gradient, every[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", [topk_attention, adaptive_temperature_attention], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("tokens", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_baselines_of_empty_tensors_give_zeros(function: Callable[..., Tensor], tokens: int, keys: int) -> None:
    leaves, options = arguments({"T": tokens, "N": keys, "scale": True, "is_causal": False}, torch.float32)
    if function is topk_attention:
        result = run(function, leaves, {**options, "k": 3})
    else:
        result = {"out": function(**{name: x.detach() for name, x in leaves.items()}, **options)}
    assert result["out"].shape == (2, 4, tokens, 12)
    assert all((x == 0).all() for x in result.values())


@pytest.mark.parametrize("scale", [True, False])
def test_baselines_operators_pass_opcheck(scale: bool) -> None:
    leaves, options = arguments({"T": 5, "N": 7, "D": 3, "V": 4, "scale": scale, "alibi": True}, torch.float32)
    last = torch.arange(3, 8, dtype=torch.int32)[None]
    tensors = (*(leaves[name] for name in ("query", "key", "value")), torch.zeros_like(last), last)
    tensors = (*tensors, leaves.get("query_scale"), options["alibi_slopes"])
    opcheck(OPS.topk_attention.default, (*tensors, 3, 0.6))
    constants = tuple(x if x is None else x.detach() for x in tensors)
    opcheck(OPS.topk_attention_backward.default, (torch.randn(2, 4, 5, 4), *constants, 3, 0.6))
    opcheck(OPS.adaptive_temperature_attention.default, (*constants, 0.6))


def test_baselines_compile_to_one_node_each() -> None:
    torch._dynamo.reset()
    leaves, options = arguments({"T": 9, "N": 9, "scale": True, "key_start": ints(0, 3), "window": 5}, torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(topk_attention, fullgraph=True, backend=counter)
    options["k"] = 3
    assert_same(run(compiled, leaves, options), run(topk_attention, leaves, options), rtol=1e-6, atol=1e-6)
    del options["k"]
    compiled = torch.compile(adaptive_temperature_attention, fullgraph=True, backend=counter)
    with torch.no_grad():
        out = compiled(**leaves, **options)
        torch.testing.assert_close(out, adaptive_temperature_attention(**leaves, **options))
    nodes = compiled_nodes(counter)
    assert sum("topk" in name for name in nodes) == sum("temperature" in name for name in nodes) == 1
    assert not any("matmul" in name or "softmax" in name for name in nodes)


@pytest.mark.parametrize("name", ["query", "key", "value", "query_scale"])
def test_adaptive_temperature_refuses_gradients(name: str) -> None:
    leaves, options = arguments({"T": 5, "N": 5, "scale": True}, torch.float32)
    inputs = {other: x.detach() for other, x in leaves.items()}
    inputs[name].requires_grad_()
    with pytest.raises(RuntimeError, match=rf"must .* gradient, got \['{name}'\].*no_grad"):
        adaptive_temperature_attention(**inputs, **options)
    with torch.no_grad():
        assert adaptive_temperature_attention(**inputs, **options).isfinite().all()


BAD_MASKS = {name: case for name, case in BAD.items() if "alpha" not in name}
BAD_K: dict[str, tuple[dict[str, Any], Any, tuple[str, ...]]] = {
    f"k_{k}": ({"k": k}, ValueError, ("k", "positive int", repr(k))) for k in (0, -1, 2.0, True, None)
}


@pytest.mark.parametrize("case", [*BAD_MASKS, *BAD_K])
def test_topk_attention_bad_input_raises_what_rule_and_value(case: str) -> None:
    change, error, words = {**BAD_MASKS, **BAD_K}[case]
    with pytest.raises(error) as caught:
        topk_attention(**{"query": Q, "key": K, "value": K, "k": 3, **change})
    assert " must " in str(caught.value)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("case", BAD_MASKS)
def test_adaptive_temperature_bad_input_raises_what_rule_and_value(case: str) -> None:
    change, error, words = BAD_MASKS[case]
    with pytest.raises(error) as caught:
        adaptive_temperature_attention(**{"query": Q, "key": K, "value": K, **change})
    assert " must " in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_baselines_from_intervals_check_their_tensors() -> None:
    last = torch.arange(1, 6, dtype=torch.int32)[None]
    for function, options in (
        (baselines.topk_from_intervals, {"k": 3}),
        (baselines.adaptive_temperature_from_intervals, {}),
    ):
        with pytest.raises(ValueError, match="key must have shape"):
            function(Q, K[..., :2], K, torch.zeros_like(last), last, **options)


LONG_RUN = """
import torch
from hf_asentmax import adaptive_temperature_attention, topk_attention
torch.set_num_threads(1)
q, k, v = (torch.randn(1, 2, 16_384, 64, requires_grad=True) for _ in range(3))
out = topk_attention(q, k, v, k=64, query_scale=torch.ones(1, 2, 16_384, requires_grad=True))
out.backward(torch.randn_like(out))
assert all(x.grad.isfinite().all() for x in (q, k, v))
with torch.no_grad():
    assert adaptive_temperature_attention(q, k, v).isfinite().all()
"""


@pytest.mark.slow
def test_baselines_of_16384_tokens_fit_in_1_gb() -> None:  # a whole map of scores would be 2 GiB in float32
    finished = subprocess.run(
        [sys.executable, "-c", LONG_RUN + PRINT_PEAK_MEMORY], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) < 1e9
