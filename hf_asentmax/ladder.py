"""The ladder: exact match on a generated task at ever longer lengths, in one forward pass for each batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .evaluation import check_positive, evaluating, progress_bar, result_row
from .samples import draw_chunk, sample_chunks
from .sharding import gathered, share
from .tasks import IGNORED, RetrievalTask, sample_batch

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
