"""Prompts that hide facts in a long text and ask for them, at most so many tokens long.

Prompts are plain text that a base model can complete; no chat template is applied. The tasks and their scores are those
of RULER (arXiv 2404.06654), shortened so that they fit into 256 tokens of a usual tokenizer; the wording is our own, so
scores can't be compared with published ones.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .text_tasks import TASKS

SENTENCE_WORDS = 40  # a longer one, as in text without full stops, is cut into pieces of this many words

_FILLER = (
    ("The baker", "A neighbour", "The old teacher", "Her brother", "The ferryman", "A visitor", "The gardener"),
    ("walked slowly", "waited a while", "told a story", "carried a basket", "looked for shelter", "had a meal"),
    ("by the river", "behind the station", "near the market", "under the bridge", "at the edge of the wood"),
    ("before the rain came", "while the bells rang", "early in the morning", "after the harvest", "late at night"),
)
_FILLER_SENTENCES = 2000  # more than enough that repeats lie far apart; a longer haystack repeats them


@dataclass(frozen=True)
class Prompt:
    """A prompt and what must come after it.

    Attributes:
        text: the prompt.
        input_ids: its tokens, those that the tokenizer adds by itself included.
        answers: the strings asked for, in the order in which they are best given.
        room: tokens to generate: those of the answers with commas between, and some to spare.
    """

    text: str
    input_ids: list[int]
    answers: tuple[str, ...]
    room: int


def filler_sentences(seed: int | str = 0) -> list[str]:
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


def build_prompt(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    identity: str,
    spare: int,
    sentences: Sequence[str],
    depth: float | None = None,
) -> Prompt:
    """The longest prompt of a task that fits.

    Args:
        task: a key of :data:`hf_asentmax.text_tasks.TASKS`.
        tokenizer: the model's.
        length: the most tokens that prompt and answer may have together, `spare` included.
        identity: the seed; prompts of one task, identity, tokenizer and haystack are the same.
        spare: tokens to generate beyond the answer's own.
        sentences: the haystack, from a random sentence on; where it ends it begins again. passkey and the tasks of
            words have a text of their own.
        depth: where what is asked for stands, in % of the text: 0 before the first sentence, 100 after the last; drawn
            uniformly if None. Of needle, passkey and multikey; all other places are drawn.

    Raises:
        ValueError: the length is too short for the question alone.
    """
    text, answers = TASKS[task](random.Random(identity), sentences, depth)
    room = len(tokenizer(f" {', '.join(answers)}", add_special_tokens=False)["input_ids"]) + spare

    def tokens(count: int) -> list[int]:
        return list(tokenizer(text(count), verbose=False)["input_ids"])

    fits, ids = 0, tokens(0)
    if len(ids) + room > length:
        raise ValueError(
            f"length must be at least {len(ids) + room} tokens for the question alone, got {length}; raise it"
        )
    beyond, rate = length, 16.0  # a sentence or word has one token at least; how many, the last two texts tell
    while beyond - fits > 1:
        count = min(max(fits + int((length - room - len(ids)) / rate), fits + 1), beyond - 1)
        new = tokens(count)
        rate = max(1.0, (len(new) - len(ids)) / (count - fits))
        if len(new) + room <= length:
            fits, ids = count, new
        else:
            beyond = count
    return Prompt(text(fits), ids, tuple(answers), room)
