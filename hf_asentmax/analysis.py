"""What the attention of a model does: how many keys its queries use, how many it leaves out, how far it spreads.

It sees what each layer's attention is given in a normal forward pass, and computes the exact weights of some queries at
a time, never T x T of them: any length will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import ASEntmaxMixin
from .ops import reference

BLOCK = 64  # tokens: the tile in which block sparsity is counted
# Weights held at once by attention_statistics, a handful of such buffers alive; at least those of one query. On the CPU
# below the 32 MiB from which glibc maps each buffer anew: 1.5 to 2 times as fast with 12 heads at 16,384 tokens.
_CHUNK_WEIGHTS = {"cpu": 1 << 22, "cuda": 1 << 27}


@contextmanager
def observed(model: nn.Module, observer: Callable[..., None]) -> Iterator[None]:
    """While entered, ``observer(layer, *inputs)`` is called with what each attention of the model computes from.

    The inputs are the arguments of :func:`hf_asentmax.ops.reference.attention_weights`, in its order, so that
    ``attention_weights(*inputs)`` is the attention map. Layers are numbered in the order of ``model.modules()``.

    Raises:
        RuntimeError: the model has no ASEntmax attention.
    """
    layers = [module for module in model.modules() if isinstance(module, ASEntmaxMixin)]
    if not layers:
        raise RuntimeError(
            f"{type(model).__name__} must give attention weights, got no ASEntmax attention, which does; "
            'patch_model(model, method="softmax") leaves a softmax model what it is and can be looked into'
        )
    for number, layer in enumerate(layers):
        layer.observer = partial(observer, number)
    try:
        yield
    finally:
        for layer in layers:
            del layer.observer


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients and eval mode; the modes are left as they were."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class LayerStatistics:
    """One layer's attention to T tokens, by query and head. Numbers of queries that see no key mean nothing.

    Attributes:
        n: int64 (B, T), keys that the query may see; 0 for padding.
        support: int64 (B, H, T), keys with a weight above zero. (Softmax weights below 1e-45 are zero in float32.)
        entropy: float32 (B, H, T), normalised: ``H(p) / log n``, 1 where all n weights are equal; NaN for n < 2.
        largest: float32 (B, H, T), the largest weight.
        block_sparsity: float32 (B, H), share of the visible 64 x 64 blocks in which every weight is exactly zero.
        query_scale: float32 (B, H, T), the factor r of the scores; 1 where there is none.
        alpha: float32 (B, H), 1 for softmax and what is made of it.
    """

    n: Tensor
    support: Tensor
    entropy: Tensor
    largest: Tensor
    block_sparsity: Tensor
    query_scale: Tensor
    alpha: Tensor


def join_statistics(parts: Sequence[LayerStatistics]) -> LayerStatistics:
    """The statistics of several batches of the same length as those of one."""
    names = [field.name for field in fields(LayerStatistics)]
    return LayerStatistics(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def attention_statistics(
    model: nn.Module,
    input_ids: Tensor,
    *,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    progress: Callable[[], object] | None = None,
) -> list[LayerStatistics]:
    """Look into one forward pass of a model, in eval mode, whatever its method: entmax, top-k, softmax.

    The weights are those of ``output_attentions=True``, computed for as many queries at a time as fit into a few
    buffers of some MiB (CPU) or 512 MiB (GPU).

    Args:
        model: an ASEntmax model; a softmax model after ``patch_model(model, method="softmax")``.
        input_ids: tokens, shape (B, T), int64.
        position_ids: positions, shape (B, T), int64; where they restart, a document begins.
        attention_mask: 1 for tokens and 0 for padding, shape (B, T).
        progress: called after each layer.

    Returns:
        One entry a layer, on the CPU.

    Raises:
        RuntimeError: the model has no ASEntmax attention.
    """
    found: dict[int, LayerStatistics] = {}

    def observe(layer: int, *inputs: Any) -> None:
        found[layer] = _call_statistics(*inputs, real=attention_mask)
        if progress is not None:
            progress()

    given = {"position_ids": position_ids, "attention_mask": attention_mask}
    with _evaluating(model), observed(model, observe):
        base = getattr(model, "base_model", model)
        base(input_ids=input_ids, use_cache=False, **{name: x for name, x in given.items() if x is not None})
    return [found[layer] for layer in sorted(found)]


def attention_maps(
    model: nn.Module, input_ids: Tensor, heads: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], Tensor]:
    """The whole maps of some heads, float32 (T, T) on the CPU, for a picture.

    Args:
        model: as for :func:`attention_statistics`.
        input_ids: tokens of one sequence, shape (1, T), int64.
        heads: (layer, head), both from 0.
    """
    found: dict[int, Tensor] = {}

    def observe(layer: int, *inputs: Any) -> None:
        if layer in {number for number, _ in heads}:
            found[layer] = reference.attention_weights(*inputs)[0].float().cpu()

    with _evaluating(model), observed(model, observe):
        getattr(model, "base_model", model)(input_ids=input_ids, use_cache=False)
    return {(layer, head): found[layer][head] for layer, head in heads}


def _call_statistics(
    query: Tensor,
    key: Tensor,
    first: Tensor,
    last: Tensor,
    query_scale: Tensor | None,
    alibi_slopes: Tensor | None,
    weights: reference.Alpha | Callable[[Tensor], Tensor],
    scaling: float,
    *,
    real: Tensor | None = None,
) -> LayerStatistics:
    """The statistics of one call of the attention; real: 1 for queries that are not padding, (B, T)."""
    batch, heads, tokens, _ = query.shape
    n = (last - first).clamp(min=0).long().expand(batch, -1)
    if real is not None:
        n = n * real.to(n)
    support = n.new_zeros(batch, heads, tokens)
    entropy = torch.full((batch, heads, tokens), torch.nan, device=query.device)
    largest = torch.zeros_like(entropy)
    blocks = -(-tokens // BLOCK), -(-key.shape[2] // BLOCK)
    filled = torch.zeros(batch, heads, *blocks, dtype=torch.bool, device=query.device)
    visible = torch.zeros(batch, 1, *blocks, dtype=torch.bool, device=query.device)
    most = _CHUNK_WEIGHTS.get(query.device.type, 1 << 24)
    step = max(1, most // (batch * heads * tokens))
    step = step // BLOCK * BLOCK or 1 << (step.bit_length() - 1)  # whole blocks of rows, or a block in whole steps
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        low, high = int(first[:, rows].min()) // BLOCK * BLOCK, int(last[:, rows].max())
        if low >= high:
            continue
        begins, ends = first[:, rows] - low, last[:, rows] - low
        scale = None if query_scale is None else query_scale[:, :, rows]
        p = reference.attention_weights(
            query[:, :, rows], key[:, :, low:high], begins, ends, scale, alibi_slopes, weights, scaling
        )
        p *= (n[:, rows] > 0)[:, None, :, None]
        used = p > 0
        support[:, :, rows] = used.sum(-1)
        largest[:, :, rows] = p.amax(-1)
        entropy[:, :, rows] = torch.special.entr(p).sum(-1) / n[:, None, rows].log()
        block = torch.arange(0, high - low, BLOCK, device=query.device)
        tiles = ..., slice(start // BLOCK, -(-(start + step) // BLOCK)), slice(low // BLOCK, low // BLOCK + len(block))
        seen = (begins[..., None] < block + BLOCK) & (ends[..., None] > block) & (n[:, rows] > 0)[..., None]
        visible[tiles] |= _row_blocks(seen[:, None])
        columns = F.pad(used, (0, -used.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK)).any(-1)
        filled[tiles] |= _row_blocks(columns)
    alpha = torch.as_tensor(1.0 if callable(weights) else weights, dtype=torch.float32).cpu()
    scale = torch.ones_like(entropy) if query_scale is None else query_scale.float()
    return LayerStatistics(
        n=n.cpu(),
        support=support.cpu(),
        entropy=entropy.masked_fill(n[:, None] < 2, torch.nan).cpu(),
        largest=largest.cpu(),
        block_sparsity=(1 - filled.sum((-1, -2)) / visible.sum((-1, -2))).cpu(),
        query_scale=scale.cpu(),
        alpha=alpha.flatten().expand(batch, heads),
    )


def _row_blocks(x: Tensor) -> Tensor:
    """Whether any of each 64 rows is true: (..., rows, columns) -> (..., rows / 64, columns), bool."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % BLOCK)).unflatten(-2, (-1, BLOCK)).any(-2)


def head_rows(layers: Sequence[LayerStatistics], final: Tensor | None = None) -> list[dict[str, Any]]:
    """The statistics as one row a layer and head.

    Args:
        layers: what :func:`attention_statistics` returns.
        final: bool (B, T), the queries whose task it is to find something, such as those that predict an answer; all
            by default.

    Returns:
        layer and head (from 0), alpha, block_sparsity; support_size (keys a query, over all queries) and zero_share
        (of all visible pairs); over the final queries final_n (visible keys), final_support, final_entropy,
        final_largest and final_scale (r).
    """
    rows = []
    for number, layer in enumerate(layers):
        every = layer.n > 0
        chosen = every if final is None else every & final.to(every)
        for head in range(layer.support.shape[1]):
            support = layer.support[:, head]
            row: dict[str, Any] = {
                "layer": number,
                "head": head,
                "alpha": layer.alpha[:, head].mean(),
                "block_sparsity": layer.block_sparsity[:, head].nanmean(),
                "support_size": support[every].double().mean(),
                "zero_share": 1 - support[every].sum() / layer.n[every].sum(),
                "final_n": layer.n[chosen].double().mean(),
                "final_support": support[chosen].double().mean(),
                "final_entropy": layer.entropy[:, head][chosen].nanmean(),
                "final_largest": layer.largest[:, head][chosen].mean(),
                "final_scale": layer.query_scale[:, head][chosen].mean(),
            }
            rows.append({name: x if isinstance(x, int) else float(x) for name, x in row.items()})
    return rows


@dataclass(frozen=True)
class AttentionSupport:
    """Support statistics of one forward pass, one number a layer, averaged over heads and queries.

    Attributes:
        support_size: keys with a weight above zero per query, in tokens.
        zero_share: share of the (query, key) pairs, among the keys that a query may see, whose weight is exactly zero.
    """

    support_size: tuple[float, ...]
    zero_share: tuple[float, ...]

    def means(self) -> dict[str, float]:
        """Both numbers averaged over the layers, as a Trainer logs them."""
        return {"support_size": fmean(self.support_size), "zero_share": fmean(self.zero_share)}


def attention_support(
    model: nn.Module,
    input_ids: Tensor,
    *,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> AttentionSupport:
    """Count the keys that the queries of each layer attend to, from the exact attention weights.

    The model is run in eval mode and left as it was; softmax has a support of all visible keys, but for weights too
    small for its dtype. The arguments and what is raised: as for :func:`attention_statistics`.
    """
    layers = attention_statistics(model, input_ids, position_ids=position_ids, attention_mask=attention_mask)
    sizes, shares = [], []
    for layer in layers:
        used = layer.support.double().mean(1)[layer.n > 0]
        sizes.append(used.mean().item())
        shares.append(1 - used.sum().item() / layer.n.sum().item())
    return AttentionSupport(tuple(sizes), tuple(shares))
