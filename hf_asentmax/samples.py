"""The validation and test samples of a generated task, the same for every model, batch size, device and number of
processes: on the CPU, in chunks whose size follows from the length alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .drawing import check_at_least
from .tasks import RetrievalTask, sample_batch

if TYPE_CHECKING:
    from datasets import Dataset

CHUNK_TOKENS = 1 << 13  # of the sources; part of the law of the samples: another number gives other samples


def sample_chunks(samples: int, length: int) -> list[range]:
    """Return the numbers of the first `samples` samples of a stream, in the chunks in which they are drawn."""
    size = max(1, CHUNK_TOKENS // length)
    return [range(first, min(first + size, samples)) for first in range(0, samples, size)]


def draw_chunk(
    task: RetrievalTask, chunk: range, length: int, *, stream: str, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one of `sample_chunks`, on the CPU.

    Args:
        task: what to draw.
        chunk: numbers of the samples.
        length: tokens of the source.
        stream: "validation" or "test".
        seed: number of the experiment.

    Returns:
        `(input_ids, labels)`, both (len(chunk), length + tail) int64.

    Raises:
        ValueError: as `sample_batch` says.
    """
    size = max(1, CHUNK_TOKENS // length)
    with _one_thread():  # the tensors are small: several threads wait for each other longer than they work
        batch = sample_batch(task, size, length, stream=stream, seed=seed, index=chunk.start // size)
    return batch["input_ids"][: len(chunk)], batch["labels"][: len(chunk)]


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def to_dataset(task: RetrievalTask, samples: int, length: int, *, stream: str, seed: int) -> Dataset:
    """Return the first `samples` samples of a stream as a `datasets.Dataset`, for `.save_to_disk` and the like.

    They are those that :func:`hf_asentmax.ladder.synthetic_ladder` evaluates on, in the same order, held in memory.

    Args:
        task: what to draw.
        samples: number of sequences.
        length: tokens of the source.
        stream: "train", "validation" or "test".
        seed: number of the experiment.

    Returns:
        A dataset with the columns input_ids and labels, lists of integers; `.with_format("torch")` gives int64 tensors.

    Raises:
        ValueError: an unknown stream, a number that is not positive, or a length that the task refuses.
    """
    from datasets import Dataset

    check_at_least("dataset", 1, samples=samples, length=length)
    chunks = [draw_chunk(task, chunk, length, stream=stream, seed=seed) for chunk in sample_chunks(samples, length)]
    input_ids, labels = (torch.cat(parts).numpy() for parts in zip(*chunks, strict=True))
    return Dataset.from_dict({"input_ids": input_ids, "labels": labels})
