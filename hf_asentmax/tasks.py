"""Synthetic tasks for causal language models, generated on the fly; those on strings of symbols lie in `symbol_tasks`.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from .symbol_tasks import (
    IGNORED,
    Copy,
    FlipFlop,
    LocalCount,
    MultiTokenRecall,
    Reverse,
    Sort,
    TwoBack,
    check_at_least,
    distinct,
    rand,
    randint,
    tail_labels,
)

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
            length: tokens of the source, from which the answer follows; the query and the answer come after it.
            generator: source of randomness; the sequences live on its device.

        Returns:
            `(input_ids, labels)`, both (batch_size, length + tail) int64; labels are -100 except on the answer.

        Raises:
            ValueError: the task has no source of this length.
        """


@dataclass(frozen=True)
class MaxRetrieval:
    """Max Retrieval: which value belongs to the item of highest priority?

    The source is a bag of items `priority:value`, one token each, priorities drawn uniformly, the highest one unique;
    then the query token `?`, then the answer, a value. Longer sources bring more items close to the maximum, so a map
    that disperses loses it.

    Args:
        priorities: number of priority levels.
        values: number of values.

    Reference: Max Retrieval of arXiv 2410.01104, section 3, and arXiv 2506.16640, with discrete tokens.
    """

    name: ClassVar[str] = "max_retrieval"
    priorities: int = 64
    values: int = 10

    def __post_init__(self) -> None:
        check_at_least("max_retrieval", 2, priorities=self.priorities, values=self.values)

    @property
    def vocab_size(self) -> int:
        """The query token, the values, and one token for each item."""
        return 1 + self.values + self.priorities * self.values

    def vocabulary(self) -> list[str]:
        """Return `?`, then `v0`, `v1`, ..., then the items `0:v0`, `0:v1`, ... ."""
        values = [f"v{value}" for value in range(self.values)]
        return ["?", *values, *(f"{priority}:{value}" for priority in range(self.priorities) for value in values)]

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw `length` items, the query and the answer; see `RetrievalTask.sample`."""
        check_at_least("max_retrieval", 1, length=length)
        priority = randint(self.priorities, batch_size, length, generator=generator)
        highest = priority.amax(1, keepdim=True).clamp(min=1)
        # One of the items that tie for the maximum keeps it, the others are drawn again below it.
        tied = priority >= highest
        winner = (rand(batch_size, length, generator=generator) + tied).argmax(1, keepdim=True)
        below = (rand(batch_size, length, generator=generator) * highest).long()
        priority = torch.where(tied, below, priority).scatter(1, winner, highest)
        value = randint(self.values, batch_size, length, generator=generator)
        items = 1 + self.values + priority * self.values + value
        query = items.new_zeros(batch_size, 1)
        input_ids = torch.cat([items, query, 1 + value.gather(1, winner)], dim=1)
        return input_ids, tail_labels(input_ids, 1)


@dataclass(frozen=True)
class AssociativeRecall:
    """Multi-query associative recall: which value was paired with each of these keys?

    The source holds pairs `key value` at random places among filler tokens; then each query is `?`, a key of the
    source, and its value, which is the answer. Keys are distinct within a sequence.

    Args:
        keys: symbols that keys are made of.
        values: symbols that values are made of.
        key_tokens: tokens of a key; two of 256 symbols give 65,536 keys, enough for very long sources.
        value_tokens: tokens of a value.
        queries: queries in each sequence.
        fill: share of the source taken by pairs; the rest is filler.
        fillers: number of different filler tokens.

    Reference: arXiv 2312.04927 (multi-query associative recall); arXiv 2506.16640 (several tokens a key and value).
    """

    name: ClassVar[str] = "associative_recall"
    keys: int = 256
    values: int = 64
    key_tokens: int = 1
    value_tokens: int = 1
    queries: int = 4
    fill: float = 0.8
    fillers: int = 16

    def __post_init__(self) -> None:
        check_at_least("associative_recall", 2, keys=self.keys, values=self.values)
        counts = {name: getattr(self, name) for name in ("key_tokens", "value_tokens", "queries", "fillers")}
        check_at_least("associative_recall", 1, **counts)
        if not 0 < self.fill <= 1:
            raise ValueError(f"associative_recall fill must be in (0, 1], got {self.fill!r}; it is a share")

    @property
    def vocab_size(self) -> int:
        """The query token, the fillers, the key symbols and the value symbols."""
        return 1 + self.fillers + self.keys + self.values

    def vocabulary(self) -> list[str]:
        """Return `?`, then `f0` ..., then `k0` ..., then `v0` ... ."""
        kinds = (("f", self.fillers), ("k", self.keys), ("v", self.values))
        return ["?", *(f"{letter}{number}" for letter, count in kinds for number in range(count))]

    def pairs(self, length: int) -> int:
        """Return how many pairs a source of `length` tokens holds."""
        return int(self.fill * length) // (self.key_tokens + self.value_tokens)

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the source and `queries` queries with their answers; see `RetrievalTask.sample`."""
        pairs, width, possible = self.pairs(length), self.key_tokens + self.value_tokens, self.keys**self.key_tokens
        if not self.queries <= pairs <= possible:
            raise ValueError(
                f"associative_recall pairs must be between queries={self.queries} and {possible} distinct keys, "
                f"got {pairs} at length {length}; change the length, queries, keys or key_tokens"
            )
        value = randint(self.values, batch_size, pairs, self.value_tokens, generator=generator)
        key = self._distinct_keys(batch_size, pairs, generator)
        pair = 1 + self.fillers + torch.cat([key, self.keys + value], 2)
        source = self._place(pair, length, generator)
        asked = distinct(self.queries, pairs, batch_size, generator)[:, :, None].expand(-1, -1, width)
        mark, answer = pair.new_zeros(batch_size, self.queries, 1), pair.gather(1, asked)
        query = torch.cat([mark, answer], 2).flatten(1)
        ignored = torch.full_like(answer[:, :, : self.key_tokens], IGNORED)
        label = torch.cat([mark + IGNORED, ignored, answer[:, :, self.key_tokens :]], 2).flatten(1)
        return torch.cat([source, query], 1), torch.cat([torch.full_like(source, IGNORED), label], 1)

    def _distinct_keys(self, batch_size: int, pairs: int, generator: torch.Generator) -> torch.Tensor:
        # Sorted draws plus 0, 1, 2, ... are distinct, at O(n log n) even where the key space is too large to shuffle.
        code = randint(self.keys**self.key_tokens - pairs + 1, batch_size, pairs, generator=generator).sort(1).values
        code = code + torch.arange(pairs, device=generator.device)
        code = code.gather(1, rand(batch_size, pairs, generator=generator).argsort(1))
        return torch.stack([code // self.keys**place % self.keys for place in range(self.key_tokens)], 2)

    def _place(self, pair: torch.Tensor, length: int, generator: torch.Generator) -> torch.Tensor:
        """Scatter the pairs (B, n, width) over a source of `length` tokens, at random places, filler between them."""
        batch_size, pairs, width = pair.shape
        # Choose the places of the pairs as if each took one token, then make room for the rest of it.
        place = distinct(pairs, length - (width - 1) * pairs, batch_size, generator).sort(1).values
        start = place + (width - 1) * torch.arange(pairs, device=place.device)
        places = start[:, :, None] + torch.arange(width, device=place.device)
        source = 1 + randint(self.fillers, batch_size, length, generator=generator)
        return source.scatter(1, places.flatten(1), pair.flatten(1))


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
        length: tokens of the source; the query and the answer come after it.
        stream: "train", "validation" or "test"; part of the random seed, so that the streams have nothing in common.
        seed: number of the experiment.
        index: number of the batch within the stream.
        device: where to draw; the CPU and a GPU draw different numbers.

    Returns:
        `{"input_ids", "labels"}`, both (batch_size, length + tail) int64: what a causal language model's forward takes.

    Raises:
        ValueError: an unknown stream, or a length that the task refuses.
    """
    if stream not in STREAMS:
        raise ValueError(f"stream must be one of {STREAMS}, got {stream!r}; use one of these")
    generator = torch.Generator(device=device).manual_seed(_hash(task, stream, seed, length, index))
    input_ids, labels = task.sample(batch_size, length, generator)
    return {"input_ids": input_ids, "labels": labels}


def _hash(task: RetrievalTask, *identity: Any) -> int:
    """A number below 2**63 that follows from the task's settings and `identity` alone."""
    text = repr((sorted(task_settings(task).items()), *identity))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def sample_training_batch(
    task: RetrievalTask,
    batch_size: int,
    lengths: tuple[int, int],
    *,
    seed: int,
    index: int,
    device: str | torch.device = "cpu",
) -> dict[str, torch.Tensor]:
    """Return batch `index` of the training stream, all its sources of one length, which is drawn for each batch.

    The length is uniform in low .. high. A task whose lengths go up in steps says so (`length_step`, 2 for flip-flop),
    and then it is uniform in low, low + step, ... . It is drawn on the CPU and is the same for every device.

    Args:
        task: what to draw.
        batch_size: number of sequences.
        lengths: `(low, high)`, both included.
        seed: number of the experiment.
        index: number of the batch.
        device: where to draw the sequences.

    Returns:
        As `sample_batch`.

    Raises:
        ValueError: the lengths are not such a pair, or the task refuses the length drawn.
    """
    if len(lengths) != 2:
        raise ValueError(f"training lengths must be a pair (low, high), got {lengths!r}; give two integers")
    low, high = lengths
    check_at_least("training lengths'", 1, low=low)
    check_at_least("training lengths'", low, high=high)
    step = getattr(task, "length_step", 1)
    length = low + step * (_hash(task, "training length", seed, low, high, index) % ((high - low) // step + 1))
    return sample_batch(task, batch_size, length, stream="train", seed=seed, index=index, device=device)


def render(task: RetrievalTask, input_ids: torch.Tensor) -> str:
    """Return one sequence (T,) of token ids as text, tokens separated by spaces."""
    names = task.vocabulary()
    return " ".join(names[token] for token in input_ids.tolist())
