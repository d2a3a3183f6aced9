"""A cloze set of one's own text: final words that the passage before them tells, as a local task of lm-eval.

After LAMBADA (arXiv 1606.06031), with rules in place of its human judges. A passage is a sentence of a document with as
many sentences before it as hold at least 50 words together, at most 150. Asked for is the sentence's last word, without
its full stop, where

- it has four letters or more, all of them lower-case a to z, and the sentence has five words or more,
- it stands as a word in the sentences before, and no other time in the sentence itself.

Passages don't overlap. Contexts of 50 to 200 words are short for any model: a change of its attention that is meant for
long ones should leave the score as it is.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .data import load_documents
from .options import option

FEWEST_WORDS, MOST_WORDS = 50, 150  # before the sentence
SENTENCE_WORDS = (5, 50)
_LAST = re.compile(r"(.*\s)([a-z]{4,})[.!?]", re.DOTALL)
# What lm-eval takes: greedy accuracy of the word, and the perplexity of a word.
_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{' ' + word}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
metadata:
  version: 1.0
"""


def cloze_items(text: str) -> Iterator[dict[str, str]]:
    """The passages of one document, from its beginning on.

    Args:
        text: the document; line breaks are taken as spaces.

    Yields:
        context, the passage without its last word and the space before it; and word.
    """
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    begin = 0  # the first sentence that no passage has used
    for number, sentence in enumerate(sentences):
        found = _LAST.fullmatch(sentence)
        if found is None or not SENTENCE_WORDS[0] <= len(sentence.split()) <= SENTENCE_WORDS[1]:
            continue
        first, words = number, 0
        while words < FEWEST_WORDS and first > begin:
            first -= 1
            words += len(sentences[first].split())
        before = " ".join(sentences[first:number])
        word = found[2]
        if FEWEST_WORDS <= words <= MOST_WORDS and _has(before, word) and not _has(found[1], word):
            yield {"context": f"{before} {found[1].rstrip()}", "word": word}
            begin = number + 1


def _has(text: str, word: str) -> bool:
    return re.search(rf"\b{word}\b", text, re.IGNORECASE) is not None


def write_cloze(texts: Iterable[str], folder: str | Path, *, samples: int | None = None, seed: int = 0) -> int:
    """Write passages as a task of lm-eval that has the folder's name: NAME.jsonl and NAME.yaml.

    Args:
        texts: documents that no model was trained on.
        folder: made if it is not there. The task knows its data by the full path: write it again where it is moved.
        samples: so many passages, drawn from all; all of them if None.
        seed: of the draw.

    Returns:
        The number of passages.

    Raises:
        ValueError: the texts have no passage, or fewer than asked for.
    """
    items = [item for text in texts for item in cloze_items(text)]
    wanted = len(items) if samples is None else samples
    if not 1 <= wanted <= len(items):
        raise ValueError(
            f"samples must be between 1 and the {len(items)} passages that the texts have, got {wanted}; give more "
            "texts, or ask for fewer"
        )
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{folder.name}.jsonl"
    chosen = random.Random(seed).sample(items, wanted)
    file.write_text("".join(json.dumps(item) + "\n" for item in chosen), encoding="utf-8")
    task = _TASK.format(name=json.dumps(folder.name), file=json.dumps(str(file)))
    (folder / f"{folder.name}.yaml").write_text(task, encoding="utf-8")
    return wanted


@dataclass
class ClozeArguments:
    """Which texts, and where to."""

    data: str = field(metadata={"help": "Held-out documents: a file, glob, folder or Hub dataset id, as for training."})
    output_dir: str = field(metadata={"help": "Folder for the task; the task gets the folder's name."})
    data_split: str = option("train", "Split of --data; files are the split 'train'.")
    text_column: str = option("text", "Column with the text.")
    samples: int | None = option(None, "Passages, drawn from all; by default all. 1000 leave +-3 points.")
    seed: int = option(0, "Seed of the draw.")


def run_cloze(args: ClozeArguments) -> Iterator[str]:
    """Write the task; yields what was written, and the command that runs it.

    Raises:
        ValueError: there are too few passages, or an argument doesn't fit.
        OSError: a file is missing.
    """
    documents = load_documents(args.data, split=args.data_split, column=args.text_column)
    if args.text_column not in (columns := next(iter(documents))):
        raise ValueError(
            f"text_column of {args.data} must be one of {sorted(columns)} with text, got {args.text_column!r}; a "
            "passage is cut from text, not from tokens"
        )
    texts = (row[args.text_column] or "" for row in documents)
    count = write_cloze(texts, args.output_dir, samples=args.samples, seed=args.seed)
    folder = Path(args.output_dir)
    name = folder.resolve().name
    run = f"--include_path {folder} --tasks {name}"
    yield (
        f"written: {folder / name}.yaml and .jsonl, {count} passages\n"
        f"to evaluate: lm_eval --model hf --model_args pretrained=DIR,trust_remote_code=True {run}"
    )
