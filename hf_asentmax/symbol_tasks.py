"""The synthetic tasks of arXiv 2506.16640 on strings of symbols, and what every generated task draws with.

`hf_asentmax.tasks` registers them and says what a task offers. Nothing here waits for the device, but that the words of
MQMTAR are copied there when they are first needed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

IGNORED = -100  # the label that the loss of Transformers skips


def check_at_least(owner: str, least: int, **values: int) -> None:
    """Raise ValueError unless every value is an integer of at least `least`; the message begins with the owner."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{owner} {name} must be an integer of at least {least}, got {value!r}; correct it")


def randint(high: int, *size: int, generator: torch.Generator) -> torch.Tensor:
    """Integers in [0, high), int64, on the generator's device."""
    return torch.randint(high, size, generator=generator, device=generator.device)


def rand(*size: int, generator: torch.Generator) -> torch.Tensor:
    """Numbers in [0, 1), float32, on the generator's device."""
    return torch.rand(size, generator=generator, device=generator.device)


def distinct(count: int, high: int, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    """In each of `batch_size` rows `count` distinct integers in [0, high), in random order."""
    return rand(batch_size, high, generator=generator).topk(count).indices


def tail_labels(input_ids: torch.Tensor, answer: int) -> torch.Tensor:
    """Labels for sequences (B, T) that end in an answer of `answer` tokens."""
    labels = torch.full_like(input_ids, IGNORED)
    labels[:, -answer:] = input_ids[:, -answer:]
    return labels


@dataclass(frozen=True)
class _SymbolTask(ABC):
    """A source, the separator `|`, and an answer of as many tokens, all of which are labelled.

    Token 0 is the separator, 1 .. symbols are the symbols, and what else a task writes comes after them.
    """

    name: ClassVar[str]
    symbols: int

    def __post_init__(self) -> None:
        check_at_least(self.name, 2, symbols=self.symbols)

    @property
    def vocab_size(self) -> int:
        """Number of tokens that `vocabulary` lists."""
        return len(self.vocabulary())

    def vocabulary(self) -> list[str]:
        """Return `|`, then `s0`, `s1`, ... ."""
        return ["|", *(f"s{symbol}" for symbol in range(self.symbols))]

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw `length` symbols, the separator and the answer; see `RetrievalTask.sample`."""
        check_at_least(self.name, 1, length=length)
        source = self._source(batch_size, length, generator)
        input_ids = torch.cat([source, source.new_zeros(batch_size, 1), self._answer(source)], dim=1)
        return input_ids, tail_labels(input_ids, length)

    def _source(self, batch_size: int, length: int, generator: torch.Generator) -> torch.Tensor:
        return 1 + randint(self.symbols, batch_size, length, generator=generator)

    @abstractmethod
    def _answer(self, source: torch.Tensor) -> torch.Tensor:
        """Return the answer (B, length) to a source (B, length), both as token ids."""


@dataclass(frozen=True)
class Copy(_SymbolTask):
    """Copy: the source again. Symbols are drawn uniformly.

    Args:
        symbols: number of symbols.

    Reference: arXiv 2506.16640.
    """

    name: ClassVar[str] = "copy"
    symbols: int = 32

    def _answer(self, source: torch.Tensor) -> torch.Tensor:
        return source


@dataclass(frozen=True)
class Reverse(_SymbolTask):
    """Reverse: the source from its last symbol to its first. Symbols are drawn uniformly.

    Args:
        symbols: number of symbols.

    Reference: arXiv 2506.16640.
    """

    name: ClassVar[str] = "reverse"
    symbols: int = 32

    def _answer(self, source: torch.Tensor) -> torch.Tensor:
        return source.flip(1)


@dataclass(frozen=True)
class Sort(_SymbolTask):
    """Sort: the symbols of the source in ascending order, repeated ones included. Symbols are drawn uniformly.

    Args:
        symbols: number of symbols.

    Reference: arXiv 2506.16640.
    """

    name: ClassVar[str] = "sort"
    symbols: int = 32

    def _answer(self, source: torch.Tensor) -> torch.Tensor:
        return source.sort(1).values


@dataclass(frozen=True)
class TwoBack(_SymbolTask):
    """2Back: for each place of the source the symbol two places before it; for the first two the blank token `_`.

    Symbols are drawn uniformly.

    Args:
        symbols: number of symbols.

    Reference: arXiv 2506.16640.
    """

    name: ClassVar[str] = "two_back"
    symbols: int = 16

    def vocabulary(self) -> list[str]:
        """Return `|`, then `s0`, `s1`, ..., then the blank `_`."""
        return [*super().vocabulary(), "_"]

    def _answer(self, source: torch.Tensor) -> torch.Tensor:
        blank = source.new_full((len(source), 2), 1 + self.symbols)
        return torch.cat([blank, source], dim=1)[:, : source.shape[1]]


@dataclass(frozen=True)
class LocalCount(_SymbolTask):
    """Local count: for each place of the source, how often its symbol has occurred in the current run so far, from 1.

    A run is one symbol repeated. The source is made of runs whose lengths are uniform in 1 .. longest_run and whose
    neighbours differ in their symbol; its end cuts the last run. `s3 s3 s3 s0 s3` is answered by `1 2 3 1 1`, where the
    counts are tokens of their own.

    Args:
        symbols: number of symbols.
        longest_run: longest run, and so the highest count.

    Reference: arXiv 2506.16640 names the task; the law of the runs is this module's.
    """

    name: ClassVar[str] = "local_count"
    symbols: int = 16
    longest_run: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self.name, 1, longest_run=self.longest_run)

    def vocabulary(self) -> list[str]:
        """Return `|`, then `s0`, `s1`, ..., then the counts `1`, `2`, ... ."""
        return [*super().vocabulary(), *(str(count) for count in range(1, self.longest_run + 1))]

    def _source(self, batch_size: int, length: int, generator: torch.Generator) -> torch.Tensor:
        # As many runs as the source could hold. A step of 1 .. symbols - 1 leads from each symbol to another one.
        end = (1 + randint(self.longest_run, batch_size, length, generator=generator)).cumsum(1)
        first = randint(self.symbols, batch_size, 1, generator=generator)
        step = 1 + randint(self.symbols - 1, batch_size, length, generator=generator)
        symbol = (first + step.cumsum(1)) % self.symbols
        place = torch.arange(length, device=end.device).repeat(batch_size, 1)
        return 1 + symbol.gather(1, torch.searchsorted(end, place, right=True))

    def _answer(self, source: torch.Tensor) -> torch.Tensor:
        place = torch.arange(source.shape[1], device=source.device)
        begins = source != source.roll(1, 1)
        count = place - torch.where(begins, place, 0).cummax(1).values  # from 0
        return 1 + self.symbols + count


@dataclass(frozen=True)
class FlipFlop:
    """Flip-flop language: a memory of one bit, written now and then and read now and then.

    The sequence is `length / 2` pairs of an instruction and a bit: `w 0` writes the bit, `i 1` is to be ignored, and
    `r 0` reads: its bit is the last one written. The other bits are drawn uniformly. The first instruction is a write,
    the last one a read; each between them is ignored with probability ignore_share, else a write or a read, equally
    likely. Labelled are the bits after the reads, so the rows of a batch differ in the number of their labels and in
    where the first one stands. There is no tail: the source holds the answers, and a sequence is `length` tokens.

    Args:
        ignore_share: probability of `i` between the first and the last instruction.

    Reference: arXiv 2306.00946, FFL(ignore_share), with the loss on the bits that follow from the rest.
    """

    name: ClassVar[str] = "flip_flop"
    length_step: ClassVar[int] = 2
    ignore_share: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.ignore_share <= 1:
            raise ValueError(f"flip_flop ignore_share must be in [0, 1], got {self.ignore_share!r}; it is a share")

    @property
    def vocab_size(self) -> int:
        """Three instructions and two bits."""
        return 5

    def vocabulary(self) -> list[str]:
        """Return `w`, `i`, `r`, `0`, `1`."""
        return ["w", "i", "r", "0", "1"]

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw `length` tokens, an even number of at least 4; see `RetrievalTask.sample`."""
        check_at_least("flip_flop", 4, length=length)
        if length % 2:
            raise ValueError(f"flip_flop length must be even, got {length}; an instruction and its bit are two tokens")
        pairs = length // 2
        write, ignore, read = range(3)
        active = 2 * randint(2, batch_size, pairs, generator=generator)  # a write or a read
        instruction = torch.where(rand(batch_size, pairs, generator=generator) < self.ignore_share, ignore, active)
        instruction[:, 0], instruction[:, -1] = write, read
        place = torch.arange(pairs, device=generator.device)
        written = torch.where(instruction == write, place, 0).cummax(1).values
        bit = 3 + randint(2, batch_size, pairs, generator=generator)
        bit = torch.where(instruction == read, bit.gather(1, written), bit)
        label = torch.where(instruction == read, bit, IGNORED)
        input_ids = torch.stack([instruction, bit], 2).flatten(1)
        return input_ids, torch.stack([torch.full_like(label, IGNORED), label], 2).flatten(1)


@dataclass(frozen=True)
class MultiTokenRecall:
    """MQMTAR, multi-query multi-token associative recall: the words paired with several keys, after all the queries.

    Keys and values are words, pairs of symbols from one alphabet. The source holds pairs `k1 k2 : v1 v2` and, at random
    places between them, blank tokens `_`: every arrangement is equally likely. Then come the queries, `? k1 k2` one
    after the other, then the answer, `? v1 v2` for each query in order, all of it labelled. The keys of a sequence are
    distinct, and so are its queries; values may repeat.

    Args:
        symbols: size of the alphabet.
        words: number of keys to draw from, and of values; each vocabulary is fixed, and its words are distinct.
        queries: queries in each sequence.
        fill: a source of `length` tokens holds `int(fill * length) // 6` pairs, of 5 tokens.
        word_seed: number of the two vocabularies, which are the same on every device and in every stream.

    Reference: arXiv 2506.16640.
    """

    name: ClassVar[str] = "mqmtar"
    symbols: int = 256
    words: int = 10_000
    queries: int = 4
    fill: float = 0.8
    word_seed: int = 0

    def __post_init__(self) -> None:
        check_at_least("mqmtar", 2, symbols=self.symbols)
        check_at_least("mqmtar", 1, words=self.words, queries=self.queries)
        check_at_least("mqmtar", 0, word_seed=self.word_seed)
        if self.words > self.symbols**2:
            raise ValueError(
                f"mqmtar words must be at most symbols**2 = {self.symbols**2}, got {self.words}; ask for fewer words"
            )
        if not 0 < self.fill <= 1:
            raise ValueError(f"mqmtar fill must be in (0, 1], got {self.fill!r}; it is a share")

    @property
    def vocab_size(self) -> int:
        """The query token, the colon, the blank and the symbols."""
        return 3 + self.symbols

    def vocabulary(self) -> list[str]:
        """Return `?`, `:`, `_`, then `s0`, `s1`, ... ."""
        return ["?", ":", "_", *(f"s{symbol}" for symbol in range(self.symbols))]

    def pairs(self, length: int) -> int:
        """Return how many pairs a source of `length` tokens holds."""
        return int(self.fill * length) // 6

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the source, the `queries` queries and their answers; see `RetrievalTask.sample`."""
        pairs = self.pairs(length)
        if not self.queries <= pairs <= self.words:
            raise ValueError(
                f"mqmtar pairs must be between queries={self.queries} and words={self.words}, "
                f"got {pairs} at length {length}; change the length, queries or words"
            )
        key_words, value_words = _words(self.symbols, self.words, self.word_seed, generator.device)
        key = 3 + key_words[distinct(pairs, self.words, batch_size, generator)]
        value = 3 + value_words[randint(self.words, batch_size, pairs, generator=generator)]
        pair = torch.cat([key, key.new_ones(batch_size, pairs, 1), value], 2)
        # Choose the places of the pairs as if each took one token, then make room for its other four.
        place = distinct(pairs, length - 4 * pairs, batch_size, generator).sort(1).values
        start = place + 4 * torch.arange(pairs, device=place.device)
        places = start[:, :, None] + torch.arange(5, device=place.device)
        source = pair.new_full((batch_size, length), 2).scatter(1, places.flatten(1), pair.flatten(1))
        asked = distinct(self.queries, pairs, batch_size, generator)[:, :, None].expand(-1, -1, 2)
        mark = pair.new_zeros(batch_size, self.queries, 1)
        query, answer = (torch.cat([mark, word.gather(1, asked)], 2).flatten(1) for word in (key, value))
        input_ids = torch.cat([source, query, answer], dim=1)
        return input_ids, tail_labels(input_ids, answer.shape[1])


@lru_cache(maxsize=8)
def _words(symbols: int, words: int, seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Two vocabularies of distinct pairs of numbers below `symbols`, each (words, 2)."""
    generator = torch.Generator().manual_seed(seed)
    codes = [torch.randperm(symbols**2, generator=generator, device="cpu")[:words] for _ in range(2)]
    keys, values = (torch.stack([code // symbols, code % symbols], 1).to(device) for code in codes)
    return keys, values
