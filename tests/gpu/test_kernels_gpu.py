"""The Triton kernels compiled for a GPU: `pytest -m gpu tests/gpu`.

Each combination of dtype, head dims and kinds of arguments compiles anew, for seconds, so there are few of them here;
what depends on masks and shapes alone is tested in the interpreter as well (`tests/test_kernels.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_tokens, tiny_model
from kernel_cases import (
    CASES,
    allowed,
    assert_equals_dense,
    assert_weights_are_right,
    build,
    exact,
    relative_errors,
    run,
)
from torch import Tensor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hf_asentmax import entmax_attention, patch_model
from hf_asentmax.benchmark.inputs import Case, make_inputs

pytestmark = pytest.mark.gpu

# What is compiled most often here, and what with every kind of argument.
PLAIN: dict[str, Any] = {"D": 64, "V": 64}
BIASED: dict[str, Any] = {**PLAIN, "scale": 1, "slopes": (0.0, 0.05)}
EVERYTHING: dict[str, Any] = {**PLAIN, "scale": 1, "slopes": (0.1,), "alpha": (1.3,)}
NARROW: dict[str, Any] = {"D": 32, "V": 32}  # with a backward of their own to 128 keys
SMALL: dict[str, Any] = {"D": 16, "V": 16, "H": 2, "scale": 1, "slopes": (0.0, 0.1), "alpha": (1.3, 1.5)}

# The largest relative errors in bfloat16, 1.2 times what its roundings of weights, slopes and results cost these inputs
# in float64 arithmetic (and 1.2 times the output's error of AdaSplash-2). What is not here is a sum in which most
# cancels: only the dense comparison can hold it against its terms.
USUAL = {"out": 2.9e-3, "query": 4.6e-3, "key": 4.4e-3, "value": 2.9e-3}
BENCHMARK = {**USUAL, "query": 6.4e-3}


def reference_results(leaves: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """By the package's plain PyTorch, which serves float64: its own tests hold it against the dense reference."""
    weight = torch.randn(
        *leaves["query"].shape[:3], leaves["value"].shape[-1], generator=torch.Generator().manual_seed(1)
    )
    return run(entmax_attention, *exact(leaves, options, "cuda"), weight.to(leaves["query"].dtype))


def largest_score(leaves: dict[str, Tensor]) -> float:
    """Of all keys, without the bias."""
    query, key = (leaves[name].detach().float() for name in ("query", "key"))
    products = (query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT).abs().amax(-1)
    if "query_scale" in leaves:
        products = products * leaves["query_scale"].detach().abs()
    return float(products.max()) * query.shape[-1] ** -0.5


def assert_equals_reference(ours: dict[str, Tensor], leaves: dict[str, Tensor], options: dict[str, Any]) -> None:
    dtype = leaves["query"].dtype
    limits = USUAL
    if dtype != torch.bfloat16:
        limits = {name: allowed(name, dtype, largest_score(leaves)) for name in USUAL}
    if dtype == torch.float32:
        limits |= {"query_scale": 1e-3, "alpha": 1e-3}
    errors = relative_errors(ours, reference_results(leaves, options))
    assert all(errors[name] <= limit for name, limit in limits.items() if name in errors), (errors, limits)


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert torch.equal(x, other[name]), name


# Accuracy

LENGTHS = (1, 17, 63, 64, 111, 200, 1000, 4096)
VARIANTS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "plain": (PLAIN, torch.bfloat16),
    "biased": (BIASED, torch.bfloat16),
    "everything": (EVERYTHING, torch.bfloat16),
    "softmax_biased": ({**BIASED, "alpha": 1.0}, torch.bfloat16),
    "alpha_1.25": ({**BIASED, "alpha": 1.25}, torch.bfloat16),
    "narrow_alpha_1.25": ({**BIASED, **NARROW, "alpha": 1.25}, torch.bfloat16),
    "narrow_everything": ({**EVERYTHING, **NARROW}, torch.bfloat16),
    "float32": (PLAIN, torch.float32),
    "everything_float32": (SMALL, torch.float32),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.usefixtures("nan_in_empty")
def test_kernels_gpu_equal_the_reference_at_every_length(length: int, variant: str) -> None:
    sizes, dtype = VARIANTS[variant]
    leaves, options = build({**sizes, "T": length, "N": length}, dtype, "cuda")
    ours = run(entmax_attention, leaves, options)
    if length <= 1000:
        assert_equals_dense(ours, leaves, options)
    else:
        assert_equals_reference(ours, leaves, options)


@pytest.mark.parametrize("variant", ["plain", "everything"])
@pytest.mark.parametrize(
    "name",
    [
        "decode",
        "chunk_of_a_longer_text",
        "multi_head",
        "groups_of_4",
        "groups_of_8",
        "window_1",
        "window_40",
        "window_larger_than_text",
        "left_padding",
        "right_padding",
        "both_paddings",
        "padding_to_nothing",
        "one_row_without_keys",
        "window_in_padding",
        "offset",
        "offset_tensor",
        "offset_by_row",
        "offset_and_padding",
        "offset_past_the_keys",
        "packed",
        "packed_window",
        "identical_keys",
        "transposed",
        "transposed_and_strided",
    ],
)
@pytest.mark.usefixtures("nan_in_empty")
def test_kernels_gpu_equal_the_dense_reference(name: str, variant: str) -> None:
    case = {key: x for key, x in CASES[name].items() if key not in ("scale", "slopes", "alpha")}
    leaves, options = build({**case, **VARIANTS[variant][0]}, torch.bfloat16, "cuda")
    assert_equals_dense(run(entmax_attention, leaves, options), leaves, options)


@pytest.mark.parametrize("name", ["packed_not_causal", "not_causal", "not_causal_more_queries", "not_causal_padded"])
@pytest.mark.usefixtures("nan_in_empty")
def test_kernels_gpu_without_causality_equal_the_dense_reference(name: str) -> None:
    case = {key: x for key, x in CASES[name].items() if key not in ("scale", "alpha")}
    leaves, options = build({**case, **PLAIN}, torch.bfloat16, "cuda")
    assert_equals_dense(run(entmax_attention, leaves, options), leaves, options)


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        ("float32", {"scaling": 500.0}),
        ("everything_float32", {"scaling": 1000.0}),
        ("biased", {"scaling": 500.0}),
        ("biased", {"scaling": 500.0, "scale": -1}),
        ("float32", {"keys": "identical"}),
        ("everything_float32", {"keys": "identical"}),
        ("float32", {"keys": "huge"}),
        ("plain", {"keys": "huge"}),
        ("everything_float32", {"keys": "huge"}),
    ],
)
@pytest.mark.usefixtures("nan_in_empty")
def test_kernels_gpu_at_extreme_scores_equal_the_dense_reference(variant: str, change: dict[str, Any]) -> None:
    sizes, dtype = VARIANTS[variant]
    leaves, options = build({**sizes, "T": 111, "N": 111, **change}, dtype, "cuda")
    assert_equals_dense(run(entmax_attention, leaves, options), leaves, options)


# Each with an alpha or a scale that the others do not have.
HEAD_DIMS: dict[str, dict[str, Any]] = {
    "16": {"D": 16, "V": 16, "alpha": 2.0},
    "80": {"D": 80, "V": 80, "scale": 1},
    "96_and_64": {"D": 96, "V": 64, "alpha": 1.3},
    "128": {"D": 128, "V": 128},
    "256": {"D": 256, "V": 256},
}


@pytest.mark.parametrize("dims", HEAD_DIMS)
@pytest.mark.parametrize("keys", [60, 120, 1000])
@pytest.mark.usefixtures("nan_in_empty")
def test_kernels_gpu_equal_the_reference_at_every_head_dim(keys: int, dims: str) -> None:
    leaves, options = build({**HEAD_DIMS[dims], "H": 4, "K": 1, "T": keys * 3 // 5, "N": keys}, torch.bfloat16, "cuda")
    assert_equals_reference(run(entmax_attention, leaves, options), leaves, options)


@pytest.mark.usefixtures("nan_in_empty")
def test_kernels_gpu_in_float16_equal_the_reference() -> None:
    leaves, options = build({"D": 16, "V": 16, "T": 1000, "N": 1000}, torch.float16, "cuda")
    assert_equals_reference(run(entmax_attention, leaves, options), leaves, options)


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_kernels_gpu_equal_the_reference_for_groups_of_heads(groups: int) -> None:
    leaves, options = build({**PLAIN, "B": 2, "H": 8, "K": 8 // groups, "T": 1000, "N": 1000}, torch.bfloat16, "cuda")
    assert_equals_reference(run(entmax_attention, leaves, options), leaves, options)


@pytest.mark.parametrize("variant", ["biased", "everything_float32"])
def test_kernels_gpu_equal_the_reference_at_a_scale_of_8(variant: str) -> None:
    sizes, dtype = VARIANTS[variant]
    leaves, options = build({**sizes, "T": 1000, "N": 1000}, dtype, "cuda")
    leaves["query_scale"].detach().fill_(8.0)
    assert_equals_reference(run(entmax_attention, leaves, options), leaves, options)


def test_kernels_gpu_of_one_query_against_70000_keys_equal_the_reference() -> None:
    leaves, options = build({**PLAIN, "H": 8, "K": 2, "T": 1, "N": 70_001}, torch.bfloat16, "cuda")
    assert_equals_reference(run(entmax_attention, leaves, options), leaves, options)


@pytest.mark.parametrize("variant", ["plain", "float32"])
@pytest.mark.parametrize("length", [64, 1000])
def test_kernels_gpu_weights_have_mass_1_and_the_exact_support(length: int, variant: str) -> None:
    sizes, dtype = VARIANTS[variant]
    leaves, options = build({**sizes, "T": length, "N": length}, dtype, "cuda")
    columns = []
    for start in range(0, length, 64):  # the identity, 64 of its columns at a time
        value = torch.eye(length, 64, dtype=dtype, device="cuda").roll(start, 0)
        value[:start] = 0
        inputs = {**leaves, "value": value.expand(1, 1, -1, -1).contiguous().requires_grad_()}
        columns.append(entmax_attention(**inputs, **options).detach())
    assert_weights_are_right(torch.cat(columns, -1)[..., :length], leaves, options)


@pytest.mark.parametrize("variant", ["plain", "everything", "float32"])
def test_kernels_gpu_give_nan_for_a_nan_query_alone(variant: str) -> None:
    sizes, dtype = VARIANTS[variant]
    leaves, options = build({**sizes, "T": 200, "N": 200}, dtype, "cuda")
    expected = entmax_attention(**leaves, **options)
    leaves["query"].detach()[0, 1, 70, 3] = torch.nan
    out = entmax_attention(**leaves, **options)
    assert out[0, 1, 70].isnan().all()
    expected.detach()[0, 1, 70] = out.detach()[0, 1, 70] = 0
    assert (out - expected).abs().max() <= 0.02


def test_kernels_gpu_keep_mass_1_over_many_identical_keys() -> None:
    query, key = torch.randn(1, 2, 100, 64, device="cuda"), torch.randn(1, 1, 1, 64, device="cuda")
    keys = key.expand(-1, -1, 20_000, -1).bfloat16()
    out = entmax_attention(query.bfloat16(), keys, torch.ones_like(keys))
    assert (out - 1).abs().max() <= 2**-8


def bench_inputs() -> tuple[dict[str, Tensor], Tensor]:
    """Query, key and value as the benchmark makes them, and a gradient of the output."""
    case = Case("test", 2, 4, 4, 2048, 64, 0.5)
    *tensors, grad = make_inputs(case, seed=0, device=torch.device("cuda"))
    return {name: x.requires_grad_() for name, x in zip(("query", "key", "value"), tensors, strict=True)}, grad


def test_kernels_gpu_errors_on_the_inputs_of_the_benchmark_are_bounded() -> None:
    leaves, grad = bench_inputs()
    errors = relative_errors(
        run(entmax_attention, leaves, {}, grad), run(entmax_attention, *exact(leaves, {}, "cuda"), grad)
    )
    assert all(error <= BENCHMARK[name] for name, error in errors.items()), errors


if find_spec("adasplash") is not None:

    def test_kernels_gpu_errors_are_those_of_adasplash() -> None:
        from adasplash import adasplash_v2

        def theirs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out: Tensor = adasplash_v2(query, key, value, niter=1)
            return out

        leaves, grad = bench_inputs()
        expected = run(entmax_attention, *exact(leaves, {}, "cuda"), grad)
        ours = relative_errors(run(entmax_attention, leaves, {}, grad), expected)
        adasplash = relative_errors(run(theirs, leaves, {}, grad), expected)
        assert all(error <= 1.2 * adasplash[name] for name, error in ours.items()), (ours, adasplash)


# Everything beside the numbers


@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(8, 2, 1000), (2, 1, 4096)])
def test_kernels_gpu_give_the_same_bits_20_times(heads: int, kv_heads: int, length: int) -> None:
    sizes = {**EVERYTHING, "B": 2, "H": heads, "K": kv_heads, "T": length, "N": length}
    leaves, options = build(sizes, torch.bfloat16, "cuda")
    first = run(entmax_attention, leaves, options)
    for _ in range(19):
        assert_same_bits(run(entmax_attention, leaves, options), first)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that Triton compiles from here on."""
    import triton

    names: list[str] = []

    def note(*_: Any, fn: Any, **__: Any) -> None:
        names.append(fn.name)

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    return names


def test_kernels_gpu_do_not_compile_again_for_another_alpha_or_length(compilations: list[str]) -> None:
    for length in (40, 1000):  # few keys have a kernel of their own
        run(entmax_attention, *build({**EVERYTHING, "T": length, "N": length}, torch.bfloat16, "cuda"))
    compilations.clear()
    for alpha, length in ((1.1, 1000), (1.5, 1001), (2.0, 1024), (1.3, 2048), (1.3, 63), (1.3, 64), (1.3, 1)):
        run(
            entmax_attention,
            *build({**EVERYTHING, "alpha": (alpha,), "T": length, "N": length}, torch.bfloat16, "cuda"),
        )
    assert compilations == []


def test_kernels_gpu_do_not_compile_again_for_a_longer_cache(compilations: list[str]) -> None:
    def decode(keys: int) -> None:
        leaves, options = build({**PLAIN, "H": 8, "K": 2, "T": 1, "N": keys}, torch.bfloat16, "cuda")
        with torch.no_grad():
            entmax_attention(**leaves, **options)

    decode(100)
    decode(1000)  # from four tiles on other kernels serve it
    compilations.clear()
    for keys in (1, 17, 64, 128, 1000, 1024, 2048, 2049, 4096, 32_768, 32_769):
        decode(keys)
    assert compilations == []


def test_kernels_gpu_compiled_with_inductor_give_the_bits_of_eager() -> None:
    torch._dynamo.reset()
    case = {**EVERYTHING, "K": 2, "T": 100, "N": 120, "layout": ("transposed",)}
    leaves, options = build(case, torch.bfloat16, "cuda")

    def layer(**inputs: Any) -> Tensor:  # what stands before and after is compiled with it
        inputs["query"], inputs["query_scale"] = inputs["query"] * 2.0, inputs["query_scale"] * 0.5
        return entmax_attention(**inputs) * 2.0

    compiled = torch.compile(layer, fullgraph=True)
    assert_same_bits(run(compiled, leaves, options), run(layer, leaves, options))


@pytest.mark.parametrize(("queries", "keys"), [(100, 100), (1, 500)])
def test_kernels_gpu_replay_in_a_cuda_graph(queries: int, keys: int) -> None:
    inputs, others = (build({**BIASED, "T": queries, "N": keys}, torch.bfloat16, "cuda")[0] for _ in range(2))
    options = {"alibi_slopes": torch.tensor([0.0, 0.05], device="cuda")}
    with torch.no_grad():
        expected = [entmax_attention(**x, **options) for x in (inputs, others)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            entmax_attention(**inputs, **options)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = entmax_attention(**inputs, **options)
        for _ in range(3):
            graph.replay()
            assert torch.equal(out, expected[0])
        for name, x in inputs.items():
            x.copy_(others[name])
        graph.replay()
        assert torch.equal(out, expected[1])


@pytest.fixture
def no_synchronisation() -> Iterator[Callable[[], None]]:
    """A function from whose call on each wait for the GPU raises."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("sizes", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_kernels_gpu_never_wait_for_the_gpu(sizes: dict[str, Any], no_synchronisation: Callable[[], None]) -> None:
    case = {**sizes, "B": 2, "T": 100, "N": 100, "window": 30, "key_start": torch.tensor([0, 7])}
    leaves, options = build(case, torch.bfloat16, "cuda")
    weight = torch.randn(2, 2, 100, 64, device="cuda").bfloat16()
    expected = run(entmax_attention, leaves, options, weight)
    no_synchronisation()
    again = run(entmax_attention, leaves, options, weight)
    torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(again, expected)


def test_kernels_gpu_need_no_more_memory_than_flash_attention() -> None:
    leaves, _ = build({**PLAIN, "H": 8, "K": 8, "T": 32_768, "N": 32_768}, torch.bfloat16, "cuda")
    weight = torch.randn_like(leaves["query"])
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run(entmax_attention, leaves, {}, weight)
    results = sum(x.nbytes for x in result.values())
    assert torch.cuda.max_memory_allocated() - before - results <= 258 * 2**20
    del result
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        out = entmax_attention(**leaves)
    assert torch.cuda.max_memory_allocated() - before - out.nbytes <= 64 * 2**20


def test_kernels_gpu_refuse_a_head_dim_of_257() -> None:
    x = torch.zeros(1, 1, 3, 257, device="cuda")
    with pytest.raises(ValueError, match="head dim of query must be at most 256 .*got 257"):
        entmax_attention(x, x, x)


# Models


def count_calls(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[None]:
    """Grows by one with each call of a module's function."""
    calls: list[None] = []
    function = getattr(module, name)

    def counted(*arguments: Any) -> Any:
        calls.append(None)
        return function(*arguments)

    monkeypatch.setattr(module, name, counted)
    return calls


@pytest.mark.parametrize("positions", ["rope", "nape"])
def test_kernels_gpu_train_a_model(positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_asentmax.ops import triton_backward, triton_forward

    forwards = count_calls(monkeypatch, triton_forward, "kernel_forward")
    backwards = count_calls(monkeypatch, triton_backward, "kernel_backward")
    model = patch_model(tiny_model("llama", head_dim=16), positions=positions, alpha_learned=True)
    tokens = random_tokens(2, 70)
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**batch).loss.backward()
        return {name: x.grad.cpu().clone() for name, x in model.named_parameters() if x.grad is not None}

    expected = gradients()
    assert forwards == backwards == []
    model.cuda()
    batch = {name: x.cuda() for name, x in batch.items()}
    for name, x in gradients().items():
        torch.testing.assert_close(x, expected[name], rtol=2e-3, atol=2e-5)
    assert len(forwards) == len(backwards) == 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(x.isfinite().all() for x in model.parameters())
    assert losses[-1] < 0.7 * losses[0]


def test_kernels_gpu_serve_a_checkpoint_by_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(tiny_model("llama", head_dim=16), positions="nape", alpha_learned=True).eval()
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    theirs = get_class_from_dynamic_module("modeling_asentmax_llama.ASEntmaxLlamaForCausalLM", str(folder))
    assert theirs is not type(model)
    loaded = theirs.from_pretrained(folder).eval().cuda()
    code = sys.modules[theirs.__module__]
    calls = count_calls(monkeypatch, code, "kernel_forward")
    tokens = random_tokens(2, 70)
    with torch.no_grad():
        expected = model.cuda()(tokens.cuda()).logits
        assert calls == []
        logits = loaded(tokens.cuda()).logits
    assert len(calls) == 2
    assert torch.equal(logits, expected)
