"""Prompts that hide one fact in a long text and ask for it, at most so many tokens long.

Prompts are plain text that a base model can complete; no chat template is applied.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from transformers import PreTrainedTokenizerBase

PASSKEY_DIGITS = 5
NEEDLE_DIGITS = 7
SENTENCE_WORDS = 40  # a longer one, as in text without full stops, is cut into pieces of this many words

PASSKEY_FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
_FILLER = (
    ("The baker", "A neighbour", "The old teacher", "Her brother", "The ferryman", "A visitor", "The gardener"),
    ("walked slowly", "waited a while", "told a story", "carried a basket", "looked for shelter", "had a meal"),
    ("by the river", "behind the station", "near the market", "under the bridge", "at the edge of the wood"),
    ("before the rain came", "while the bells rang", "early in the morning", "after the harvest", "late at night"),
)
_FILLER_SENTENCES = 2000  # more than enough that repeats lie far apart; a longer haystack repeats them
_NAMES = (
    "amber", "birch", "cedar", "delta", "ember", "falcon", "garnet", "harbour", "indigo", "juniper", "lantern",
    "maple", "nectar", "orchid", "pepper", "quartz", "raven", "saffron", "tulip", "willow",
)  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """A prompt and what must come after it.

    Attributes:
        input_ids: the prompt's tokens, those that the tokenizer adds by itself included.
        answer: the digits asked for.
        room: tokens to generate: those of the answer, and some to spare.
    """

    input_ids: list[int]
    answer: str
    room: int


def filler_sentences(seed: int = 0) -> list[str]:
    """Neutral English sentences without any number, to hide a needle in."""
    source = random.Random(seed)
    return [f"{' '.join(source.choice(part) for part in _FILLER)}." for _ in range(_FILLER_SENTENCES)]


def read_sentences(path: str) -> list[str]:
    """The sentences of a text file, line breaks taken as spaces.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no words, or isn't UTF-8 text.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"haystack must be a text file, got {path!r}; check the path, or leave it out for generated sentences"
        )
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"haystack must be UTF-8 text, got {path!r}; convert it ({error})") from error
    sentences = []
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        words = sentence.split()
        sentences += [" ".join(words[i : i + SENTENCE_WORDS]) for i in range(0, len(words), SENTENCE_WORDS)]
    if not sentences:
        raise ValueError(f"haystack must hold words, got {path!r}: it is empty; give another file")
    return sentences


def passkey_prompt(
    tokenizer: PreTrainedTokenizerBase, length: int, *, identity: str, spare: int, depth: float | None = None
) -> Prompt:
    """A pass key of five digits in filler text.

    Args:
        tokenizer: the model's.
        length: the most tokens that prompt and answer may have together, `spare` included.
        identity: the seed; prompts of one identity and tokenizer are the same.
        spare: tokens to generate beyond the answer's own.
        depth: where it stands, in % of the text; drawn uniformly if None.

    Raises:
        ValueError: the length is too short for the question alone.

    Reference: the pass key task of arXiv 2305.16300.
    """
    source = random.Random(identity)
    key = _digits(source, PASSKEY_DIGITS)
    return _hide(
        tokenizer,
        f"The pass key is {key}. Remember it. {key} is the pass key.",
        PASSKEY_FILLER,
        before="There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
        "I will quiz you about the important information there.",
        after="What is the pass key? The pass key is",
        answer=key,
        depth=source.uniform(0, 100) if depth is None else depth,
        length=length,
        spare=spare,
    )


def needle_prompt(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    depth: float,
    sentences: Sequence[str],
    *,
    identity: str,
    spare: int,
) -> Prompt:
    """A magic number of seven digits between two sentences of a text.

    The text is as long as fits; it begins at a random sentence, and where it ends begins again.

    Args:
        tokenizer: the model's.
        length: the most tokens that prompt and answer may have together, `spare` included.
        depth: where the needle stands, in % of the text: 0 before the first sentence, 100 after the last.
        sentences: the haystack.
        identity: the seed; prompts of one identity, tokenizer and haystack are the same.
        spare: tokens to generate beyond the answer's own.

    Raises:
        ValueError: the length is too short for the question alone.

    Reference: wording and scoring after RULER, arXiv 2404.06654, single needle.
    """
    source = random.Random(identity)
    name, number = source.choice(_NAMES), _digits(source, NEEDLE_DIGITS)
    start = source.randrange(len(sentences))
    return _hide(
        tokenizer,
        f"One of the special magic numbers for {name} is: {number}.",
        [*sentences[start:], *sentences[:start]],
        before="A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.",
        after=f"What is the special magic number for {name} mentioned in the provided text? "
        f"The special magic number for {name} mentioned in the provided text is",
        answer=number,
        depth=depth,
        length=length,
        spare=spare,
    )


def _digits(source: random.Random, count: int) -> str:
    return str(source.randrange(10 ** (count - 1), 10**count))


def _hide(
    tokenizer: PreTrainedTokenizerBase,
    needle: str,
    sentences: Sequence[str],
    *,
    before: str,
    after: str,
    answer: str,
    depth: float,
    length: int,
    spare: int,
) -> Prompt:
    room = len(tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]) + spare

    def tokens(count: int) -> list[int]:
        """The prompt with so many sentences around the needle."""
        text = [sentences[i % len(sentences)] for i in range(count)]
        ends = list(accumulate((len(sentence) + 1 for sentence in text), initial=0))
        place = min(range(count + 1), key=lambda i: abs(ends[i] - depth / 100 * ends[-1]))
        hidden = " ".join([*text[:place], needle, *text[place:]])
        return list(tokenizer(f"{before}\n{hidden}\n{after}", verbose=False)["input_ids"])

    fits, least = 0, tokens(0)
    if len(least) + room > length:
        raise ValueError(
            f"length must be at least {len(least) + room} tokens for the question alone, got {length}; raise it"
        )
    beyond = 1
    while len(tokens(beyond)) + room <= length:
        fits, beyond = beyond, 2 * beyond
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        fits, beyond = (middle, beyond) if len(tokens(middle)) + room <= length else (fits, middle)
    return Prompt(tokens(fits), answer, room)
