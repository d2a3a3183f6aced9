"""Losses of the output layer: cross entropy, and the sparse ones of the `entmax` package (arXiv 1905.05702).

A model trained with a sparse loss means its logits to go through that entmax, not softmax: ``hf_asentmax.entmax(logits,
alpha=1.5)`` (2 for sparsemax) gives its probabilities, with exact zeros. The most probable token is the same, so greedy
decoding is; sampling and perplexity in Transformers are softmax's, under which it is less certain than it was trained
to be.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

LOSSES = ("cross_entropy", "entmax15", "sparsemax")

PARTIAL_SORT = 100  # logits sorted first, the default of Entmax15Loss; a row with a larger support is sorted further
CHUNK = 2**26  # logits in float32 at once


def output_loss(name: str) -> Callable[..., Tensor] | None:
    """The loss of that name as the Trainer's `compute_loss_func`; None, the model's own, for "cross_entropy".

    Raises:
        ValueError: no loss has that name.
    """
    if name not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {name!r}; correct it")
    if name == "cross_entropy":
        return None
    import entmax

    return partial(sparse_loss, {"entmax15": entmax.entmax15_loss, "sparsemax": entmax.sparsemax_loss}[name])


def sparse_loss(
    function: Callable[..., Tensor], outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """The mean Fenchel-Young loss of the tokens that have a label: L(z, y) = max_p [p.z + H(p)] - z_y, dL/dz = p - e_y.

    Args:
        function: logits (N, V), labels (N,) and the number of logits to sort first to losses (N,).
        outputs: with `logits`, (B, T, V); computed with in float32, or float64 where they are.
        labels: int64 (B, T), not yet shifted; -100 for no label.
        num_items_in_batch: labels over which to take the mean, as the Trainer counts them: those of all the batches of
            an optimizer step; None: those given.

    Returns:
        The loss, a float32 (or float64) scalar.
    """
    logits = outputs.logits[:, :-1]
    targets = labels[:, 1:].to(logits.device)
    labelled = targets != -100
    logits, targets = logits[labelled], targets[labelled]
    # The Trainer repeats the count for each replica of DataParallel, and multiplies the loss by their number.
    count = len(targets) if num_items_in_batch is None else torch.as_tensor(num_items_in_batch).sum().to(logits.device)
    rows = max(1, CHUNK // logits.shape[-1])
    total = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
    with torch.autocast(logits.device.type, enabled=False):
        for some, wanted in zip(logits.split(rows), targets.split(rows), strict=True):
            total = total + function(some.to(total.dtype), wanted, PARTIAL_SORT).sum()
    return total / count
