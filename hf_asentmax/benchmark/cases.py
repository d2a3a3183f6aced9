"""One case of the benchmark: checks every implementation, then times those that are right, in turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from .implementations import Attention, Expected, Implementation, Inputs, expected_results, relative_errors, verdict
from .inputs import Case, make_inputs, measure_support
from .timing import graph_times, make_passes, memory, sample, summary, wall_times

ROUNDS = 3  # turns of all implementations, so that a drift of the clock meets all of them
SLOW, SHORT = 100.0, 1.0  # ms: one turn is enough; launches matter


def benchmark_case(
    case: Case,
    implementations: Sequence[Implementation],
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    compile_only: bool = False,
) -> list[dict[str, Any]]:
    """Check and time implementations on the same inputs.

    Args:
        case: sizes and inputs.
        implementations: in the order in which they take turns.
        seed: of the inputs.
        device, dtype: of the inputs.
        compile_only: stop after the check; the first calls fill the caches of compiled kernels.

    Returns:
        A row each. ``status`` is "ok", or begins with "wrong", "failed" or "left out"; only an "ok" row has times.
    """
    inputs = Inputs(*make_inputs(case, seed=seed, device=device, dtype=dtype))
    slopes = case.slopes(device)
    support = measure_support(inputs.query, inputs.key, alibi_slopes=slopes)
    expected: dict[str, Expected] = {}
    rows, running = [], []
    for implementation in implementations:
        row: dict[str, Any] = {
            "case": case.name,
            "implementation": implementation.name,
            "computes": implementation.computes,
            "settings": asdict(case),
            "support": asdict(support),
        }
        rows.append(row)
        if reason := implementation.obstacle(case):
            row["status"] = f"left out: {reason}"
            continue
        if implementation.computes not in expected:
            expected[implementation.computes] = expected_results(inputs, slopes, implementation.computes)
        try:
            with implementation.context():
                attention = implementation.build(case, device)
                row |= _first_call(attention, inputs, expected[implementation.computes])
                row["status"] = verdict(row["errors"]) or "ok"
                if row["status"] == "ok":
                    passes = make_passes(attention, inputs)
                    passes.forward()
                    if device.type == "cuda":
                        row |= memory(attention, inputs)
                    if not compile_only:
                        running.append((implementation, passes, row))
        except Exception as error:  # whatever a peer raises, from assert to the compiler, is its result
            row["status"] = failure(error)
        _release(device)
    del expected
    _release(device)
    _time_in_turns(running, device)
    return rows


def _first_call(attention: Attention, inputs: Inputs, expected: Expected) -> dict[str, Any]:
    """Seconds of the first forward and backward pass, compilation included, and the errors of its results."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    start = time.perf_counter()
    out = attention(*leaves)
    grads = torch.autograd.grad(out, leaves, inputs.grad)
    if out.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    found = {"output": out.detach()} | dict(zip(("dq", "dk", "dv"), grads, strict=True))
    return {"first_call_s": seconds, "errors": relative_errors(found, expected)}


def _time_in_turns(running: list[tuple[Implementation, Any, dict[str, Any]]], device: torch.device) -> None:
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(ROUNDS):
        for implementation, passes, row in running:
            if row["status"] != "ok":
                continue
            try:
                with implementation.context():
                    for name, function in passes._asdict().items():
                        own = times.setdefault((implementation.name, name), [])
                        if not turn or own[0] < SLOW:
                            own += sample(function, device)
                        row[name] = summary(own)
                        if turn == ROUNDS - 1 and device.type == "cuda" and row[name]["median"] < SHORT:
                            row[name]["wall"] = summary(wall_times(function))
                            row[name] |= _graph(function, device, name)
            except Exception as error:  # as above
                row["status"] = failure(error)


def _graph(function: Any, device: torch.device, name: str) -> dict[str, Any]:
    if name == "backward":  # of a forward pass that ran outside the graph's stream
        return {}
    try:
        return {"graph": summary(graph_times(function, device))}
    except Exception as error:  # a peer that a graph can't capture is timed without one
        torch.cuda.synchronize()
        return {"graph": None, "graph_failure": failure(error)}


def failure(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}: {lines[0][:200] if lines else ''}"


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
