"""Cut the attention heads that a model does not need, which may do harm beyond its training length."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class _Head(NamedTuple):
    module: str
    number: int
    weights: list[tuple[torch.Tensor, tuple[slice, ...]]]  # of its output, then of values that no other head reads


def _heads(model: nn.Module) -> list[_Head]:
    heads = []
    for name, module in model.named_modules():
        output, size = getattr(module, "o_proj", None), getattr(module, "head_dim", None)
        if not isinstance(output, nn.Linear) or not isinstance(size, int):
            continue
        values = getattr(module, "v_proj", None) or getattr(module, "qkv_proj", None)
        shared = getattr(module, "num_key_value_groups", 1) > 1
        for head in range(output.in_features // size):
            columns = slice(head * size, (head + 1) * size)
            weights: list[tuple[torch.Tensor, tuple[slice, ...]]] = [(output.weight, (slice(None), columns))]
            if isinstance(values, nn.Linear) and not shared:
                first = values.out_features - output.in_features  # in a fused projection the values come last
                rows = slice(first + columns.start, first + columns.stop)
                weights += [(x, (rows,)) for x in (values.weight, values.bias) if x is not None]
            heads.append(_Head(name, head, weights))
    if not heads:
        raise ValueError(
            f"model must have attention modules with o_proj and head_dim, got {type(model).__name__} without one; "
            "give the language model itself"
        )
    return heads


@torch.no_grad()
def prune_heads(
    model: nn.Module,
    loss: Callable[[], float],
    *,
    tolerance: float,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, list[int]]:
    """Zero every head that a loss can do without, its output and its values; the model keeps its shape.

    A head that learned nothing stays near its initial weights: nothing in training removes it. On longer sequences it
    meets keys that training never showed, and what it then writes may blur what the others read. Heads are tried one
    after the other, those of the smallest output weights first, and stay cut while
    ``loss() <= loss of the whole model + tolerance``; so one that does what another does too goes, and the other stays.

    Where output and values are both zero no gradient reaches either, and the head stays cut in further training. With
    grouped queries other heads read its values too: they are left, and further training may bring it back.

    Args:
        model: a causal language model whose attention modules have ``o_proj`` and ``head_dim``, as Transformers' have.
        loss: evaluates the model, always on the same data: of the lengths that it was trained on, and enough of them
            to hold what is rare. Called once for each head, and once before.
        tolerance: by how much the loss may rise in all, in its own unit.
        optimizer: the one that trains the model further; what it remembers of these weights is zeroed with them.

    Returns:
        The heads cut, by the name of their attention module.

    Raises:
        ValueError: a tolerance below zero, a loss that is not finite, or no attention to prune. After any error, that
            of the loss too, the model is as it was.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance!r}; 0 cuts only what costs nothing")
    heads = _heads(model)
    limit = loss() + tolerance
    if not math.isfinite(limit):
        raise ValueError(f"loss and tolerance must be finite, got a limit of {limit}; nothing could be told by it")
    heads.sort(key=lambda head: _output(head).norm().item())
    before = [[parameter[part].clone() for parameter, part in head.weights] for head in heads]

    def restore(head: _Head, kept: list[torch.Tensor]) -> None:
        for (parameter, part), x in zip(head.weights, kept, strict=True):
            parameter[part] = x

    cut: list[_Head] = []
    try:
        for head, kept in zip(heads, before, strict=True):
            for parameter, part in head.weights:
                parameter[part] = 0
            if loss() <= limit:
                cut.append(head)
            else:
                restore(head, kept)
    except BaseException:  # interrupted: the model as it was
        for head, kept in zip(heads, before, strict=True):
            restore(head, kept)
        raise
    states = {} if optimizer is None else optimizer.state
    for parameter, part in [weights for head in cut for weights in head.weights]:
        for state in states.get(parameter, {}).values():
            if getattr(state, "shape", None) == parameter.shape:  # moments, not a count of steps
                state[part] = 0
    return _by_module(cut)


def zero_heads(model: nn.Module) -> dict[str, list[int]]:
    """The heads whose output weights are all zero, as :func:`prune_heads` returns them."""
    return _by_module([head for head in _heads(model) if not _output(head).any()])


def _output(head: _Head) -> torch.Tensor:
    parameter, part = head.weights[0]
    return parameter.detach()[part]


def _by_module(heads: list[_Head]) -> dict[str, list[int]]:
    return {name: sorted(x.number for x in heads if x.module == name) for name in sorted({x.module for x in heads})}


class PruneHeads(TrainerCallback):
    """Prunes once during training, by :func:`prune_heads`; the rest of it mends what the cut has cost.

    Nothing is to be remembered of it: a resumed run goes on with zero heads, or comes to the step of the cut again.

    Args:
        loss: evaluates a model, given in eval mode; as the argument of :func:`prune_heads`, and in all processes alike.
        tolerance: by how much the loss may rise in all.
        at: share of the steps after which to cut, 0 to 1.

    Raises:
        ValueError: the tolerance is negative or not finite, or the share not within 0 and 1.
    """

    def __init__(self, loss: Callable[[nn.Module], float], *, tolerance: float, at: float = 0.5) -> None:
        if not 0 <= tolerance < math.inf:
            raise ValueError(f"tolerance must be at least 0 and finite, got {tolerance!r}; try 1e-5")
        if not 0 <= at <= 1:
            raise ValueError(f"at must be a share of the steps, 0 to 1, got {at!r}; 0.5 leaves half of them to mend")
        self.loss, self.tolerance, self.at = loss, tolerance, at

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step != max(round(self.at * state.max_steps), 1):
            return
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        model.eval()
        cut = prune_heads(model, lambda: self.loss(model), tolerance=self.tolerance, optimizer=optimizer)
        model.train()
        state.log_history.append({"step": state.global_step, "heads_cut": sum(map(len, cut.values()))})
