"""Synthetic tasks for causal language models, generated on the fly; they lie in `recall_tasks` and `symbol_tasks`.

A task turns random numbers into token sequences whose answer follows from what stands before it. Nothing is read from
disk, any length can be asked for, and every batch follows from (task, stream, seed, length, index) alone, so that a run
can be resumed or repeated. The train, validation and test streams use different seeds: they never share a batch.

>>> task = build_task("max_retrieval", priorities=64, values=8)
>>> batch = sample_batch(task, 32, 64, stream="train", seed=0, index=0)      # then model(**batch).loss.backward()
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from .drawing import IGNORED as IGNORED
from .recall_tasks import AssociativeRecall, MaxRetrieval, MultiTokenRecall
from .symbol_tasks import Copy, FlipFlop, LocalCount, Reverse, Sort, TwoBack

STREAMS = ("train", "validation", "test")
SETTINGS_FILE = "task.json"


class RetrievalTask(Protocol):
    """What every task offers: a vocabulary and a way to draw sequences."""

    name: ClassVar[str]

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the task uses, 0 .. vocab_size - 1."""

    def vocabulary(self) -> list[str]:
        """Return the written form of every token id, without spaces, in order."""

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw sequences on the generator's device.

        Args:
            batch_size: number of sequences.
            length: tokens of the source, from which the answer follows; special tokens, queries and the answer come on
                top.
            generator: source of randomness; the sequences live on its device.

        Returns:
            `(input_ids, labels)`, both (batch_size, T) int64, T >= length. `labels[:, t + 1]` is what to predict at
            place t: -100 where nothing is asked, else the next token, but in the tasks that classify each token of the
            source (2Back, local count): there the answers are no inputs.

        Raises:
            ValueError: the task has no source of this length.
        """


TASKS: dict[str, type[Any]] = {
    task.name: task
    for task in (AssociativeRecall, Copy, FlipFlop, LocalCount, MaxRetrieval, MultiTokenRecall, Reverse, Sort, TwoBack)
}


def build_task(name: str, **options: Any) -> RetrievalTask:
    """Return the task of this name.

    Args:
        name: a key of `TASKS`.
        options: fields of the task, such as `values=10`.

    Raises:
        ValueError: no such task, or no such option.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {sorted(TASKS)}, got {name!r}; `hf_asentmax.tasks.TASKS` lists them")
    known = TASKS[name].__dataclass_fields__
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"options of {name} must be among {sorted(known)}, got {unknown!r}; correct the spelling")
    return TASKS[name](**options)


def task_settings(task: RetrievalTask) -> dict[str, Any]:
    """Return the task as plain data, `{"name": ..., option: value}`; `build_task(**settings)` builds it again."""
    return {"name": task.name, **asdict(task)}  # type: ignore[call-overload]  # every task is a dataclass


def save_task(task: RetrievalTask, folder: str | os.PathLike[str]) -> Path:
    """Write the task's settings as task.json into a checkpoint's folder, for `load_task`. Returns the path."""
    path = Path(folder) / SETTINGS_FILE
    path.write_text(json.dumps(task_settings(task), indent=2) + "\n", encoding="utf-8")
    return path


def load_task(
    name: str | None, folder: str | os.PathLike[str] | None = None, options: dict[str, Any] | None = None
) -> RetrievalTask:
    """Return the task with the options given, else with those of task.json in the folder, else with its defaults.

    Args:
        name: a key of `TASKS`; None for that of task.json.
        folder: a model's folder, which may hold task.json.
        options: fields of the task, in place of all those of task.json.

    Raises:
        ValueError: there is neither a name nor a task.json, task.json can't be read or is of another task, or an option
            is wrong.
    """
    path = None if folder is None else Path(folder) / SETTINGS_FILE
    if path is None or not path.is_file():
        if name is None:
            raise ValueError(f"task must be named where {path or SETTINGS_FILE} is missing, got None; give its name")
        return build_task(name, **(options or {}))
    if name is not None and options is not None:
        return build_task(name, **options)
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        owner = saved.pop("name")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be as save_task writes it, got {error!r}; give the task's options") from error
    if name is not None and owner != name:
        raise ValueError(f"task must be {owner!r}, as {path} says, got {name!r}; give options to evaluate another task")
    return build_task(owner, **(saved if options is None else options))


def sample_batch(
    task: RetrievalTask,
    batch_size: int,
    length: int,
    *,
    stream: str = "train",
    seed: int = 0,
    index: int = 0,
    device: str | torch.device = "cpu",
) -> dict[str, torch.Tensor]:
    """Return batch `index` of a stream, the same one every time on the same kind of device.

    Args:
        task: what to draw.
        batch_size: number of sequences.
        length: tokens of the source; special tokens, queries and the answer come on top.
        stream: "train", "validation" or "test"; part of the random seed, so that the streams have nothing in common.
        seed: number of the experiment.
        index: number of the batch within the stream.
        device: where to draw; the CPU and a GPU draw different numbers.

    Returns:
        `{"input_ids", "labels"}`, both (batch_size, T) int64: what a causal language model's forward takes.

    Raises:
        ValueError: an unknown stream, or a length that the task refuses.
    """
    if stream not in STREAMS:
        raise ValueError(f"stream must be one of {STREAMS}, got {stream!r}; use one of these")
    generator = torch.Generator(device=device).manual_seed(stream_seed(task, stream, seed, length, index))
    input_ids, labels = task.sample(batch_size, length, generator)
    return {"input_ids": input_ids, "labels": labels}


def stream_seed(task: RetrievalTask, *identity: Any) -> int:
    """A number below 2**63 that follows from the task's settings and `identity` alone."""
    text = repr((sorted(task_settings(task).items()), *identity))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def render(task: RetrievalTask, input_ids: torch.Tensor) -> str:
    """Return one sequence (T,) of token ids as text, tokens separated by spaces."""
    names = task.vocabulary()
    return " ".join(names[token] for token in input_ids.tolist())
