"""The generated tasks that ask for something in their source: the value of the highest item, or of a key.

`hf_asentmax.tasks` registers them and says what a task offers. Nothing here waits for the device, but that the words of
MQMTAR are copied there when they are first needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from .drawing import IGNORED, SPECIAL, check_at_least, distinct, rand, randint, source_to_target, tail_labels


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


@dataclass(frozen=True)
class MultiTokenRecall:
    """MQMTAR, multi-query multi-token associative recall: the words paired with several keys, after all the queries.

    Keys and values are words, pairs of symbols from one alphabet. The source holds n pairs `k1 k2 : v1 v2`: it is cut
    into n slots, slot i from token `i * length // n` on, and each pair lies in a slot of its own, at a place drawn
    uniformly, with blanks `_` around it, at least one of them behind. After the source come the queries, `? k1 k2` one
    after the other, then `<sep>`, the target, `? v1 v2` for each query in order, and `<eos>`. The keys of a sequence
    are distinct, and so are its values; the queries are drawn with replacement.

    Args:
        symbols: size of the alphabet.
        words: number of keys to draw from, and of values; each vocabulary is fixed, and its words are distinct.
        queries: queries in each sequence.
        fill: a source of `length` tokens holds `int(fill * length) // 6` pairs.
        word_seed: number of the two vocabularies, which are the same on every device and in every stream.

    Reference: arXiv 2506.16640, where each slot is of `length // n` tokens.
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
        """The special tokens, the query token, the colon, the blank and the symbols."""
        return len(SPECIAL) + 3 + self.symbols

    def vocabulary(self) -> list[str]:
        """Return `<bos>`, `<eos>`, `<sep>`, `?`, `:`, `_`, then `s0`, `s1`, ... ."""
        return [*SPECIAL, "?", ":", "_", *(f"s{symbol}" for symbol in range(self.symbols))]

    def pairs(self, length: int) -> int:
        """Return how many pairs a source of `length` tokens holds."""
        return int(self.fill * length) // 6

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw `length` tokens of pairs and blanks, the queries and the answers; see `RetrievalTask.sample`."""
        pairs = self.pairs(length)
        if not 1 <= pairs <= self.words:
            raise ValueError(
                f"mqmtar pairs must be between 1 and words={self.words}, got {pairs} at length {length}; "
                "change the length, fill or words"
            )
        mark, colon, blank, first = range(len(SPECIAL), len(SPECIAL) + 4)
        key, value = (first + words for words in self._choose(batch_size, pairs, generator))
        pair = torch.cat([key, key.new_full((batch_size, pairs, 1), colon), value], 2)
        slot = torch.arange(pairs + 1, device=key.device) * length // pairs
        # Of a slot's tokens the last five can't be where a pair starts: its other four and the blank behind come there.
        start = slot[:-1] + (rand(batch_size, pairs, generator=generator) * (slot.diff() - 5)).long()
        places = start[:, :, None] + torch.arange(5, device=key.device)
        source = pair.new_full((batch_size, length), blank).scatter(1, places.flatten(1), pair.flatten(1))
        asked = randint(pairs, batch_size, self.queries, 1, generator=generator).expand(-1, -1, 2)
        marks = asked.new_full((batch_size, self.queries, 1), mark)
        query, answer = (torch.cat([marks, word.gather(1, asked)], 2).flatten(1) for word in (key, value))
        return source_to_target(torch.cat([source, query], 1), answer)

    def _choose(self, batch_size: int, pairs: int, generator: torch.Generator) -> list[torch.Tensor]:
        """Distinct keys and distinct values for each sequence, (B, n, 2) each, as numbers of symbols."""
        vocabularies = _words(self.symbols, self.words, self.word_seed, generator.device)
        return [words[distinct(pairs, self.words, batch_size, generator)] for words in vocabularies]


@dataclass(frozen=True)
class CrowdedRecall(MultiTokenRecall):
    """MQMTAR to train on, with hard negatives: in a share of the sequences all words come from few symbols.

    Among 64 tokens two of 256 symbols seldom meet again, among 65,536 always: there some other key shares a symbol with
    the one that is asked for while its value begins like the answer. A crowded sequence, of any length, is full of such
    pairs. It draws `crowd` symbols, and takes the words that are made of them alone, others where these are too few.
    The rest of the sequences are MQMTAR's own, and so are vocabularies, lengths and layout of all. The paper has no
    such sequences.

    Args:
        share: of the sequences that are crowded, on average.
        crowd: symbols of such a sequence.

    Raises:
        ValueError: a share outside of [0, 1], or a crowd below 2 or above the task's symbols.
    """

    share: float = 0.25
    crowd: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("mqmtar", 2, crowd=self.crowd)
        if self.crowd > self.symbols or not 0 <= self.share <= 1:
            raise ValueError(
                f"mqmtar share must be in [0, 1] and crowd at most symbols={self.symbols}, "
                f"got {self.share!r} and {self.crowd}; lower them, or give the task more symbols"
            )

    def _choose(self, batch_size: int, pairs: int, generator: torch.Generator) -> list[torch.Tensor]:
        chosen = distinct(self.crowd, self.symbols, batch_size, generator)
        crowded = rand(batch_size, 1, generator=generator) < self.share
        inside = torch.zeros(batch_size, self.symbols, dtype=torch.bool, device=chosen.device)
        inside = inside.scatter(1, chosen, crowded.expand_as(chosen))
        return [
            words[(rand(batch_size, self.words, generator=generator) + inside[:, words].all(2)).topk(pairs).indices]
            for words in _words(self.symbols, self.words, self.word_seed, generator.device)
        ]


@lru_cache(maxsize=8)
def _words(symbols: int, words: int, seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Two vocabularies of distinct pairs of numbers below `symbols`, each (words, 2)."""
    generator = torch.Generator().manual_seed(seed)
    codes = [torch.randperm(symbols**2, generator=generator, device="cpu")[:words] for _ in range(2)]
    keys, values = (torch.stack([code // symbols, code % symbols], 1).to(device) for code in codes)
    return keys, values
