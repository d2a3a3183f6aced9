"""The kernels of a step of generation, in Triton's interpreter: few queries against many keys, no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_reference import dense_attention
from kernel_cases import TWO_ROWS, allowed, assert_weights_are_right, build, exact, ints
from torch import Tensor

from hf_asentmax import entmax_attention
from hf_asentmax.ops import operators, triton_decode, triton_forward

FEW = {"T": 1, "N": 300, "B": 2, "H": 4, "K": 2}
# What `kernel_cases` has beside, of so few queries and so many keys that these kernels serve it.
DECODE_CASES: dict[str, dict[str, Any]] = {
    "one_query": FEW,
    "scale_and_slopes": {**FEW, "scale": 1, "slopes": (0.0, 0.1)},
    "a_few_queries": {**FEW, "T": 3, "scale": -1, "alpha": 1.3},
    "sixteen_queries_of_a_group_of_four": {**FEW, "T": 16, "K": 1},
    "sparsemax": {**FEW, "alpha": 2.0},
    "softmax": {**FEW, "alpha": 1.0, "scale": 1, "slopes": (0.0, 2.0)},
    "alpha_by_head": {**FEW, "alpha": (1.02, 1.3, 1.5, 2.0), "slopes": (0.0, 0.1, 0.0, 0.5)},
    "groups_of_3": {**FEW, "H": 6, "T": 2, "alpha": (1.3,), "scale": 0},
    "head_dims": {**FEW, "D": 24, "V": 80},
    "window": {**FEW, "T": 5, "window": 40},
    "left_padding": {**FEW, **TWO_ROWS, "K": 1, "T": 2, "key_start": ints(250, 3), "slopes": (0.3,)},
    "padding_to_nothing": {**FEW, **TWO_ROWS, "K": 1, "key_start": ints(300, 0), "key_length": ints(0, 200)},
    "cache_that_is_not_full": {**FEW, "T": 2, "query_offset": 130, "scale": 1},
    "offset_by_row": {**FEW, "T": 2, "query_offset": ints(20, 290)},
    "packed_not_causal": {"T": 1, "N": 300, "is_causal": False},
    "identical_keys": {**FEW, "keys": "identical"},
    "one_huge_key": {**FEW, "keys": "huge", "scale": 1},
    "scores_of_1e4": {**FEW, "scaling": 1000.0},
    "transposed_and_strided": {**FEW, "layout": ("transposed", "strided"), "scale": 1},
}


@pytest.fixture(autouse=True)
def kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels in the interpreter, and of them these alone."""
    monkeypatch.setattr(operators, "uses_kernels", lambda query: query.dtype != torch.float64)
    monkeypatch.setattr(triton_forward, "kernel_forward", None)


def attend(leaves: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return entmax_attention(**leaves, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", DECODE_CASES)
@pytest.mark.usefixtures("nan_in_empty")
def test_decode_equals_the_dense_reference(case: str, dtype: torch.dtype) -> None:
    leaves, options = build(DECODE_CASES[case], dtype)
    out = attend(leaves, options)
    doubles, dense_options = exact(leaves, options)
    expected = dense_attention(**doubles, **dense_options)
    largest = 1e4 if "scores" in case else 100.0 if "huge" in case else 30.0
    assert out.dtype == dtype
    assert (out.double() - expected).norm() <= allowed("out", dtype, largest) * expected.norm()
    assert (out[expected == 0] == 0).all()


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0, 1.3])
def test_decode_weights_have_mass_1_and_the_exact_support(alpha: float) -> None:
    case = {**FEW, "N": 250, "V": 250, "T": 2, "alpha": alpha, "slopes": (0.0, 0.1), "scale": 1}
    leaves, options = build(case, torch.float32)
    with torch.no_grad():
        leaves["value"].copy_(torch.eye(250).expand_as(leaves["value"]))
    assert_weights_are_right(attend(leaves, options), leaves, options)


def test_decode_gives_nan_for_a_nan_query_alone() -> None:
    leaves, options = build({**FEW, "T": 2}, torch.float32)
    expected = attend(leaves, options)
    leaves["query"].detach()[0, 1, 1, 3] = torch.nan
    out = attend(leaves, options)
    assert out[0, 1, 1].isnan().all()
    out[0, 1, 1] = expected[0, 1, 1]
    assert torch.equal(out, expected)


def test_decode_gives_the_same_bits_again() -> None:
    leaves, options = build({**FEW, "scale": 1, "slopes": (0.0, 0.1)}, torch.float16)
    assert torch.equal(attend(leaves, options), attend(leaves, options))


def test_decode_serves_few_queries_against_many_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    nothing = torch.zeros(1)
    monkeypatch.setattr(triton_decode, "kernel_decode", lambda *_: called.append("decode") or nothing)
    monkeypatch.setattr(triton_forward, "kernel_forward", lambda *_: called.append("forward") or (nothing,) * 4)

    def served(**sizes: int) -> str:
        leaves, options = build({**FEW, **sizes}, torch.float32)
        attend(leaves, options)
        return called.pop()

    assert served() == served(T=16) == served(H=64, T=1) == "decode"
    assert served(T=17) == served(H=64, K=1, T=2) == served(N=128) == "forward"
    leaves, options = build(FEW, torch.float32)
    entmax_attention(**leaves, **options)  # with gradients
    assert called == ["forward"]
