"""Retrieval: how often a model finds what stands somewhere in a context, by length and by depth.

`synthetic_ladder` takes the generated tasks of :mod:`hf_asentmax.tasks`; `passkey` and `needle` take any causal
language model with a tokenizer. The samples are the same for every model (of one tokenizer), batch size and number of
processes. All give rows: task, method, seed, length, accuracy in %, its 95 % interval (low, high), samples, and
beyond_context, whether the sequences are longer than the config says. Such lengths are evaluated as well, uncut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import sqrt
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .haystack import Prompt, filler_sentences, needle_prompt, passkey_prompt, read_sentences
from .methods import method_name
from .sharding import gathered, is_main, share
from .tasks import RetrievalTask, sample_batch

SPARE_TOKENS = 8  # generated beyond the answer's own: a newline before it, digits too many after it
# Beside do_sample what a checkpoint may say about sampling, which would be warned of.
_GREEDY: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}


def wilson_interval(correct: int, samples: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share, in %."""
    quantile, right = 1.959964, correct / samples
    spread = quantile**2 / samples
    middle = (right + spread / 2) / (1 + spread)
    half = quantile / (1 + spread) * sqrt(right * (1 - right) / samples + spread / (4 * samples))
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def teacher_forced_hits(model: PreTrainedModel, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Whether greedy decoding would give each row's answer, from one forward pass.

    It does if and only if every answer token is the most likely one given the right tokens before it.

    Args:
        model: a causal language model.
        input_ids: (B, T), int64, the answers included.
        labels: (B, T), int64, -100 but on the answers; each row has at least one.

    Returns:
        (B,) bool, all answer tokens right; (B,) float32, share of the answer tokens that are right.
    """
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    asked = labels[:, 1:] != -100
    best = model.get_output_embeddings()(hidden[:, :-1][asked]).argmax(-1)
    right = torch.zeros_like(asked)
    right[asked] = best == labels[:, 1:][asked]
    counts = asked.sum(1)
    return right.sum(1) == counts, right.sum(1) / counts


def synthetic_ladder(
    model: PreTrainedModel,
    task: RetrievalTask,
    lengths: Sequence[int],
    *,
    samples: int = 1000,
    batch_tokens: int = 1 << 15,
    seed: int = 0,
    stream: str = "test",
) -> list[dict[str, Any]]:
    """Exact match on a generated task at several lengths, under greedy decoding.

    Args:
        model: a causal language model over the task's vocabulary.
        task: see :func:`hf_asentmax.tasks.build_task`.
        lengths: lengths of the source in tokens; the query and the answer come after it.
        samples: sequences a length.
        batch_tokens: tokens in a forward pass, at most (but for a single sequence that has more).
        seed: number of the experiment, from which the sequences are drawn.
        stream: "validation" to choose by, "test" to report.

    Returns:
        One row a length, with token_accuracy, the share of answer tokens that are right, in %.

    Raises:
        ValueError: the task's vocabulary is larger than the model's, or it refuses a length.
    """
    _check(lengths=lengths, samples=[samples], batch_tokens=[batch_tokens])
    vocabulary = model.get_output_embeddings().weight.shape[0]
    if task.vocab_size > vocabulary:
        raise ValueError(
            f"vocabulary of {task.name} must be at most the model's {vocabulary} tokens, got {task.vocab_size}; "
            "give the settings of the task that the model was trained on"
        )
    rows, own = [], share(range(samples))
    for length in lengths:
        total = sample_batch(task, 1, length, stream=stream, seed=seed)["input_ids"].shape[1]
        step = max(1, batch_tokens // total)
        hits: list[tuple[bool, float]] = []
        with _evaluating(model), _bar(f"{length} tokens", len(own)) as bar:
            for start in range(0, len(own), step):
                # Drawn one by one: a sample depends neither on the batch size nor on the number of processes.
                part = [
                    sample_batch(task, 1, length, stream=stream, seed=seed, index=index)
                    for index in own[start : start + step]
                ]
                batch = {name: torch.cat([one[name] for one in part]).to(model.device) for name in part[0]}
                exact, tokens = teacher_forced_hits(model, **batch)
                hits += zip(exact.tolist(), tokens.tolist(), strict=True)
                bar.update(len(part))
        hits = gathered(hits)
        row = _row(task.name, model, seed, length, [exact for exact, _ in hits], total)
        rows.append(row | {"token_accuracy": 100 * fmean(tokens for _, tokens in hits)})
    return rows


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
    _check(lengths=lengths, samples=[samples])
    rows = []
    for length in lengths:
        prompts = [
            lambda i=i, n=length: passkey_prompt(tokenizer, n, identity=f"passkey {seed} {n} {i}", spare=SPARE_TOKENS)
            for i in range(samples)
        ]
        hits = _hits(model, tokenizer, prompts, _first_number, f"{length} tokens")
        rows.append(_row("passkey", model, seed, length, hits, length))
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
    _check(lengths=lengths, samples=[samples])
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
            rows.append(_row(f"needle at depth {depth:g} %", model, seed, length, own, length) | {"depth": depth})
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
    with _evaluating(model), _bar(what, len(own := share(prompts))) as bar:
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


def _row(
    task: str, model: PreTrainedModel, seed: int, length: int, hits: Sequence[bool], tokens: int
) -> dict[str, Any]:
    low, high = wilson_interval(sum(hits), len(hits))
    limit = getattr(model.config, "max_position_embeddings", None)
    return {
        "task": task,
        "method": method_name(model.config),
        "seed": seed,
        "length": length,
        "accuracy": 100 * sum(hits) / len(hits),
        "low": low,
        "high": high,
        "samples": len(hits),
        "beyond_context": limit is not None and tokens > limit,
    }


def _check(**values: Sequence[int]) -> None:
    for name, given in values.items():
        if not given or min(given) < 1:
            raise ValueError(f"{name} must be positive, got {list(given)!r}; give at least 1")


def _bar(what: str, total: int) -> tqdm:
    return tqdm(total=total, desc=what, unit=" samples", leave=False, disable=not is_main())


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """No gradients and eval mode; the model is left as it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `synthetic_ladder`, `passkey` or `needle` as a Markdown table, with a note where one is needed."""
    titles = {"method": "method", "seed": "seed", "length": "length", "depth": "depth", "accuracy": "accuracy, %"}
    titles |= {"": "95 % interval", "token_accuracy": "answer tokens, %", "samples": "samples"}
    columns = [name for name in titles if name == "" or name in rows[0]]
    lines = [[titles[name] for name in columns]]
    for row in rows:
        cells = {name: str(row[name]) for name in columns if name}
        cells["length"] = f"{row['length']:,}{' *' if row['beyond_context'] else ''}"
        cells[""] = f"{row['low']:.1f} to {row['high']:.1f}"
        cells |= {name: f"{row[name]:.1f}" for name in ("accuracy", "token_accuracy") if name in row}
        if "depth" in row:
            cells["depth"] = f"{row['depth']:g} %"
        lines.append([cells[name] for name in columns])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    text = ["| " + " | ".join(map(str.rjust, line, widths)) + " |" for line in lines]
    if any(row["beyond_context"] for row in rows):
        text += ["", "\\* longer than the context that the model's config states (max_position_embeddings); not cut."]
    return "\n".join(text)
