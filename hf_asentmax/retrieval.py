"""Retrieval from text: how often a model finds what stands somewhere in a context, by length and by depth.

The tasks (:mod:`hf_asentmax.text_tasks`) take any causal language model with a tokenizer; generated tasks are in
:mod:`hf_asentmax.ladder`. The samples are the same for every model (of one tokenizer) and number of processes. The rows
are those of :func:`hf_asentmax.evaluation.result_row`. Lengths beyond the model's context are evaluated as well, uncut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .blocks import check_block, read_in_blocks
from .evaluation import check_positive, evaluating, progress_bar, result_row, results_table
from .extrapolation import BLOCK_HELP, ROPE_HELP, readings, set_context
from .haystack import Prompt, build_prompt, filler_sentences, read_sentences
from .options import DTYPES, option
from .plots import write_report
from .sharding import gathered, is_main, join_processes, share
from .text_tasks import DEPTH_TASKS, TASKS

SPARE_TOKENS = 8  # generated beyond the answer's own: a newline before it, digits too many after it
# Beside do_sample what a checkpoint may say about sampling, which would be warned of.
_GREEDY: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}


def retrieve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    lengths: Sequence[int],
    *,
    depths: Sequence[float] | None = None,
    samples: int = 100,
    haystack: str | None = None,
    seed: int = 0,
    batch_size: int = 1,
    block: int = 0,
) -> list[dict[str, Any]]:
    """How much of what a prompt asks for greedy decoding gives back, by length and, where asked, by depth.

    The accuracy is the mean share of the answers that the text contains, as RULER scores; of passkey, how often the
    first number that is written is the key. The interval is that of a share of right samples, which is the widest where
    a sample has several answers.

    Args:
        model: a causal language model that can `generate`.
        tokenizer: its tokenizer.
        task: a key of :data:`hf_asentmax.text_tasks.TASKS`.
        lengths: tokens of prompt and answer together, at most; the text fills them up by whole sentences or words.
        depths: places of what is asked for, in % of the text; needle and multikey only. None: anywhere.
        samples: prompts a cell.
        haystack: a text file; neutral generated sentences if None. passkey and the tasks of words have their own.
        seed: seed of the prompts.
        batch_size: prompts generated at once, padded on the left; with 1 none is padded.
        block: with 0 prompts are read whole, else as :func:`hf_asentmax.blocks.read_in_blocks` does, one at once.

    Returns:
        One row a length, or depth and length, with the column depth.

    Raises:
        FileNotFoundError: the haystack is missing.
        ValueError: there is no such task, a length is too short for the question, a depth is not in [0, 100] or the
            task has none, the haystack is empty, or the model can't read in blocks, or not several prompts at once.
    """
    check_task(task)
    if block:
        check_block(model.config, block)
        if batch_size > 1:
            raise ValueError(f"batch_size must be 1 where prompts are read in blocks, got {batch_size}; leave it out")
    check_positive(lengths=lengths, samples=[samples], batch_size=[batch_size])
    if depths is not None and task not in DEPTH_TASKS:
        raise ValueError(f"depths must be None for {task}, got {list(depths)!r}; {', '.join(DEPTH_TASKS)} have them")
    if depths is not None and (not depths or not all(0 <= depth <= 100 for depth in depths)):
        raise ValueError(f"depths must be percentages between 0 and 100, got {list(depths)!r}; try 0 25 50 75 100")
    sentences = filler_sentences(seed) if haystack is None else read_sentences(haystack)
    rows = []
    for length in lengths:
        places = [None] if depths is None else depths
        prompts = [
            lambda i=i, n=length, depth=depth: build_prompt(
                task,
                tokenizer,
                n,
                identity=f"{task} {seed} {n} {'' if depth is None else f'{depth:g} '}{i}",
                spare=SPARE_TOKENS,
                sentences=sentences,
                depth=depth,
            )
            for depth in places
            for i in range(samples)
        ]
        right = _first_number if task == "passkey" else _share
        hits = _scores(model, tokenizer, prompts, right, f"{task}, {length} tokens", batch_size, block)
        for number, depth in enumerate(places):
            own = hits[number * samples : (number + 1) * samples]
            if depth is None:
                rows.append(result_row(task, model, seed, length, own, length))
            else:  # a task of its own in the tables of a model card, which would take depths for repeated runs
                row = result_row(f"{task} at depth {depth:g} %", model, seed, length, own, length)
                rows.append(row | {"depth": depth})
    return rows


def check_task(task: str) -> None:
    """Raise ValueError unless there is such a task."""
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}; correct the spelling")


def training_samples(
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    length: int,
    samples: int,
    *,
    haystack: str | None = None,
    seed: int = 0,
) -> Iterator[dict[str, str]]:
    """Prompts with their answers to fine-tune on, the tasks in turn; what is asked for stands anywhere.

    They have seeds of their own: numbers, names, places and generated sentences are drawn apart from those of
    :func:`retrieve`, whatever both seeds are. A haystack is the same text: give another one than the evaluation's.

    Args:
        tokenizer: of the model to train.
        tasks: keys of :data:`hf_asentmax.text_tasks.TASKS`.
        length: tokens of prompt, answer and end together, at most.
        samples: of all tasks together.
        haystack: a text file; neutral generated sentences if None.
        seed: seed of the prompts.

    Yields:
        prompt, completion (" A, B, C.") and task; the names that TRL gives to the first two.

    Raises:
        FileNotFoundError: the haystack is missing.
        ValueError: there is no such task, or a length is too short for the question.
    """
    for task in tasks:
        check_task(task)
    check_positive(length=[length], samples=[samples], tasks=[len(tasks)])
    sentences = filler_sentences(f"train {seed}") if haystack is None else read_sentences(haystack)
    for i in range(samples):
        task = tasks[i % len(tasks)]
        prompt = build_prompt(
            task, tokenizer, length, identity=f"train {task} {seed} {i}", spare=SPARE_TOKENS, sentences=sentences
        )
        yield {"prompt": prompt.text, "completion": f" {', '.join(prompt.answers)}.", "task": task}


def _first_number(text: str, answers: Sequence[str]) -> float:
    return float(re.findall(r"\d+", text)[:1] == [*answers])


def _share(text: str, answers: Sequence[str]) -> float:
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)


def _batches(builds: Sequence[Callable[[], Prompt]], size: int) -> Iterator[list[Prompt]]:
    """The prompts by batches; while one is worked on, threads cut the texts of the next to their length."""
    with ThreadPoolExecutor() as threads:
        ahead: list[Future[Prompt]] = []
        for start in range(0, len(builds) + size, size):
            batch = [prompt.result() for prompt in ahead]
            ahead = [threads.submit(build) for build in builds[start : start + size]]
            if batch:
                yield batch


def _scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Callable[[], Prompt]],
    score: Callable[[str, Sequence[str]], float],
    what: str,
    batch_size: int,
    block: int,
) -> list[float]:
    """The score of the model's continuation of each prompt."""
    scores = []
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with evaluating(model), progress_bar(what, len(own := share(prompts))) as bar:
        for batch in _batches(own, batch_size):
            longest, room = max(len(prompt.input_ids) for prompt in batch), max(prompt.room for prompt in batch)
            empty = [longest - len(prompt.input_ids) for prompt in batch]
            ids = torch.tensor([[padding] * n + prompt.input_ids for n, prompt in zip(empty, batch, strict=True)])
            mask = torch.tensor([[0] * n + [1] * (longest - n) for n in empty])
            set_context(model, longest + room)
            greedy = GenerationConfig(**_GREEDY, max_new_tokens=room, pad_token_id=padding)
            ids, mask = ids.to(model.device), mask.to(model.device)
            past = {"past_key_values": read_in_blocks(model, ids, block=block)} if 0 < block < longest else {}
            output = model.generate(  # type: ignore[operator]
                ids, attention_mask=mask, generation_config=greedy, **past
            )
            for prompt, written in zip(batch, output[:, longest:], strict=True):
                text = tokenizer.decode(written[: prompt.room], skip_special_tokens=True)
                scores.append(score(str(text), prompt.answers))
                bar.update()
    return gathered(scores)


@dataclass
class RetrievalArguments:
    """What to evaluate, and on what."""

    model: list[str] = field(
        metadata={"help": "Folders or Hub ids of causal language models or their adapters, softmax or ASEntmax."}
    )
    task: list[str] = option(["needle"], "What to retrieve.", tuple(TASKS))
    lengths: list[int] = option([512, 1024, 2048], "Tokens of prompt and answer together, at most.")
    depths: list[float] = option(
        [0.0, 25.0, 50.0, 75.0, 100.0],
        f"{' and '.join(DEPTH_TASKS)}: where it is hidden, in %% of the text. In other tasks it stands anywhere.",
    )
    samples: int = option(20, "Samples in each cell; 20 leave +-20 points, 1000 leave +-3.")
    haystack: str | None = option(None, "Text file to hide facts in; by default simple generated sentences.")
    method: list[str] | None = option(
        None, "Names of the models in the results; by default the kind of their attention. Models of one name are runs."
    )
    rope: list[str] | None = option(None, ROPE_HELP)
    block: list[int] = option([0], BLOCK_HELP)
    seed: int = option(0, "Seed of the samples; the same for every model.")
    batch_size: int = option(1, "Prompts generated at once, padded on the left; with 1, and in blocks, none is padded.")
    dtype: str = option("float32", "Dtype of the weights.", DTYPES)
    bf16: bool = option(False, "Compute in bfloat16 as training with --bf16 does (autocast).")
    output_dir: str | None = option(
        None, "Folder for results.json, results.md and the picture; of several tasks each has a folder in it."
    )


def run_retrieval(args: RetrievalArguments) -> Iterator[str]:
    """Evaluate each model, and write the report; the main process yields the texts to print.

    Raises:
        ValueError: an argument doesn't fit.
        OSError: a file is missing.
    """
    models = readings(args.model, args.method, args.rope, args.block)  # before anything takes time
    device = join_processes()
    rows: dict[str, list[dict[str, Any]]] = {task: [] for task in args.task}
    written: dict[str, list[Path]] = {}
    for reading in models:
        model = reading.load(dtype=args.dtype, device=device)
        tokenizer = AutoTokenizer.from_pretrained(reading.source)
        for task, found in rows.items():
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                own = retrieve(
                    model,
                    tokenizer,
                    task,
                    args.lengths,
                    depths=args.depths if task in DEPTH_TASKS else None,
                    samples=args.samples,
                    haystack=args.haystack,
                    seed=args.seed,
                    batch_size=1 if reading.block else args.batch_size,
                    block=reading.block,
                )
            found += [row | reading.label(row["method"]) for row in own]
            if args.output_dir and is_main():  # after each task, so that what is stopped leaves what it found
                folder = Path(args.output_dir) / (task if len(rows) > 1 else "")
                written[task] = write_report(found, folder, title=task)
    if not is_main():
        return
    for task, found in rows.items():
        yield f"{task}\n\n{results_table(found)}" if len(rows) > 1 else results_table(found)
        if args.output_dir:
            yield f"written: {', '.join(map(str, written[task]))}"


@dataclass
class SamplesArguments:
    """Which samples to write, and where to."""

    tokenizer: str = field(metadata={"help": "Folder or Hub id of the tokenizer, or of the model to train."})
    output: str = field(metadata={"help": "The file, ending in .jsonl: prompt, completion and task of each sample."})
    task: list[str] = option(list(TASKS), "Tasks, in turn.", tuple(TASKS))
    length: int = option(1024, "Tokens of prompt, answer and end together, at most; --sequence_length of the training.")
    samples: int = option(10000, "Samples, of all tasks together.")
    haystack: str | None = option(None, "Text file to hide facts in, not the evaluation's; by default sentences.")
    seed: int = option(0, "Seed; evaluations draw from other seeds, whatever theirs is.")


def run_samples(args: SamplesArguments) -> Iterator[str]:
    """Write training samples of the retrieval tasks; yields what was written.

    Raises:
        ValueError: the file's ending is another, or an argument doesn't fit.
        OSError: the tokenizer or the haystack is missing.
    """
    path = Path(args.output)
    if path.suffix != ".jsonl":
        raise ValueError(f"output must end in .jsonl, got {args.output!r}; rename it")
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    samples = training_samples(tokenizer, args.task, args.length, args.samples, haystack=args.haystack, seed=args.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        for sample in tqdm(samples, total=args.samples, unit=" samples", leave=False):
            file.write(json.dumps(sample) + "\n")
    unfinished.replace(path)
    train = f"python scripts/finetune.py --data {path} --sequence_length {args.length} ..."
    yield f"written: {path}, {args.samples} samples of {', '.join(args.task)}\nto train on them: {train}"
