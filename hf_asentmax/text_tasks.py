"""The tasks of :mod:`hf_asentmax.haystack` as text: what is hidden, what is asked, and what the answers are.

Each is a function of a source of randomness, the sentences of the haystack and the depth (None: anywhere), which those
that have none leave aside.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import accumulate
from string import ascii_uppercase

PASSKEY_DIGITS = 5
NEEDLE_DIGITS = 7
NEEDLES = 4  # of multikey, multivalue and multiquery
CHAINS, HOPS = 2, 4  # of variables: each chain is one value and so many assignments of it to the next variable
COMMON_WORDS, COMMON_TIMES = 5, 6  # the others stand once in the list
FREQUENT_WORDS = 3
_FEWEST_WORDS = 30  # of the list of frequent_words: with fewer the third may not be more frequent than the fourth
_MOST_FREQUENT = 1000  # different words of it, enough for a million

PASSKEY_FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
_NAMES = (
    "amber", "birch", "cedar", "delta", "ember", "falcon", "garnet", "harbour", "indigo", "juniper", "lantern",
    "maple", "nectar", "orchid", "pepper", "quartz", "raven", "saffron", "tulip", "willow",
)  # fmt: skip

# A task as text: the prompt with so many sentences or words of whatever fills it, and the answers.
Draft = tuple[Callable[[int], str], Sequence[str]]


def passkey(source: random.Random, sentences: Sequence[str], depth: float | None) -> Draft:
    """A pass key of five digits in a few sentences that repeat, always `PASSKEY_FILLER`.

    Reference: the pass key task of arXiv 2305.16300.
    """
    key = _digits(source, PASSKEY_DIGITS)
    where = source.uniform(0, 100) if depth is None else depth
    return (
        _between(
            [(where, f"The pass key is {key}. Remember it. {key} is the pass key.")],
            PASSKEY_FILLER,
            before="There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
            "I will quiz you about the important information there.",
            after="What is the pass key? The pass key is",
        ),
        [key],
    )


def needle(source: random.Random, sentences: Sequence[str], depth: float | None) -> Draft:
    """A magic number of seven digits between two sentences of a text: RULER's single needle."""
    ((name, number),) = _magic_numbers(source, 1)
    return _needles(source, sentences, [(name, number, depth)], [name], [number])


def multikey(source: random.Random, sentences: Sequence[str], depth: float | None) -> Draft:
    """Four names with a magic number each, one of which is asked for: RULER's multi-key needle."""
    (name, number), *others = _magic_numbers(source, NEEDLES)
    facts = [(name, number, depth), *((*other, None) for other in others)]
    return _needles(source, sentences, facts, [name], [number])


def multivalue(source: random.Random, sentences: Sequence[str], depth: float | None) -> Draft:
    """One name with four magic numbers, all asked for: RULER's multi-value needle."""
    numbers = [number for _, number in _magic_numbers(source, NEEDLES)]
    name = source.choice(_NAMES)
    return _needles(source, sentences, [(name, number, None) for number in numbers], [name], numbers)


def multiquery(source: random.Random, sentences: Sequence[str], depth: float | None) -> Draft:
    """Four names with a magic number each, all asked for: RULER's multi-query needle."""
    names, numbers = zip(*_magic_numbers(source, NEEDLES), strict=True)
    facts = [(name, number, None) for name, number in zip(names, numbers, strict=True)]
    return _needles(source, sentences, facts, names, numbers)


def variables(source: random.Random, sentences: Sequence[str], depth: float | None) -> Draft:
    """Two chains of assignments, X = value, Y = X, ..., each after the one that it refers to; asked for are the
    variables of one value: RULER's variable tracking.
    """
    names = _different(CHAINS * (HOPS + 1), lambda: "".join(source.choices(ascii_uppercase, k=3)))
    values = _different(CHAINS, lambda: _digits(source, PASSKEY_DIGITS))
    facts: list[tuple[float, str]] = []
    for number, value in enumerate(values):
        chain = names[number * (HOPS + 1) : (number + 1) * (HOPS + 1)]
        places = sorted(source.uniform(0, 100) for _ in chain)
        for place, name, what in zip(places, chain, [value, *chain], strict=False):
            facts.append((place, f"VAR {name} = {what}."))
    text = _between(
        facts,
        _turned(source, sentences),
        before="Variables are set in the following text. Keep track of what each of them stands for.",
        after=f"Which {HOPS + 1} variables stand for {values[0]}? The variables that stand for {values[0]} are VAR",
    )
    return text, names[: HOPS + 1]


def common_words(source: random.Random, sentences: Sequence[str], depth: float | None) -> Draft:
    """A shuffled list of made-up words, of which five stand six times and are asked for, the others once: RULER's
    common words. A longer list has more of the others.
    """
    words = _different(COMMON_WORDS, lambda: _made_up_word(source))
    common = words[:]
    seed = source.random()

    def text(others: int) -> str:
        _different(COMMON_WORDS + others, lambda: _made_up_word(source), words)
        listed = _shuffled(common * COMMON_TIMES + words[COMMON_WORDS : COMMON_WORDS + others], seed)
        return (
            f"In this list {COMMON_WORDS} words stand {COMMON_TIMES} times each, the others once: {listed}.\n"
            f"Which {COMMON_WORDS} words stand there {COMMON_TIMES} times? These words are"
        )

    return text, common


def frequent_words(source: random.Random, sentences: Sequence[str], depth: float | None) -> Draft:
    """A shuffled list of made-up words whose frequencies fall as 1 / rank^2; the three most frequent are asked for:
    RULER's frequent words. In a longer list each word stands more often.
    """
    words = _different(_MOST_FREQUENT, lambda: _made_up_word(source))
    seed = source.random()

    def text(more: int) -> str:
        first = (_FEWEST_WORDS + more) * 6 / math.pi**2  # the shares 1 / k^2 add up to 1
        times = [int(first / rank**2) for rank in range(1, len(words) + 1)]
        listed = _shuffled([word for word, count in zip(words, times, strict=True) for _ in range(count)], seed)
        return (
            f"Some words of this list stand there more often than others: {listed}.\n"
            f"Which {FREQUENT_WORDS} words stand there most often? These words are"
        )

    return text, words[:FREQUENT_WORDS]


TASKS: dict[str, Callable[[random.Random, Sequence[str], float | None], Draft]] = {
    task.__name__: task
    for task in (
        needle,
        passkey,
        multikey,
        multivalue,
        multiquery,
        variables,
        common_words,
        frequent_words,
    )  # fmt: skip
}
DEPTH_TASKS = ("needle", "multikey")  # evaluated by depth and length


def _digits(source: random.Random, count: int) -> str:
    return str(source.randrange(10 ** (count - 1), 10**count))


def _made_up_word(source: random.Random) -> str:
    return "".join(source.choice("bdfgklmnprstvz") + source.choice("aeiou") for _ in range(3))


def _different(count: int, draw: Callable[[], str], known: list[str] | None = None) -> list[str]:
    """So many strings, all different; those known, which it adds to, are the first."""
    known = [] if known is None else known
    seen = set(known)
    while len(known) < count:
        if (new := draw()) not in seen:
            seen.add(new)
            known.append(new)
    return known


def _shuffled(words: Sequence[str], seed: float) -> str:
    """The words in an order that follows from the seed and their number."""
    return ", ".join(random.Random(seed).sample(words, len(words)))


def _magic_numbers(source: random.Random, count: int) -> list[tuple[str, str]]:
    """Names and numbers, all different."""
    numbers = _different(count, lambda: _digits(source, NEEDLE_DIGITS))
    return list(zip(source.sample(_NAMES, count), numbers, strict=True))


def _turned(source: random.Random, sentences: Sequence[str]) -> list[str]:
    """The sentences from a random one on, the first ones after the last."""
    start = source.randrange(len(sentences))
    return [*sentences[start:], *sentences[:start]]


def _needles(
    source: random.Random,
    sentences: Sequence[str],
    facts: Sequence[tuple[str, str, float | None]],
    asked: Sequence[str],
    answers: Sequence[str],
) -> Draft:
    """Magic numbers (name, number, depth) in a text, and a question for those of some names."""
    names = f"{', '.join(asked[:-1])} and {asked[-1]}" if len(asked) > 1 else asked[0]
    what, verb = ("magic number", "is") if len(answers) == 1 else ("magic numbers", "are")
    text = _between(
        [
            (source.uniform(0, 100) if depth is None else depth, f"A magic number of {name} is {number}.")
            for name, number, depth in facts
        ],
        _turned(source, sentences),
        before="The following text mentions magic numbers. Keep them in mind for the question at the end.",
        after=f"What {verb} the {what} of {names} in the text? The {what} of {names} in the text {verb}",
    )
    return text, answers


def _between(
    facts: Sequence[tuple[float, str]], sentences: Sequence[str], *, before: str, after: str
) -> Callable[[int], str]:
    """Facts, each with its depth in %, between so many sentences."""

    def text(count: int) -> str:
        hay = [sentences[i % len(sentences)] for i in range(count)]
        ends = list(accumulate((len(sentence) + 1 for sentence in hay), initial=0))
        for depth, fact in sorted(facts, reverse=True):  # from the end, so that the places before stay what they are
            hay.insert(min(range(count + 1), key=lambda i: abs(ends[i] - depth / 100 * ends[-1])), fact)
        return f"{before}\n{' '.join(hay)}\n{after}"

    return text
