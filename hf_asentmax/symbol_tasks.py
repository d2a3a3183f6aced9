"""The synthetic tasks of arXiv 2506.16640 on strings of symbols; MQMTAR lies in `recall_tasks`.

Copy, reverse and sort answer after the source, `<bos> source <sep> target <eos>`: an answer is right only if it also
ends in the right place. 2Back and local count classify each token of `<bos> source <eos>`, and flip-flop answers with
its last bit. `hf_asentmax.tasks` registers them and says what a task offers. Nothing here waits for the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import pad

from .drawing import SPECIAL, check_at_least, framed, rand, randint, source_to_target, tail_labels, token_classes


@dataclass(frozen=True)
class _SymbolTask(ABC):
    """A source of symbols and as many tokens that answer it, here as `<bos> source <sep> target <eos>`.

    The special tokens come first, then the symbols, then what else a task writes.
    """

    name: ClassVar[str]
    special: ClassVar[tuple[str, ...]] = SPECIAL
    symbols: int

    def __post_init__(self) -> None:
        check_at_least(self.name, 2, symbols=self.symbols)

    @property
    def vocab_size(self) -> int:
        """Number of tokens that `vocabulary` lists."""
        return len(self.vocabulary())

    def vocabulary(self) -> list[str]:
        """Return the special tokens, then `s0`, `s1`, ... ."""
        return [*self.special, *(f"s{symbol}" for symbol in range(self.symbols))]

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw `length` symbols, and answer them; see `RetrievalTask.sample`."""
        check_at_least(self.name, 1, length=length)
        source = len(self.special) + self._source(batch_size, length, generator)
        return self._join(source, self._answer(source))

    def _join(self, source: torch.Tensor, answer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return source_to_target(source, answer)

    def _source(self, batch_size: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """Draw symbols, as numbers from 0."""
        return randint(self.symbols, batch_size, length, generator=generator)

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
class _TokenTask(_SymbolTask):
    """A class for each token of `<bos> source <eos>`, predicted at that token.

    The labels are not the next inputs: the model never reads an answer, so one pass over the source tells them all and
    generating token by token is not what is evaluated.
    """

    special: ClassVar[tuple[str, ...]] = SPECIAL[:2]

    def _join(self, source: torch.Tensor, answer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return token_classes(source, answer)


@dataclass(frozen=True)
class TwoBack(_TokenTask):
    """2Back: at each token of the source the symbol two places before it; at the first two the blank token `_`.

    Symbols are drawn uniformly. The answers are predicted at the tokens themselves and are no inputs.

    Args:
        symbols: number of symbols.

    Reference: arXiv 2506.16640.
    """

    name: ClassVar[str] = "two_back"
    symbols: int = 16

    def vocabulary(self) -> list[str]:
        """Return `<bos>`, `<eos>`, then `s0`, `s1`, ..., then the blank `_`."""
        return [*super().vocabulary(), "_"]

    def _answer(self, source: torch.Tensor) -> torch.Tensor:
        return pad(source, (2, 0), value=self.vocab_size - 1)[:, : source.shape[1]]


@dataclass(frozen=True)
class LocalCount(_TokenTask):
    """Local count: at each token of the source how often its symbol has come before it in the current run, from 0.

    A run is one symbol repeated. The source is made of runs whose lengths are uniform in 2 .. longest_run and whose
    neighbours differ in their symbol; its end cuts the last run. `s3 s3 s3 s0 s0` is answered by `0 1 2 0 1`, where the
    counts are tokens of their own. They are predicted at the tokens themselves and are no inputs.

    Args:
        symbols: number of symbols.
        longest_run: longest run, and so one more than the highest count.

    Reference: arXiv 2506.16640, whose sources have as many whole runs as reach `length` on average.
    """

    name: ClassVar[str] = "local_count"
    symbols: int = 16
    longest_run: int = 48

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self.name, 2, longest_run=self.longest_run)

    def vocabulary(self) -> list[str]:
        """Return `<bos>`, `<eos>`, then `s0`, `s1`, ..., then the counts `0`, `1`, ... ."""
        return [*super().vocabulary(), *(str(count) for count in range(self.longest_run))]

    def _source(self, batch_size: int, length: int, generator: torch.Generator) -> torch.Tensor:
        # As many runs as the source could hold. A step of 1 .. symbols - 1 leads from each symbol to another one.
        runs = length // 2 + 1
        end = (2 + randint(self.longest_run - 1, batch_size, runs, generator=generator)).cumsum(1)
        first = randint(self.symbols, batch_size, 1, generator=generator)
        step = 1 + randint(self.symbols - 1, batch_size, runs, generator=generator)
        symbol = (first + step.cumsum(1)) % self.symbols
        place = torch.arange(length, device=end.device).repeat(batch_size, 1)
        return symbol.gather(1, torch.searchsorted(end, place, right=True))

    def _answer(self, source: torch.Tensor) -> torch.Tensor:
        place = torch.arange(source.shape[1], device=source.device)
        begins = source != source.roll(1, 1)
        count = place - torch.where(begins, place, 0).cummax(1).values
        return len(self.special) + self.symbols + count


@dataclass(frozen=True)
class FlipFlop:
    """Flip-flop: a memory of one bit, written now and then and read at the end.

    `<bos>`, then `length / 2` pairs of an instruction and a bit, then `<eos>`. `w 0` writes the bit, `i 1` is to be
    ignored, and the last pair, `r 0`, reads: its bit is the last one written, and the answer, with `<eos>`. The first
    instruction is a write; each between is a write with probability write_share, else it is to be ignored. The other
    bits are drawn uniformly. There is no tail: the source ends with its answer.

    Args:
        write_share: probability of `w` between the first and the last instruction.

    Reference: arXiv 2506.16640, after arXiv 2306.00946.
    """

    name: ClassVar[str] = "flip_flop"
    length_step: ClassVar[int] = 2
    write_share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.write_share <= 1:
            raise ValueError(f"flip_flop write_share must be in [0, 1], got {self.write_share!r}; it is a share")

    @property
    def vocab_size(self) -> int:
        """Two special tokens, three instructions and two bits."""
        return 7

    def vocabulary(self) -> list[str]:
        """Return `<bos>`, `<eos>`, `w`, `i`, `r`, `0`, `1`."""
        return [*SPECIAL[:2], "w", "i", "r", "0", "1"]

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw instructions and bits, together an even number of at least 4; see `RetrievalTask.sample`."""
        check_at_least("flip_flop", 4, length=length)
        if length % 2:
            raise ValueError(f"flip_flop length must be even, got {length}; an instruction and its bit are two tokens")
        pairs = length // 2
        write, ignore, read, zero = range(2, 6)
        writes = rand(batch_size, pairs, generator=generator) < self.write_share
        instruction = torch.where(writes, write, ignore)
        instruction[:, 0], instruction[:, -1] = write, read
        bit = zero + randint(2, batch_size, pairs, generator=generator)
        place = torch.arange(pairs, device=generator.device)
        last_write = torch.where(instruction == write, place, 0).amax(1, keepdim=True)
        bit[:, -1:] = bit.gather(1, last_write)
        input_ids = framed(torch.stack([instruction, bit], 2).flatten(1))
        return input_ids, tail_labels(input_ids, 2)
