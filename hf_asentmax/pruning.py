"""Cut the attention heads that a model does not need, which may do harm beyond its training length."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


@torch.no_grad()
def prune_heads(model: nn.Module, loss: Callable[[], float], *, tolerance: float) -> dict[str, list[int]]:
    """Zero the output of every head that a loss can do without; the model keeps its shape.

    A head that learned nothing stays near its initial weights: nothing in training removes it. On longer sequences it
    meets keys that training never showed, and what it then writes may blur what the others read. Heads are tried one
    after the other, those of the smallest output weights first, and stay cut while
    ``loss() <= loss of the whole model + tolerance``; so one that does what another does too goes, and the other stays.

    Args:
        model: a causal language model whose attention modules have ``o_proj`` and ``head_dim``, as Transformers' have.
        loss: evaluates the model, always on the same data: of the lengths that it was trained on, and enough of them
            to hold what is rare. Called once for each head, and once before.
        tolerance: by how much the loss may rise in all, in its own unit.

    Returns:
        The heads cut, by the name of their attention module.

    Raises:
        ValueError: a tolerance below zero, a loss that is not finite, or no attention to prune. After any error, that
            of the loss too, the model is as it was.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance!r}; 0 cuts only what costs nothing")
    heads: list[tuple[float, str, int, Tensor, Tensor]] = []
    for name, module in model.named_modules():
        output, size = getattr(module, "o_proj", None), getattr(module, "head_dim", None)
        if isinstance(output, nn.Linear) and isinstance(size, int):
            parts = output.weight.split(size, dim=1)
            heads += [(part.norm().item(), name, head, part, part.clone()) for head, part in enumerate(parts)]
    if not heads:
        raise ValueError(
            f"model must have attention modules with o_proj and head_dim, got {type(model).__name__} without one; "
            "give the language model itself"
        )
    limit = loss() + tolerance
    if not math.isfinite(limit):
        raise ValueError(f"loss and tolerance must be finite, got a limit of {limit}; nothing could be told by it")
    cut: dict[str, list[int]] = {}
    try:
        for _, name, head, part, before in sorted(heads, key=lambda entry: entry[0]):
            part.zero_()
            if loss() <= limit:
                cut.setdefault(name, []).append(head)
            else:
                part.copy_(before)
    except BaseException:  # interrupted: the model as it was
        for *_, part, before in heads:
            part.copy_(before)
        raise
    return {name: sorted(cut[name]) for name in sorted(cut)}
