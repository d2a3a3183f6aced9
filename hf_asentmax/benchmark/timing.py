"""Times and memory of one function: medians of many runs, each from a cold second-level cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import NamedTuple

import torch
from torch import Tensor

from .implementations import Attention, Inputs

MIB = 1 << 20
WARMUP, REPEAT = 10, 60  # ms of runs a round, as `do_bench` takes them


class Passes(NamedTuple):
    """What is timed, by name; each function takes nothing and gives nothing."""

    forward: Callable[[], object]  # no gradient asked for
    backward: Callable[[], object]  # alone, of one forward pass that is kept
    forward_backward: Callable[[], object]


def make_passes(attention: Attention, inputs: Inputs) -> Passes:
    """The three passes of an implementation; runs it once forward, with gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = attention(*leaves)

    @torch.no_grad()
    def forward() -> Tensor:
        return attention(*inputs[:3])

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, inputs.grad, retain_graph=True)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(*leaves), leaves, inputs.grad)

    return Passes(forward, backward, forward_backward)


def sample(function: Callable[[], object], device: torch.device) -> list[float]:
    """Times of one round of runs in ms: by `triton.testing.do_bench` on a GPU (events; it writes over the cache
    before each run), by the host's clock on a CPU."""
    if device.type == "cuda":
        from triton.testing import do_bench

        times: list[float] = do_bench(function, warmup=WARMUP, rep=REPEAT, return_mode="all")
        return times
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median and the 10 and 90 % quantiles, in ms."""
    if len(times) < 2:
        return {"median": times[0], "low": times[0], "high": times[0]}
    tenths = quantiles(times, n=10, method="inclusive")
    return {"median": median(times), "low": tenths[0], "high": tenths[-1]}


def wall_times(function: Callable[[], object], *, batches: int = 5, seconds: float = 0.05) -> list[float]:
    """ms a call by the host's clock, launches included and the cache warm, in batches of calls without a wait between
    them: what a short call costs in an eager program."""
    torch.cuda.synchronize()
    times: list[float] = []
    calls = 10
    for batch in range(batches + 1):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
        each = (time.perf_counter() - start) / calls
        if batch:
            times.append(1e3 * each)
        else:
            calls = max(10, int(seconds / each))
    return times


def graph_times(function: Callable[[], object], device: torch.device) -> list[float]:
    """As :func:`sample` of the function captured as a CUDA graph: the GPU's own time, without launches by the host.

    Raises:
        RuntimeError: it can't be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            function()
    except Exception:
        # A capture that fails leaves the allocator within it, where it returns no memory to the device.
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise
    return sample(graph.replay, device)


def memory(attention: Attention, inputs: Inputs) -> dict[str, float]:
    """MiB of GPU memory that one forward and backward pass takes beside query, key, value and the output's gradient.

    Returns:
        peak_mib: the most at any time, the output and the three gradients included.
        results_mib: those alone.
        state_mib: what is kept from forward to backward beside inputs and output.
    """
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attention(*leaves)
    kept = torch.cuda.memory_allocated() - before - out.nbytes
    grads = torch.autograd.grad(out, leaves, inputs.grad)
    torch.cuda.synchronize()
    return {
        "peak_mib": (torch.cuda.max_memory_allocated() - before) / MIB,
        "results_mib": sum(x.nbytes for x in (out, *grads)) / MIB,
        "state_mib": kept / MIB,
    }
