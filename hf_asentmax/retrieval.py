"""Retrieval from text: how often a model finds what stands somewhere in a context, by length and by depth.

`passkey` and `needle` take any causal language model with a tokenizer; generated tasks are in
:mod:`hf_asentmax.ladder`. The samples are the same for every model (of one tokenizer) and number of processes. The rows
are those of :func:`hf_asentmax.evaluation.result_row`. Lengths beyond the model's context are evaluated as well, uncut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .evaluation import check_positive, evaluating, model_names, progress_bar, result_row, results_table
from .haystack import Prompt, filler_sentences, needle_prompt, passkey_prompt, read_sentences
from .options import DTYPES, option
from .plots import write_report
from .sharding import gathered, is_main, join_processes, share

SPARE_TOKENS = 8  # generated beyond the answer's own: a newline before it, digits too many after it
# Beside do_sample what a checkpoint may say about sampling, which would be warned of.
_GREEDY: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}


def passkey(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    *,
    samples: int = 100,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """How often greedy decoding gives back a pass key of five digits from a random place in filler text, as the first
    number that it writes.

    Args:
        model: a causal language model that can `generate`.
        tokenizer: its tokenizer.
        lengths: tokens of prompt and answer together, at most; the filler fills them up by whole sentences.
        samples: prompts a length.
        seed: seed of keys and places.

    Returns:
        One row a length.

    Raises:
        ValueError: a length is too short for the question.
    """
    check_positive(lengths=lengths, samples=[samples])
    rows = []
    for length in lengths:
        prompts = [
            lambda i=i, n=length: passkey_prompt(tokenizer, n, identity=f"passkey {seed} {n} {i}", spare=SPARE_TOKENS)
            for i in range(samples)
        ]
        hits = _hits(model, tokenizer, prompts, _first_number, f"{length} tokens")
        rows.append(result_row("passkey", model, seed, length, hits, length))
    return rows


def needle(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    samples: int = 20,
    haystack: str | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """How often greedy decoding names a magic number of seven digits hidden in a text, by depth and length.

    Right is an answer that contains the number, as RULER scores.

    Args:
        model: a causal language model that can `generate`.
        tokenizer: its tokenizer.
        lengths: tokens of prompt and answer together, at most; the text fills them up by whole sentences.
        depths: places of the number, in % of the text.
        samples: prompts a cell.
        haystack: a text file; neutral generated sentences if None.
        seed: seed of the numbers, and of where in the text the haystack begins.

    Returns:
        One row a depth and length, with the column depth.

    Raises:
        FileNotFoundError: the haystack is missing.
        ValueError: a length is too short for the question, a depth is not in [0, 100], or the haystack is empty.
    """
    check_positive(lengths=lengths, samples=[samples])
    if not depths or not all(0 <= depth <= 100 for depth in depths):
        raise ValueError(f"depths must be percentages between 0 and 100, got {list(depths)!r}; try 0 25 50 75 100")
    sentences = filler_sentences(seed) if haystack is None else read_sentences(haystack)
    rows = []
    for length in lengths:
        prompts = [
            lambda i=i, n=length, depth=depth: needle_prompt(
                tokenizer, n, depth, sentences, identity=f"needle {seed} {n} {depth:g} {i}", spare=SPARE_TOKENS
            )
            for depth in depths
            for i in range(samples)
        ]
        hits = _hits(model, tokenizer, prompts, str.__contains__, f"{length} tokens")
        for number, depth in enumerate(depths):
            own = hits[number * samples : (number + 1) * samples]
            # A task of its own in the tables of a model card, which would take depths for repeated runs.
            rows.append(result_row(f"needle at depth {depth:g} %", model, seed, length, own, length) | {"depth": depth})
    return rows


def _first_number(text: str, answer: str) -> bool:
    return re.findall(r"\d+", text)[:1] == [answer]


def _hits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Callable[[], Prompt]],
    right: Callable[[str, str], bool],
    what: str,
) -> list[bool]:
    """Whether the model's continuation of each prompt is right; one prompt at a time, so that none is padded."""
    hits = []
    with evaluating(model), progress_bar(what, len(own := share(prompts))) as bar:
        for build in own:
            prompt = build()
            ids = torch.tensor([prompt.input_ids], device=model.device)
            padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
            greedy = GenerationConfig(**_GREEDY, max_new_tokens=prompt.room, pad_token_id=padding)
            output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)  # type: ignore[operator]
            text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            hits.append(right(str(text), prompt.answer))
            bar.update()
    return gathered(hits)


@dataclass
class RetrievalArguments:
    """What to evaluate, and on what."""

    model: list[str] = field(metadata={"help": "Folders or Hub ids of causal language models, softmax or ASEntmax."})
    task: str = option("needle", "What to retrieve.", ("needle", "passkey"))
    lengths: list[int] = option([512, 1024, 2048], "Tokens of prompt and answer together, at most.")
    depths: list[float] = option(
        [0.0, 25.0, 50.0, 75.0, 100.0], "needle: where it is hidden, in %% of the text. passkey hides it anywhere."
    )
    samples: int = option(20, "Samples in each cell; 20 leave +-20 points, 1000 leave +-3.")
    haystack: str | None = option(None, "Text file to hide the number in; by default simple generated sentences.")
    method: list[str] | None = option(
        None, "Names of the models in the results; by default the kind of their attention."
    )
    seed: int = option(0, "Seed of the samples; the same for every model.")
    dtype: str = option("float32", "Dtype of the weights.", DTYPES)
    output_dir: str | None = option(None, "Folder for results.json, results.md and the picture.")


def run_retrieval(args: RetrievalArguments) -> Iterator[str]:
    """Evaluate each model, and write the report; the main process yields the texts to print.

    Raises:
        ValueError: an argument doesn't fit.
        OSError: a file is missing.
    """
    names = model_names(args.method, args.model)
    device = join_processes()
    rows: list[dict[str, Any]] = []
    for name, source in zip(names, args.model, strict=True):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, args.dtype)).to(device)
        tokenizer = AutoTokenizer.from_pretrained(source)
        if args.task == "passkey":
            found = passkey(model, tokenizer, args.lengths, samples=args.samples, seed=args.seed)
        else:
            hay: dict[str, Any] = {"samples": args.samples, "haystack": args.haystack, "seed": args.seed}
            found = needle(model, tokenizer, args.lengths, args.depths, **hay)
        rows += [row if name is None else row | {"method": name} for row in found]
    if not is_main():
        return
    yield results_table(rows)
    if args.output_dir:
        yield f"written: {', '.join(map(str, write_report(rows, args.output_dir, title=args.task)))}"
