"""On a GPU: the kernels of a step of generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_reference import dense_attention
from kernel_cases import allowed, build, exact
from test_decode_kernels import DECODE_CASES
from torch import Tensor

from hf_asentmax import entmax_attention
from hf_asentmax.ops import triton_decode

pytestmark = pytest.mark.gpu

LARGE: dict[str, dict[str, Any]] = {
    "many_keys": {"T": 1, "N": 65_536, "H": 32, "K": 8, "D": 128, "V": 128},
    "many_keys_with_slopes": {
        "T": 2,
        "N": 20_000,
        "H": 16,
        "K": 4,
        "D": 64,
        "V": 64,
        "slopes": (0.0, 0.01),
        "scale": 1,
    },
    "softmax_of_many_keys": {"T": 1, "N": 20_000, "H": 8, "K": 8, "D": 64, "V": 64, "alpha": 1.0, "scale": 1},
    "wide_heads": {"T": 4, "N": 3000, "H": 8, "K": 2, "D": 256, "V": 256, "alpha": (1.3,)},
}


@pytest.fixture(autouse=True)
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries each call of the kernels had."""
    seen: list[int] = []
    kernel_decode = triton_decode.kernel_decode

    def spy(problem: Any) -> Tensor:
        seen.append(problem.query.shape[2])
        return kernel_decode(problem)

    monkeypatch.setattr(triton_decode, "kernel_decode", spy)
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", DECODE_CASES | LARGE)
@pytest.mark.usefixtures("nan_in_empty")
def test_decode_on_a_gpu_equals_the_dense_reference(case: str, dtype: torch.dtype, decodes: list[int]) -> None:
    leaves, options = build((DECODE_CASES | LARGE)[case], dtype, "cuda")
    with torch.no_grad():
        out, again = (entmax_attention(**leaves, **options) for _ in range(2))
    assert decodes == [leaves["query"].shape[2]] * 2
    assert torch.equal(out, again)
    doubles, dense_options = exact(leaves, options)
    with torch.no_grad():
        expected = dense_attention(**doubles, **dense_options)
    largest = 1e4 if "scores" in case else 100.0 if "huge" in case or case in LARGE else 30.0
    assert (out.cpu().double() - expected).norm() <= allowed("out", dtype, largest) * expected.norm()


def test_decode_on_a_gpu_is_captured_by_a_graph() -> None:
    leaves, options = build({"T": 1, "N": 2000, "H": 8, "K": 2, "D": 64, "V": 64}, torch.bfloat16, "cuda")
    leaves = {name: x.detach() for name, x in leaves.items()}
    expected = entmax_attention(**leaves, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = entmax_attention(**leaves, **options)
    leaves["query"].neg_()
    graph.replay()
    assert not torch.equal(out, expected)
    leaves["query"].neg_()
    graph.replay()
    assert torch.equal(out, expected)
