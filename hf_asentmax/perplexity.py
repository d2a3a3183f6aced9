"""Perplexity of a causal language model, by context length and by position.

Different context lengths score different tokens unless one takes care: here every length scores the *same* final tokens
of the same documents, so that a difference is the context's. Intervals are bootstrapped by document.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from .blocks import check_block, read_in_blocks
from .checkpoints import write_json
from .data import long_documents
from .evaluation import beyond_context_note, evaluating, markdown_table, progress_bar
from .extrapolation import BLOCK_HELP, ROPE_HELP, readings, set_context
from .methods import method_name
from .options import DTYPES, option
from .plots import plot_perplexity
from .sharding import gathered, is_main, join_processes, share

LOGITS_AT_ONCE = 1 << 28  # float32 elements, 1 GiB: positions x vocabulary
BATCH_TOKENS = 1 << 14  # documents of one length in a forward pass, one at least
BOOTSTRAP_SAMPLES = 2000

Rows = list[dict[str, Any]]


@torch.no_grad()
def token_losses(model: PreTrainedModel, input_ids: Tensor, scored: int, *, block: int = 0) -> Tensor:
    """Negative log-likelihood, nats, of the last ``scored`` tokens of each row given all before them.

    Args:
        model: a causal language model, in eval mode.
        input_ids: (B, L), int64, L > scored.
        scored: how many tokens to score, from the end.
        block: with 0 the text is read whole, else as :func:`hf_asentmax.blocks.read_in_blocks` does; at least scored.

    Returns:
        (B, scored), float32.
    """
    if 0 < block < input_ids.shape[1]:
        more = int(block == scored)  # the token before the first scored one is read with the last block
        past = read_in_blocks(model, input_ids[:, : input_ids.shape[1] - more], block=block)
        last = input_ids[:, -block - more :]
        output = model.base_model(input_ids=last, past_key_values=past, use_cache=True)
    else:
        output = model.base_model(input_ids=input_ids, use_cache=False)
    hidden = output.last_hidden_state[:, -scored - 1 : -1]
    head, targets = model.get_output_embeddings(), input_ids[:, -scored:]
    scaling = getattr(model.config, "logits_scaling", None)  # Granite's
    cap = getattr(model.config, "final_logit_softcapping", None)  # Gemma's

    def finished(logits: Tensor) -> Tensor:
        logits = logits if scaling is None else logits / scaling
        return logits if cap is None else torch.tanh(logits / cap) * cap

    step = max(1, LOGITS_AT_ONCE // (head.weight.shape[0] * len(input_ids)))
    losses = [
        F.cross_entropy(finished(head(part)).float().transpose(1, 2), target, reduction="none")
        for part, target in zip(hidden.split(step, dim=1), targets.split(step, dim=1), strict=True)
    ]
    return torch.cat(losses, dim=1)


def perplexity_by_length(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    scored: int = 512,
    block: int = 0,
) -> list[dict[str, Any]]:
    """Perplexity of the final tokens of each document at several context lengths.

    Only documents of at least ``max(lengths)`` tokens count, at every length; of each the last ``max(lengths)`` tokens
    are used, at every length behind the token that begins a sequence where all documents begin with it. Processes share
    the documents.

    Args:
        model: a causal language model; it is run in eval mode.
        documents: token ids.
        lengths: context lengths in tokens, the scored ones included.
        scored: tokens scored at the end of each document, the same at every length.
        block: with 0 the text is read whole, else as :func:`hf_asentmax.blocks.read_in_blocks` does; at least scored.

    Returns:
        One row a length: length, perplexity, its 95 % interval (low, high), documents, tokens, and losses, the mean
        negative log-likelihood of each document in nats, of which the perplexity is exp of the mean.

    Raises:
        ValueError: a length does not exceed ``scored``, the block is less, no document is long enough, or the model
            can't read in blocks.
    """
    if block:
        check_block(model.config, block)
        if block < scored:
            raise ValueError(f"block must be at least the {scored} scored tokens, got {block}; lower the scored tokens")
    if min(lengths) <= scored:
        raise ValueError(f"lengths must exceed the {scored} scored tokens, got {min(lengths)}; lower the scored tokens")
    longest = max(lengths)
    used = [ids for ids in documents if len(ids) >= longest]
    if not used:
        raise ValueError(
            f"documents must hold one of at least {longest} tokens, the longest has "
            f"{max(map(len, documents), default=0)}; lower the lengths or give longer documents"
        )
    begin = model.config.get_text_config().bos_token_id
    kept = 1 if begin is not None and all(ids[0] == begin for ids in used) else 0
    rows = []
    for length in lengths:
        parts = [[*ids[:kept], *ids[len(ids) - length + kept :]] for ids in share(used)]
        found = _losses(model, parts, scored, f"{length} tokens", block)
        losses = gathered([float(own.mean()) for own in found])
        about = {"documents": len(losses), "tokens": len(losses) * scored, "losses": losses}
        rows.append({"length": length} | _interval(np.asarray(losses)) | about)
    return rows


def perplexity_by_position(
    model: PreTrainedModel, documents: Sequence[Sequence[int]], length: int, *, buckets: int = 8
) -> list[dict[str, Any]]:
    """Perplexity of the first ``length`` tokens of each document, in buckets of equal width by position.

    Args:
        model: a causal language model.
        documents: token ids; those shorter than ``length`` don't count.
        length: tokens of each document.
        buckets: number of buckets.

    Returns:
        One row a bucket: positions first and last, perplexity, low, high, documents.

    Raises:
        ValueError: no document is long enough, or there are more buckets than tokens.
    """
    used = [ids for ids in documents if len(ids) >= length]
    if not used or not 1 <= buckets < length:
        raise ValueError(
            f"documents must hold one of at least {length} tokens and buckets must be fewer, got {buckets} buckets and "
            f"at most {max(map(len, documents), default=0)} tokens; lower --lengths or --buckets"
        )
    edges = np.linspace(1, length, buckets + 1).round().astype(int)
    spans = list(zip((edges[:-1] - 1).tolist(), (edges[1:] - 1).tolist(), strict=True))
    found = _losses(model, [ids[:length] for ids in share(used)], length - 1, f"positions to {length}")
    table = np.asarray(gathered([[float(own[a:b].mean()) for a, b in spans] for own in found]))
    return [
        {"first": a + 1, "last": b} | _interval(table[:, i]) | {"documents": len(table)}
        for i, (a, b) in enumerate(spans)
    ]


def _losses(
    model: PreTrainedModel, documents: Sequence[Sequence[int]], scored: int, what: str, block: int = 0
) -> Iterator[np.ndarray]:
    """The losses (scored,) of each of some documents of one length."""
    size = max(1, BATCH_TOKENS // max(map(len, documents), default=1))
    with evaluating(model), progress_bar(what, len(documents)) as bar:
        for start in range(0, len(documents), size):
            batch = torch.tensor([list(ids) for ids in documents[start : start + size]], device=model.device)
            set_context(model, batch.shape[1])
            yield from token_losses(model, batch, scored, block=block).cpu().numpy()
            bar.update(len(batch))


def _interval(means: np.ndarray) -> dict[str, float]:
    """exp of the mean over documents, with the 95 % interval of a bootstrap over them.

    The seed is fixed: of the same number of documents the same are drawn, so that differences are paired.
    """
    draws = np.random.default_rng(0).integers(0, len(means), size=(BOOTSTRAP_SAMPLES, len(means)))
    low, high = np.quantile(means[draws].mean(axis=1), [0.025, 0.975])
    return {"perplexity": math.exp(means.mean()), "low": math.exp(low), "high": math.exp(high)}


def compared(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with their perplexity as a multiple of the first model's at that length, and of the same model's at its
    shortest length, document by document.

    Args:
        rows: of :func:`perplexity_by_length`, with a column model; all models at the same lengths and documents.

    Returns:
        The rows with ratio (to the first model) and growth (since the shortest length), and their 95 % intervals
        ratio_low, ratio_high, growth_low and growth_high: a bootstrap by document of the difference of the two losses
        of each. Of what is its own measure they are 1.
    """
    losses = {(row["model"], row["length"]): np.asarray(row["losses"]) for row in rows}
    shortest = min(row["length"] for row in rows)
    together = []
    for row in rows:
        own = np.asarray(row["losses"])
        found = {**row}
        for name, other in (("ratio", (rows[0]["model"], row["length"])), ("growth", (row["model"], shortest))):
            interval = _interval(own - losses[other])
            found |= {name: interval["perplexity"], f"{name}_low": interval["low"], f"{name}_high": interval["high"]}
        together.append(found)
    return together


def perplexity_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `compared`, or those by position of several models, as a Markdown table."""
    models = {row["model"] for row in rows}
    by_length, several, runs = "length" in rows[0], len(models) > 1, len(models) > len({row["method"] for row in rows})
    header = [
        "method",
        *(["model"] if runs else []),
        "length" if by_length else "positions",
        "perplexity",
        "95 % interval",
    ]
    shares = {"ratio": "of the first model's"} if by_length and several else {}
    if by_length and len(lengths := sorted({row["length"] for row in rows})) > 1:
        shares["growth"] = f"of its own at {lengths[0]:,}"
    header += [cell for what in shares.values() for cell in (what, "95 % interval")]
    lines = []
    for row in rows:
        if by_length:
            where = f"{row['length']:,}{' *' if row['beyond_context'] else ''}"
        else:
            where = f"{row['first']:,}-{row['last']:,}"
        cells = [
            row["method"],
            *([row["model"]] if runs else []),
            where,
            f"{row['perplexity']:.2f}",
            f"{row['low']:.2f} to {row['high']:.2f}",
        ]
        for name in shares:
            cells += [f"{row[name]:.3f}", f"{row[f'{name}_low']:.3f} to {row[f'{name}_high']:.3f}"]
        lines.append([*cells, str(row["documents"])])
    text = markdown_table([*header, "documents"], lines)
    return "\n".join(text + beyond_context_note(rows))


@dataclass
class PerplexityArguments:
    """What to evaluate, and on what."""

    model: list[str] = field(
        metadata={"help": "Folders or Hub ids of causal language models or their adapters, softmax or ASEntmax."}
    )
    data: str = field(
        metadata={
            "help": "Held-out documents, text or tokens (input_ids): a file, glob, folder or Hub dataset id, as for "
            "training."
        }
    )
    data_split: str = option("train", "Split of --data; files are the split 'train'.")
    text_column: str = option(
        "text",
        "Column with the text, cut by the first model's tokenizer; where it is missing, tokens are taken from "
        "'input_ids'.",
    )
    lengths: list[int] = option([1024, 2048], "Context lengths in tokens, the scored ones included.")
    scored_tokens: int = option(512, "Final tokens of each document that are scored, the same at every length.")
    buckets: int = option(8, "Buckets of positions, at the longest length, of what is read whole; 0: none.")
    max_documents: int | None = option(None, "Use the first so many long enough documents.")
    method: list[str] | None = option(
        None, "Names of the models in the results; by default the kind of their attention. Models of one name are runs."
    )
    rope: list[str] | None = option(None, ROPE_HELP)
    block: list[int] = option([0], BLOCK_HELP)
    dtype: str = option("float32", "Dtype of the weights.", DTYPES)
    bf16: bool = option(False, "Compute in bfloat16 as training with --bf16 does (autocast).")
    output_dir: str | None = option(None, "Folder for results.json, results.md and the picture.")


def run_perplexity(args: PerplexityArguments) -> Iterator[str]:
    """Evaluate each model on the same tokens, and write the report after each; the main process yields the texts.

    Raises:
        ValueError: the documents are too short or hold tokens that a model lacks, or an argument doesn't fit.
        OSError: a file is missing.
    """
    models = readings(args.model, args.method, args.rope, args.block)  # before anything takes time
    device = join_processes()
    read, enough = long_documents(
        args.data,
        args.model,
        max(args.lengths),
        split=args.data_split,
        column=args.text_column,
        most=args.max_documents,
    )
    by_length: Rows = []
    by_position: Rows = []
    for reading in models:
        model = reading.load(dtype=args.dtype, device=device)
        _check_vocabulary(enough, reading.source, model.get_input_embeddings().weight.shape[0])
        own = reading.label(method_name(model.config))
        limit = getattr(model.config, "max_position_embeddings", None)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            for row in perplexity_by_length(
                model, enough, args.lengths, scored=args.scored_tokens, block=reading.block
            ):
                by_length.append(own | row | {"beyond_context": limit is not None and row["length"] > limit})
            if args.buckets and not reading.block:
                rows = perplexity_by_position(model, enough, max(args.lengths), buckets=args.buckets)
                by_position += [own | row for row in rows]
        if is_main():  # after each model, so that what is stopped leaves what it found
            text, written = _report(args, read, len(enough), by_length, by_position)
    if not is_main():
        return
    yield text
    if written:
        yield f"written: {', '.join(map(str, written))}"


def _report(
    args: PerplexityArguments, read: int, scored: int, by_length: Rows, by_position: Rows
) -> tuple[str, list[Path]]:
    """The text to print, and the files that hold it, if there is a folder for them."""
    by_length = compared(by_length)
    about = (
        f"The final {args.scored_tokens} tokens of {scored} documents, the same at every length: of {read} read, "
        f"those of at least {max(args.lengths):,} tokens."
    )
    text = "\n\n".join([about, perplexity_table(by_length), *([perplexity_table(by_position)] if by_position else [])])
    if not args.output_dir:
        return text, []
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    results = {"settings": asdict(args), "documents_read": read, "by_length": by_length, "by_position": by_position}
    write_json(folder / "results.json", results)
    (folder / "results.md").write_text(text + "\n", encoding="utf-8")
    picture = plot_perplexity(by_length, folder / "perplexity.png", title=about.split(",")[0])
    return text, [folder / "results.json", folder / "results.md", picture]


def _check_vocabulary(documents: Sequence[Sequence[int]], source: str, size: int) -> None:
    largest = max(map(max, documents))
    if largest >= size:
        raise ValueError(
            f"tokens of the documents must be below the {size} of {source}, got {largest}; give documents that were "
            "cut by its tokenizer"
        )
