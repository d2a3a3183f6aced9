"""Sharing work among the processes of ``accelerate launch`` or ``torchrun``.

A script calls `join_processes` first. A process on its own need not, and does all the work.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")


def join_processes() -> Any:  # a torch.device, which `PreTrainedModel.to` is not annotated to take
    """Join the other processes, where there are any, and return this one's torch.device.

    ``PartialState()`` alone does not join launched processes that have no GPU: each would do all the work, and all
    would write the same files.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    launched = "LOCAL_RANK" in os.environ
    without_gpu = not (torch.cuda.is_available() or torch.xpu.is_available())
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or (launched and without_gpu)).device


def _world() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def is_main() -> bool:
    """Whether this is the process that reports: the first, or the only one."""
    return _world()[0] == 0


def share(items: Sequence[T]) -> list[T]:
    """This process's items: every world-size-th, so that costs which rise along the list are spread evenly."""
    rank, size = _world()
    return list(items[rank::size])


def gathered(items: list[T]) -> list[T]:
    """The results of all processes, in the order of what `share` was given; every process must call it."""
    size = _world()[1]
    if size == 1:
        return items
    parts: list[list[T]] = [[] for _ in range(size)]
    distributed.all_gather_object(parts, items)
    missing = object()
    return [item for item in chain(*zip_longest(*parts, fillvalue=missing)) if item is not missing]  # type: ignore[misc]
