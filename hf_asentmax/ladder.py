"""The ladder: exact match on a generated task at ever longer lengths, in one forward pass for each batch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from .evaluation import check_positive, evaluating, model_names, progress_bar, result_row, results_table
from .options import DTYPES, option
from .plots import write_report
from .samples import draw_chunk, sample_chunks
from .sharding import gathered, is_main, join_processes, share
from .tasks import IGNORED, STREAMS, TASKS, RetrievalTask, load_task, sample_batch

LENGTHS = tuple(64 * times for times in (1, 2, 4, 8, 16, 64, 256, 1024))  # to 65,536; 64 is trained on
LONG = 4096  # tokens of a source; beyond it there are fewer samples
HEAD_POSITIONS = 1 << 12  # so many have logits at once


def teacher_forced_hits(model: PreTrainedModel, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Whether every label of a row is the most likely token at the place before it, from one forward pass.

    Where the labels are the row's own tokens, this says whether greedy decoding would give its answer. Where they are
    classes of its tokens (2Back, local count) nothing is decoded, and this pass is the evaluation itself. Only answers
    get logits. With inputs on the CPU it returns before the device is done: the caller can draw the next meanwhile.

    Args:
        model: a causal language model.
        input_ids: (B, T), int64, the answers included where a model reads them.
        labels: (B, T), int64, -100 but on the answers; each row has at least one.

    Returns:
        (B,) bool, all answer tokens right; (B,) float32, share of the answer tokens that are right; on the model's
        device.
    """
    asked = (labels[:, 1:] != IGNORED).nonzero()  # found where the labels are: nonzero waits for its device
    input_ids, labels, asked = (_moved(x, model.device) for x in (input_ids, labels, asked))
    row, place = asked.unbind(1)
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[row, place]
    head = model.get_output_embeddings()
    best = torch.cat([head(part).argmax(-1) for part in hidden.split(HEAD_POSITIONS)])
    right = (best == labels[row, place + 1]).long()
    count = torch.stack([right, torch.ones_like(right)])
    found, asked_for = count.new_zeros(2, len(input_ids)).index_add_(1, row, count)
    return found == asked_for, found / asked_for


def _moved(x: Tensor, device: torch.device) -> Tensor:
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)  # from other memory the copy waits for the device
    return x.to(device)


def synthetic_ladder(
    model: PreTrainedModel,
    task: RetrievalTask,
    lengths: Sequence[int] = LENGTHS,
    *,
    samples: int = 1000,
    samples_beyond: int = 200,
    batch_tokens: int = 1 << 15,
    seed: int = 0,
    stream: str = "test",
) -> list[dict[str, Any]]:
    """Exact match on a generated task at several lengths: all answer tokens right, see :func:`teacher_forced_hits`.

    The samples (:mod:`hf_asentmax.samples`) are the same for every model, and lengths beyond the model's context are
    evaluated as well, uncut. Processes share the samples.

    Args:
        model: a causal language model over the task's vocabulary.
        task: see :func:`hf_asentmax.tasks.build_task`.
        lengths: lengths of the source in tokens; special tokens, queries and the answer come on top.
        samples: sequences a length.
        samples_beyond: sequences a length beyond 4096 tokens, if that is fewer.
        batch_tokens: tokens in a forward pass, at most (but for a single sequence that has more).
        seed: number of the experiment, from which the sequences are drawn.
        stream: "validation" to choose by, "test" to report.

    Returns:
        One row a length, see :func:`hf_asentmax.evaluation.result_row`, with stream, and token_accuracy, the share of
        answer tokens that are right, in %.

    Raises:
        ValueError: the task's vocabulary is larger than the model's, or it refuses a length.
    """
    check_positive(lengths=lengths, samples=[samples], samples_beyond=[samples_beyond], batch_tokens=[batch_tokens])
    vocabulary = model.get_output_embeddings().weight.shape[0]
    if task.vocab_size > vocabulary:
        raise ValueError(
            f"vocabulary of {task.name} must be at most the model's {vocabulary} tokens, got {task.vocab_size}; "
            "give the settings of the task that the model was trained on"
        )
    # One of each length before anything is computed: the task may refuse the last one.
    totals = [sample_batch(task, 1, length, stream=stream)["input_ids"].shape[1] for length in lengths]
    rows = []
    for length, total in zip(lengths, totals, strict=True):
        chunks = share(sample_chunks(samples if length <= LONG else min(samples, samples_beyond), length))
        drawn = (
            sample
            for chunk in chunks
            for sample in zip(*draw_chunk(task, chunk, length, stream=stream, seed=seed), strict=True)
        )
        hits = [torch.zeros(2, 0, device=model.device)]  # exact, and the share of the tokens; a process may have none
        with evaluating(model), progress_bar(f"{length} tokens", sum(map(len, chunks))) as bar:
            while batch := list(islice(drawn, max(1, batch_tokens // total))):
                input_ids, labels = map(torch.stack, zip(*batch, strict=True))
                hits.append(torch.stack(teacher_forced_hits(model, input_ids, labels)))
                bar.update(len(batch))
            exact, tokens = map(gathered, torch.cat(hits, 1).tolist())  # waits for the device, once a length
        row = result_row(task.name, model, seed, length, list(map(bool, exact)), total)
        rows.append(row | {"stream": stream, "token_accuracy": 100 * fmean(tokens)})
    return rows


@dataclass
class LadderArguments:
    """What to evaluate, and on what."""

    model: list[str] = field(
        metadata={"help": "Folders or Hub ids of causal language models or their adapters, softmax or ASEntmax."}
    )
    task: str | None = option(None, "The task; by default the one of task.json.", sorted(TASKS))
    task_options: str | None = option(
        None, "Options of the task as JSON, such as '{\"values\": 10}'; else task.json's, else defaults."
    )
    lengths: list[int] = option(
        list(LENGTHS), "Tokens of the source; special tokens, queries and the answer come on top."
    )
    samples: int = option(1000, "Samples at each length; 200 leave +-7 points, 1000 +-3.")
    samples_beyond: int = option(200, "Samples beyond 4096 tokens, at most.")
    stream: str = option("test", "What to draw from; choose settings on validation.", STREAMS[1:])
    seed: int = option(0, "Seed of the samples; the same for every model.")
    batch_tokens: int = option(1 << 15, "Tokens in a forward pass; changes memory, not the samples.")
    dtype: str = option("float32", "Dtype of the weights.", DTYPES)
    bf16: bool = option(False, "Compute in bfloat16 as training with --bf16 does (autocast).")
    method: list[str] | None = option(
        None, "Names of the models in the results; by default the kind of their attention."
    )
    output_dir: str | None = option(None, "Folder for results.json, results.md and the picture.")


def run_ladder(args: LadderArguments) -> Iterator[str]:
    """Evaluate each model, and write the report after each; the main process yields the texts to print.

    Raises:
        ValueError: an argument doesn't fit, or no task is named.
        OSError: a file is missing.
    """
    names = model_names(args.method, args.model)
    options = json.loads(args.task_options) if args.task_options else None
    tasks = [load_task(args.task, source, options) for source in args.model]

    device = join_processes()
    rows: list[dict[str, Any]] = []
    written: list[Path] = []
    for name, source, task in zip(names, args.model, tasks, strict=True):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, args.dtype)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            found = synthetic_ladder(
                model,
                task,
                args.lengths,
                samples=args.samples,
                samples_beyond=args.samples_beyond,
                batch_tokens=args.batch_tokens,
                seed=args.seed,
                stream=args.stream,
            )
        own = {"model": source} if name is None else {"model": source, "method": name}
        rows += [row | own for row in found]
        if args.output_dir and is_main():  # after each model, so that what is stopped leaves what it found
            title = f"{', '.join(dict.fromkeys(row['task'] for row in rows))}, {args.stream}"
            written = write_report(rows, args.output_dir, title=title)
    if not is_main():
        return
    yield results_table(rows)
    if args.output_dir:
        yield f"written: {', '.join(map(str, written))}"
