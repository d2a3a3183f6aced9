"""On a GPU: softmax attention by SDPA and the kernels, and top-k softmax and adaptive temperature in row chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense_reference import dense_attention
from test_baselines import dense_temperature, dense_topk
from torch import Tensor

from hf_asentmax import adaptive_temperature_attention, entmax_attention, topk_attention
from hf_asentmax.ops import attention
from hf_asentmax.ops.attention import attention_from_intervals
from hf_asentmax.ops.intervals import key_intervals

pytestmark = pytest.mark.gpu

# The largest relative Frobenius error against float64. FlexAttention's dense definition, which rounds alike, came to
# 1e-2, 1.3e-3 and 1.5e-6 for cases like these.
ERROR = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5}
GIB = 2**30
LONG = 65_536


def ints(*values: int) -> Tensor:
    return torch.tensor(values)


@pytest.fixture
def route(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What softmax attention was computed by, call by call."""
    called: list[str] = []

    def spy(name: str, label: str) -> None:
        function = getattr(attention, name)

        def recorded(*tensors: Any, **options: Any) -> Tensor:
            called.append(label)
            return function(*tensors, **options)

        monkeypatch.setattr(attention, name, recorded)

    spy("fused_softmax_attention", "sdpa")
    spy("attend", "kernels")
    return called


def tensors(
    dtype: torch.dtype,
    *,
    B: int = 2,
    H: int = 8,
    K: int = 2,
    T: int = 640,
    N: int = 640,
    D: int = 64,
    V: int | None = None,
    scale: bool = False,
) -> dict[str, Tensor]:
    """Differentiable arguments on the GPU; every third query of a head has the scale 0, another head tiny ones."""
    leaves = {
        "query": torch.randn(B, H, T, D).to("cuda", dtype),
        "key": torch.randn(B, K, N, D).to("cuda", dtype),
        "value": torch.randn(B, K, N, V or D).to("cuda", dtype),
    }
    if scale:
        r = torch.randn(B, H, T)
        r[:, 0] *= 1e-3
        r[:, 1, ::3] = 0.0
        r[:, -1] = 1 + 3 * torch.rand(B, T)
        leaves["query_scale"] = r.cuda()
    return leaves


def run(function: Callable[..., Tensor], leaves: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The output and every gradient by name, for a fixed gradient of the output."""
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    out = function(**leaves, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    gradients = torch.autograd.grad(out, list(leaves.values()), weight)
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def assert_near(ours: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, x in expected.items():
        assert ours[name].dtype == (torch.float32 if name == "query_scale" else dtype)
        assert ours[name].isfinite().all()
        error = (ours[name].to(x) - x).norm() / x.norm().clamp(min=1.0)
        assert error < ERROR[dtype], f"{name}: {error:.2e}"


def exact(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().cpu().double() for name, x in leaves.items()}


def slopes(heads: int) -> Tensor:
    return torch.linspace(0.0, 0.5, heads)


def to_gpu(masks: dict[str, Any]) -> dict[str, Any]:
    return {name: x.cuda() if isinstance(x, Tensor) else x for name, x in masks.items()}


MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window": 100},
    "left_padding": {"key_start": ints(0, 300)},
    "right_padding": {"key_length": ints(640, 200)},
    "padding_to_nothing": {"key_start": ints(640, 10), "key_length": ints(0, 0)},
    "offset_by_row": {"query_offset": ints(0, 500), "window": 200},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_softmax_on_a_gpu_with_scale_and_slopes(name: str, dtype: torch.dtype, route: list[str]) -> None:
    masks, leaves = MASKS[name], tensors(dtype, scale=True)
    ours = run(entmax_attention, leaves, alpha=1.0, alibi_slopes=slopes(8).cuda(), **to_gpu(masks))
    assert route == ["kernels"]
    expected = run(dense_attention, exact(leaves), alpha=1.0, alibi_slopes=slopes(8), **masks)
    assert_near(ours, expected, dtype)
    first, last = key_intervals(640, 640, **masks)
    unseen = (first >= last).expand(2, -1).cuda()
    for part in ("out", "query", "query_scale"):
        assert (ours[part].transpose(1, 2)[unseen] == 0).all()


def test_softmax_on_a_gpu_of_packed_documents() -> None:
    leaves, documents = tensors(torch.bfloat16), ints(0, 1, 20, 20, 300, 640)
    first, last = key_intervals(640, 640, cu_seqlens=documents)
    ours = run(attention_from_intervals, leaves, first=first.cuda(), last=last.cuda(), alpha=1.0)
    expected = run(dense_attention, exact(leaves), alpha=1.0, cu_seqlens=documents)
    assert_near(ours, expected, torch.bfloat16)


@pytest.mark.parametrize("queries", [1, 17, 200])
def test_softmax_on_a_gpu_of_fewer_queries_than_keys(queries: int, route: list[str]) -> None:
    leaves = tensors(torch.bfloat16, T=queries, scale=True)
    ours = run(entmax_attention, leaves, alpha=1.0, alibi_slopes=slopes(8).cuda(), key_start=ints(0, 500).cuda())
    assert route == ["kernels"]
    options = {"alpha": 1.0, "alibi_slopes": slopes(8), "key_start": ints(0, 500)}
    assert_near(ours, run(dense_attention, exact(leaves), **options), torch.bfloat16)


@pytest.mark.parametrize("sizes", [{"D": 128}, {"D": 80, "H": 3, "K": 1}, {"D": 256}, {"D": 64, "V": 32}], ids=str)
def test_softmax_on_a_gpu_of_other_head_dims(sizes: dict[str, int], route: list[str]) -> None:
    leaves = tensors(torch.float16, T=333, N=333, scale=True, **sizes)
    ours = run(entmax_attention, leaves, alpha=1.0, key_start=ints(0, 130).cuda())
    assert route == ["kernels"]
    assert_near(ours, run(dense_attention, exact(leaves), alpha=1.0, key_start=ints(0, 130)), torch.float16)


def test_softmax_on_a_gpu_without_gradients_of_changing_batches_and_lengths() -> None:
    for batch, length in ((64, 88), (63, 152), (20, 536), (7, 129), (64, 1)):
        leaves = tensors(torch.bfloat16, B=batch, H=4, K=4, T=length, N=length, D=32)
        with torch.no_grad():
            out = entmax_attention(**leaves, alpha=1.0, alibi_slopes=slopes(4).cuda())
        assert_near(
            {"out": out}, {"out": dense_attention(**exact(leaves), alpha=1.0, alibi_slopes=slopes(4))}, out.dtype
        )


# Sizes and dtype of plain attention that a fused kernel of SDPA takes.
PLAIN: dict[str, tuple[torch.dtype, dict[str, int], dict[str, Any]]] = {
    "bfloat16": (torch.bfloat16, {}, {}),
    "float16_dim_128": (torch.float16, {"D": 128, "T": 111, "N": 111}, {}),
    "float32": (torch.float32, {"K": 8, "V": 32}, {}),
    "not_causal": (torch.bfloat16, {"T": 100}, {"is_causal": False}),
    "not_causal_float32": (torch.float32, {"K": 8, "T": 100}, {"is_causal": False}),
    "one_token": (torch.bfloat16, {"T": 1, "N": 1}, {}),
    "decode": (torch.bfloat16, {"T": 1, "N": 5000}, {}),
}


@pytest.mark.parametrize("case", PLAIN)
def test_softmax_on_a_gpu_plain_is_sdpa(case: str, route: list[str]) -> None:
    dtype, sizes, masks = PLAIN[case]
    leaves = tensors(dtype, **sizes)
    ours = run(entmax_attention, leaves, alpha=1.0, scaling=0.2, **masks)
    assert route == ["sdpa"]
    assert_near(ours, run(dense_attention, exact(leaves), alpha=1.0, scaling=0.2, **masks), dtype)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 8), (torch.bfloat16, 136), (torch.float64, 64)], ids=str)
def test_softmax_on_a_gpu_of_what_sdpa_does_not_take(dtype: torch.dtype, dim: int, route: list[str]) -> None:
    leaves = tensors(dtype, T=70, N=70, D=dim)
    out = entmax_attention(**leaves, alpha=1.0)
    assert route == ["kernels"]
    error = {**ERROR, torch.float64: 1e-9}[dtype]
    torch.testing.assert_close(out.cpu().double(), dense_attention(**exact(leaves), alpha=1.0), rtol=error, atol=error)


def test_softmax_on_a_gpu_gives_the_same_bits_again() -> None:
    leaves, alibi = tensors(torch.bfloat16, scale=True), slopes(8).cuda()
    once, again = (run(entmax_attention, leaves, alpha=1.0, alibi_slopes=alibi) for _ in range(2))
    assert all(torch.equal(x, again[name]) for name, x in once.items())


@pytest.mark.parametrize("window", [None, 100])
def test_softmax_on_a_gpu_compiles_within_a_model(window: int | None) -> None:
    leaves = tensors(torch.bfloat16)
    compiled = torch.compile(entmax_attention, fullgraph=True)
    ours = run(compiled, leaves, alpha=1.0, window=window)
    assert_near(ours, run(entmax_attention, leaves, alpha=1.0, window=window), torch.bfloat16)


def test_softmax_on_a_gpu_reads_no_value_back() -> None:
    leaves = tensors(torch.bfloat16, scale=True)
    first, last = (x.cuda() for x in key_intervals(640, 640, window=50))
    attention_from_intervals(**leaves, first=first, last=last, alpha=1.0)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention_from_intervals(**leaves, first=first, last=last, alpha=1.0)
        entmax_attention(leaves["query"], leaves["key"], leaves["value"], alpha=1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


ROWS = [0, 1, 127, 128, 9000, 40_000, 65_535]


def long_rows(
    leaves: dict[str, Tensor], weight: Tensor, choose: Callable[[Tensor], Tensor], alibi: Tensor | None
) -> dict[str, Tensor]:
    """Output and gradients of the ROWS of causal attention in float64: ``choose`` gives the weights of their scores."""
    names = [name for name in ("query", "query_scale") if name in leaves]
    inputs = {name: leaves[name][:, :, ROWS].double().requires_grad_() for name in names}
    groups = leaves["query"].shape[1] // leaves["key"].shape[1]
    key, value = (leaves[x].double().repeat_interleave(groups, 1) for x in ("key", "value"))
    scores = inputs["query"] @ key.transpose(-1, -2) * leaves["query"].shape[-1] ** -0.5
    if "query_scale" in inputs:
        scores = scores * inputs["query_scale"][..., None]
    distance = torch.tensor(ROWS, device="cuda")[:, None] - torch.arange(LONG, device="cuda")
    if alibi is not None:
        scores = scores - alibi.double()[:, None, None] * distance
    out = choose(scores.masked_fill(distance < 0, -torch.inf)) @ value
    gradients = torch.autograd.grad(out, list(inputs.values()), weight[:, :, ROWS].double())
    return {"out": out.detach(), **dict(zip(inputs, gradients, strict=True))}


def assert_long(
    function: Callable[..., Tensor],
    leaves: dict[str, Tensor],
    choose: Callable[[Tensor], Tensor],
    bound: float,
    alibi: Tensor | None = None,
    backward: bool = True,
) -> None:
    """Some rows against float64, and peak memory beyond the arguments of at most ``bound`` bytes."""
    dtype = leaves["query"].dtype
    weight = torch.randn_like(leaves["query"])
    leaves = {name: x.requires_grad_(backward) for name, x in leaves.items()}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = function(**leaves)
    ours = {"out": out.detach()}
    if backward:
        ours |= dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), weight), strict=True))
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < bound, f"{peak / GIB:.2f} GiB"
    assert all(x.isfinite().all() for x in ours.values())
    expected = long_rows({name: x.detach() for name, x in leaves.items()}, weight, choose, alibi)
    for name in list(expected):
        if name in ours:
            ours[name] = ours[name][:, :, ROWS]
        else:
            del expected[name]
    assert_near(ours, expected, dtype)


def softmax_of(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


def test_softmax_on_a_gpu_of_65536_tokens_with_scale_and_slopes(route: list[str]) -> None:
    alibi = (slopes(8) / 100).cuda()

    def attention(**leaves: Tensor) -> Tensor:
        return entmax_attention(**leaves, alpha=1.0, alibi_slopes=alibi)

    leaves = tensors(torch.bfloat16, T=LONG, N=LONG, scale=True)  # a query takes 128 MiB
    assert_long(attention, leaves, softmax_of, 3 * GIB, alibi)
    assert set(route) == {"kernels"}


@pytest.mark.parametrize(("dtype", "heads"), [(torch.bfloat16, 2), (torch.float32, 8)], ids=str)
def test_softmax_on_a_gpu_of_65536_tokens_plain(dtype: torch.dtype, heads: int, route: list[str]) -> None:
    leaves = tensors(dtype, B=1, K=heads, T=LONG, N=LONG)
    assert_long(lambda **x: entmax_attention(**x, alpha=1.0), leaves, softmax_of, 3 * GIB)
    assert route == ["sdpa"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_baselines_on_a_gpu_equal_their_dense_definitions(dtype: torch.dtype) -> None:
    leaves = tensors(dtype, T=300, N=300, scale=True)
    masks = {"key_start": ints(0, 130)}
    gpu, cpu = ({"alibi_slopes": slopes(8).to(x), **y} for x, y in (("cuda", to_gpu(masks)), ("cpu", masks)))
    ours, expected = run(topk_attention, leaves, k=20, **gpu), run(dense_topk, exact(leaves), k=20, **cpu)
    assert_near(ours, expected, dtype)
    tempered = {"out": adaptive_temperature_attention(**leaves, **gpu)}
    assert_near(tempered, {"out": dense_temperature(**exact(leaves), **cpu)}, dtype)


def topk_of(scores: Tensor) -> Tensor:
    least = scores.topk(64).values[..., -1:]
    return scores.masked_fill(scores < least, -torch.inf).softmax(-1)


def test_topk_on_a_gpu_of_65536_tokens() -> None:
    leaves = tensors(torch.bfloat16, B=1, H=2, K=1, T=LONG, N=LONG, scale=True)
    leaves["query_scale"].abs_().add_(0.5)  # at 0 all scores tie
    assert_long(lambda **x: topk_attention(**x, k=64), leaves, topk_of, 3 * GIB)


def tempered_of(scores: Tensor) -> Tensor:
    h = torch.special.entr(scores.softmax(-1)).sum(-1, keepdim=True)
    factor = -0.037 * h**4 + 0.481 * h**3 - 2.3 * h**2 + 4.917 * h - 1.791
    return (scores * torch.where(h > 0.5, factor.clamp_min(1.0), 1.0)).softmax(-1)


def test_adaptive_temperature_on_a_gpu_of_65536_tokens() -> None:
    leaves = tensors(torch.bfloat16, B=1, H=2, K=1, T=LONG, N=LONG)
    assert_long(adaptive_temperature_attention, leaves, tempered_of, 3 * GIB, backward=False)
