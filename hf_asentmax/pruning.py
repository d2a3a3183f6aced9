"""Cut the attention heads that a model does not need, before they do harm beyond its training length."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


@torch.no_grad()
def prune_heads(model: nn.Module, loss: Callable[[], float], *, tolerance: float) -> dict[str, list[int]]:
    """Zero the output of every head that a loss can do without; the model keeps its shape.

    A head that learned nothing stays near its initial weights: nothing in training removes it. On longer sequences it
    meets keys that training never showed, and what it then writes blurs what the others read. The heads are tried one
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
        ValueError: a tolerance below zero, or no attention to prune.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance!r}; 0 cuts only what costs nothing")
    heads: list[tuple[float, str, int, Tensor]] = []
    for name, module in model.named_modules():
        if isinstance(getattr(module, "o_proj", None), nn.Linear) and isinstance(
            getattr(module, "head_dim", None), int
        ):
            parts = module.o_proj.weight.split(module.head_dim, dim=1)
            heads += [(part.norm().item(), name, head, part) for head, part in enumerate(parts)]
    if not heads:
        raise ValueError(
            f"model must have attention modules with o_proj and head_dim, got {type(model).__name__} without one; "
            "give the language model itself"
        )
    limit = loss() + tolerance
    cut: dict[str, list[int]] = {}
    for _, name, head, part in sorted(heads, key=lambda entry: entry[0]):
        kept = part.clone()
        part.zero_()
        if loss() <= limit:
            cut.setdefault(name, []).append(head)
        else:
            part.copy_(kept)
    return {name: sorted(cut[name]) for name in sorted(cut)}
