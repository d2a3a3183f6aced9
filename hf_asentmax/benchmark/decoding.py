"""Time of the attention of one decoding step: one query of each head against a cache of keys and values.

The inputs are those of :mod:`hf_asentmax.benchmark.inputs`, of which the last token asks, with as few topics in support
as there can be, up to 1 % of the blocks for each query head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import reference
from ..ops.attention import entmax_attention
from .cases import ROUNDS, failure
from .implementations import ALPHA, Implementation, verdict
from .inputs import BLOCK, Case, make_inputs
from .timing import graph_times, sample, summary, wall_times

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SPARSITY = 0.99  # of a query head's blocks, where there are so many

_Running = tuple[Implementation, Callable[[], Tensor], dict[str, Any]]


@dataclass(frozen=True)
class DecodeCase:
    """One point: ``batch`` sequences with ``keys`` in the cache, ``ragged`` where they are padded on the left, by up to
    half of it."""

    batch: int
    keys: int
    ragged: bool = False

    @property
    def name(self) -> str:
        return f"decode_{self.batch}x{self.keys}{'_ragged' if self.ragged else ''}"

    @property
    def inputs(self) -> Case:
        """The case of which the last token asks."""
        most = 1 - 2 / (math.ceil(self.keys / BLOCK) + 1)
        return Case(self.name, self.batch, HEADS, KV_HEADS, self.keys, HEAD_DIM, min(SPARSITY, most))

    def key_start(self, device: torch.device) -> Tensor | None:
        """The first key of each sequence, (B,), or None."""
        return torch.linspace(0, self.keys // 2, self.batch, device=device).long() if self.ragged else None


def benchmark_decoding(
    case: DecodeCase,
    implementations: Sequence[Implementation],
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> list[dict[str, Any]]:
    """Check and time one decoding step by several implementations on the same inputs.

    Args:
        case: batch and length of the cache.
        implementations: in the order in which they take turns; those of softmax with SDPA, and ours.
        seed: of the inputs.
        device, dtype: of the inputs.

    Returns:
        A row each: ``support``, the share of the visible 64-key blocks of values in which some query head of the group
        has a weight; ``status``, "ok", or begins with "wrong", "failed" or "left out"; of an "ok" one ``error`` and
        ``wall``, ms a call by the host's clock, and on a GPU ``graph``, ms replayed as a CUDA graph.
    """
    query, key, value, _ = make_inputs(case.inputs, seed=seed, device=device, dtype=dtype, queries=1)
    start = case.key_start(device)
    expected = {name: _expected(query, key, value, start, alpha) for name, alpha in ALPHA.items()}
    rows: list[dict[str, Any]] = []
    running: list[_Running] = []
    for implementation in implementations:
        row: dict[str, Any] = {"case": case.name, "implementation": implementation.name, "settings": asdict(case)}
        row["support"] = expected["entmax"][1]
        rows.append(row)
        if reason := _obstacle(implementation, case):
            row["status"] = f"left out: {reason}"
            continue
        function = _step(implementation, query, key, value, start)
        try:
            with torch.no_grad(), implementation.context():
                found, right = function().double(), expected[implementation.computes][0]
        except Exception as error:  # whatever a peer raises is its result
            row["status"] = failure(error)
            continue
        row["error"] = ((found - right).norm() / right.norm()).item()
        row["status"] = verdict({"output": row["error"]}) or "ok"
        if row["status"] == "ok":
            running.append((implementation, function, row))
    _time_in_turns(running, device)
    return rows


def _obstacle(implementation: Implementation, case: DecodeCase) -> str | None:
    if implementation.name != "asentmax" and not implementation.name.startswith("sdpa"):
        return "its decoding is not timed here"
    return "takes no padding" if case.ragged and implementation.name == "sdpa_flash" else None


def _step(
    implementation: Implementation, query: Tensor, key: Tensor, value: Tensor, start: Tensor | None
) -> Callable[[], Tensor]:
    if implementation.computes == "entmax":
        return partial(entmax_attention, query, key, value, alpha=ALPHA["entmax"], key_start=start)
    seen = None if start is None else (torch.arange(key.shape[2], device=key.device) >= start[:, None])[:, None, None]
    return partial(F.scaled_dot_product_attention, query, key, value, attn_mask=seen, enable_gqa=True)


def _expected(query: Tensor, key: Tensor, value: Tensor, start: Tensor | None, alpha: float) -> tuple[Tensor, float]:
    """The output (B, H, 1, D) in float64, and the share of visible blocks of values with a weight."""
    batch, heads, _, dim = query.shape
    kv_heads, tokens = key.shape[1:3]
    out, filled, visible = torch.empty_like(query, dtype=torch.float64), 0, 0
    for row in range(batch):
        first = 0 if start is None else int(start[row])
        for head in range(kv_heads):
            own = slice(head * heads // kv_heads, (head + 1) * heads // kv_heads)
            scores = query[row, own, 0].double() @ key[row, head, first:].double().T * dim**-0.5
            weights = reference.entmax_forward(scores, alpha)
            out[row, own, 0] = weights @ value[row, head, first:].double()
            blocks = F.pad((weights > 0).any(0), (first % BLOCK, -tokens % BLOCK)).unflatten(0, (-1, BLOCK)).any(1)
            filled, visible = filled + int(blocks.sum()), visible + len(blocks)
    return out, filled / visible


@torch.no_grad()
def _time_in_turns(running: list[_Running], device: torch.device) -> None:
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS):
        for implementation, function, row in running:
            if row["status"] != "ok":
                continue
            try:
                with implementation.context():
                    if device.type == "cuda":
                        found = {"graph": graph_times(function, device), "wall": wall_times(function)}
                    else:
                        found = {"wall": sample(function, device)}
            except Exception as error:  # as above
                row["status"] = failure(error)
                continue
            for name, new in found.items():
                own = times.setdefault((implementation.name, name), [])
                own += new
                row[name] = summary(own)
