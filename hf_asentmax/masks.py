"""Masks as intervals: the mask function that Transformers calls, and packed documents kept apart in them.

The mask function returns no mask of T x N entries but the interval of keys that each query may see, as an int32 tensor
(B, 1, T, 2). A 4-D tensor passes through every place in which Transformers, accelerate and checkpointing handle masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from .ops.attention import check_documents
from .ops.intervals import document_starts

ATTENTION_NAME = "asentmax"

Shared = TypeVar("Shared")


def once(owner: Tensor, name: str, compute: Callable[[], Shared], *inputs: object) -> Shared:
    """``compute()``, kept on ``owner`` under ``name`` for the other layers of a forward, which get the same masks and
    positions: on a GPU the host takes longer for ten small operations than the kernels for a step of decoding.

    It is computed anew where ``owner`` was written to, or ``inputs`` are other objects. What is kept must be neither
    ``owner`` nor a view of it, or the two would never be freed.
    """
    if torch.compiler.is_compiling() or owner.is_inference():  # what is written to the latter is not counted
        return compute()
    kept: dict[Any, tuple[Shared, Any]] = owner.__dict__.setdefault("_hf_asentmax", {})
    key = name, torch.is_inference_mode_enabled(), owner._version, *map(id, inputs)
    if key not in kept:
        kept[key] = compute(), inputs  # held, so that their ids stay theirs
    return kept[key][0]


def asentmax_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor:
    """The keys that each query may see, int32 (B, 1, T, 2): from the first (included) to the last (excluded).

    Args:
        mask_function: Transformers' rule for (batch, head, query, key): causal, with windows or packed documents.
        attention_mask: bool (B, >= kv_offset + kv_length), False where a key is padding, on the left or on the right.

    Raises:
        NotImplementedError: the rule isn't causal or isn't Transformers' own.
        ValueError: the padding has holes.
    """
    if mask_function is bidirectional_mask_function or use_vmap:
        raise NotImplementedError(
            f"the {ATTENTION_NAME} attention must be causal and masked by Transformers' own rules (padding, sliding "
            "windows, packed documents), got a bidirectional or custom mask function; use the model without it"
        )
    position = torch.arange(q_length, device=device)[None, :] + q_offset
    position = position.expand(batch_size, -1)
    last = (position + 1 - kv_offset).clamp(max=kv_length)
    first = torch.zeros_like(position)
    if mask_function is not causal_mask_function:
        first = _first_visible(mask_function, position, kv_length, kv_offset) - kv_offset
    if attention_mask is not None:
        start, end = _unpadded(attention_mask, kv_length, kv_offset)
        first, last = torch.maximum(first, start[:, None]), torch.minimum(last, end[:, None])
    return torch.stack([first, last], dim=-1).to(torch.int32)[:, None]


def _first_visible(mask_function: Callable, position: Tensor, kv_length: int, kv_offset: int | Tensor) -> Tensor:
    """The first key that each query sees, by bisection: what a query sees reaches from there to itself."""
    row = torch.arange(position.shape[0], device=position.device)[:, None]
    head = torch.zeros_like(row)
    # The rule must hide each query's successor (the last query has none in the tensors behind the rule).
    checks = not torch.compiler.is_compiling() and position.shape[1] > 1
    if checks and bool(mask_function(row, head, position[:, :-1], position[:, 1:]).any()):
        raise NotImplementedError(
            f"the {ATTENTION_NAME} attention must be causal, got a mask function that shows a later key"
        )
    low, high = torch.zeros_like(position) + kv_offset, position
    # A compiled graph is to serve every length, so it takes the steps of the longest.
    for _ in range(31 if torch.compiler.is_compiling() else kv_length.bit_length()):
        middle = (low + high) // 2
        seen = mask_function(row, head, position, middle)
        low, high = torch.where(seen, low, (middle + 1).clamp(max=high)), torch.where(seen, middle, high)
    return high


def _unpadded(attention_mask: Tensor, kv_length: int, kv_offset: int | Tensor) -> tuple[Tensor, Tensor]:
    """First and last + 1 real key of each row, (B,) each; keys beyond the mask are not there yet."""
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask must be 2-D (batch, tokens), got {tuple(attention_mask.shape)}; mark padding by zeros, "
            "packed documents by position_ids"
        )
    missing = kv_length - attention_mask.shape[-1]
    if isinstance(kv_offset, Tensor) or kv_offset:
        columns = torch.arange(kv_length, device=attention_mask.device) + kv_offset
        inside = columns < attention_mask.shape[-1]
        mask = attention_mask[:, columns.clamp(max=attention_mask.shape[-1] - 1)] & inside
    else:
        mask = attention_mask[:, :kv_length] if missing <= 0 else attention_mask
    count = mask.sum(-1)
    start = mask.to(torch.int32).argmax(-1)
    reach = mask.shape[-1] - mask.flip(-1).to(torch.int32).argmax(-1)
    whole = ((start + count == reach) | (count == 0)).all()
    message = (
        "attention_mask must hide keys only before and after each row's tokens, got a row with a hole in it; "
        "pad each row on one side, or pack documents and mark them by position_ids"
    )
    if torch.compiler.is_compiling():
        torch._assert_async(whole, message)
    elif not bool(whole):
        raise ValueError(message)
    return start, start + count


def check_intervals(attention_mask: Tensor | None, like: Tensor) -> Tensor:
    """What :func:`asentmax_mask` gave, on the device of ``like``.

    Raises:
        ValueError: another mask reached the layer.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32 or attention_mask.shape[-1] != 2:
        got = "None" if attention_mask is None else f"{attention_mask.dtype} {tuple(attention_mask.shape)}"
        raise ValueError(
            f"attention_mask must be None or 2-D (batch, tokens) at the model's input, got {got} in the attention "
            "layer; 4-D masks of your own are not supported, padding, packing and windows are"
        )
    return attention_mask.to(like.device)


def separate_documents(intervals: Tensor, kwargs: dict[str, Any], check: bool) -> Tensor:
    """Keeps packed documents apart wherever they are marked: by ``cu_seq_lens_q``, or by position_ids that start again.

    Transformers' own mask does the latter only without a mask and without a cache, and ``use_cache=True`` is the
    default of a plain forward; there, a position that jumps ahead also begins a document. Restarts within padding do
    nothing.
    """
    length = intervals.shape[2]
    cu_seqlens, position_ids = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    if kwargs.get("seq_idx") is not None and cu_seqlens is None:
        raise NotImplementedError("packed documents must be given by cu_seq_lens_q or position_ids, got seq_idx alone")
    kwargs.pop("seq_idx", None)
    if length == 1:
        return intervals
    if cu_seqlens is not None:
        if intervals.shape[0] != 1:
            raise ValueError(
                f"cu_seq_lens_q must go with one row of packed documents, got a batch of {intervals.shape[0]}; "
                "flatten them into one row"
            )
        if check:
            check_documents(cu_seqlens, length)
    elif position_ids is None or position_ids.dim() != 2:
        return intervals

    def separated() -> Tensor:
        index = torch.arange(length, device=intervals.device, dtype=torch.int32)
        if cu_seqlens is not None:
            start = document_starts(cu_seqlens.to(intervals.device), index)[None]
        elif position_ids is not None:
            # In full length, the first against the last: a slice of one would pin an exported graph to its length.
            restart = (position_ids <= position_ids.roll(1, -1)).to(intervals.device)
            start = torch.where(restart & (index > 0), index, 0).cummax(-1).values
            offset = (intervals[:, 0, :1, 1] - 1).clamp(min=0)  # the first query's own place among the keys
            start = torch.where(start > 0, start + offset, 0)
        first = torch.maximum(intervals[..., 0], start[:, None].to(torch.int32))
        return torch.stack([first, intervals[..., 1]], dim=-1)

    return once(intervals, "documents", separated, cu_seqlens, position_ids)
