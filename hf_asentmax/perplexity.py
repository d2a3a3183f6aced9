"""Perplexity of a causal language model, by context length and by position.

Different context lengths score different tokens unless one takes care: here every length scores the *same* final tokens
of the same documents, so that a difference is the context's. Intervals are bootstrapped by document.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .checkpoints import write_json
from .data import load_documents
from .options import DTYPES, option
from .packing import token_lists
from .sharding import gathered, is_main, join_processes, share

LOGITS_AT_ONCE = 1 << 28  # float32 elements, 1 GiB: positions x vocabulary
BOOTSTRAP_SAMPLES = 2000


@torch.no_grad()
def token_losses(model: PreTrainedModel, input_ids: Tensor, scored: int) -> Tensor:
    """Negative log-likelihood, nats, of the last ``scored`` tokens of each row given all before them.

    Args:
        model: a causal language model, in eval mode.
        input_ids: (B, L), int64, L > scored.
        scored: how many tokens to score, from the end.

    Returns:
        (B, scored), float32.
    """
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[:, -scored - 1 : -1]
    head, targets = model.get_output_embeddings(), input_ids[:, -scored:]
    step = max(1, LOGITS_AT_ONCE // (head.weight.shape[0] * len(input_ids)))
    losses = [
        F.cross_entropy(head(part).float().transpose(1, 2), target, reduction="none")
        for part, target in zip(hidden.split(step, dim=1), targets.split(step, dim=1), strict=True)
    ]
    return torch.cat(losses, dim=1)


def perplexity_by_length(
    model: PreTrainedModel, documents: Sequence[Sequence[int]], lengths: Sequence[int], *, scored: int = 512
) -> list[dict[str, Any]]:
    """Perplexity of the final tokens of each document at several context lengths.

    Only documents of at least ``max(lengths)`` tokens count; of each the last ``max(lengths)`` tokens are used.

    Args:
        model: a causal language model; it is run in eval mode, one document at a time.
        documents: token ids.
        lengths: context lengths in tokens, the scored ones included.
        scored: tokens scored at the end of each document, the same at every length.

    Returns:
        One row a length: length, perplexity, its 95 % interval (low, high), documents, tokens.

    Raises:
        ValueError: a length does not exceed ``scored``, or no document is long enough.
    """
    if min(lengths) <= scored:
        raise ValueError(f"lengths must exceed the {scored} scored tokens, got {min(lengths)}; lower the scored tokens")
    longest = max(lengths)
    used = [ids for ids in documents if len(ids) >= longest]
    if not used:
        raise ValueError(
            f"documents must hold one of at least {longest} tokens, the longest has "
            f"{max(map(len, documents), default=0)}; lower the lengths or give longer documents"
        )
    rows = []
    for length in lengths:
        means = [
            float(token_losses(model, torch.tensor([list(ids[-length:])], device=model.device), scored).mean())
            for ids in tqdm(share(used), desc=f"{length} tokens", unit=" documents", leave=False, disable=not is_main())
        ]
        means = gathered(means)
        rows.append(
            {"length": length} | _interval(np.asarray(means)) | {"documents": len(means), "tokens": len(means) * scored}
        )
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
    means = []
    for ids in tqdm(share(used), desc=f"positions to {length}", unit=" documents", leave=False, disable=not is_main()):
        losses = (
            token_losses(model, torch.tensor([list(ids[:length])], device=model.device), length - 1)[0].cpu().numpy()
        )
        means.append([float(losses[a - 1 : b - 1].mean()) for a, b in zip(edges[:-1], edges[1:], strict=True)])
    table = np.asarray(gathered(means))
    return [
        {"first": int(a), "last": int(b - 1)} | _interval(table[:, i]) | {"documents": len(table)}
        for i, (a, b) in enumerate(zip(edges[:-1], edges[1:], strict=True))
    ]


def _interval(means: np.ndarray) -> dict[str, float]:
    """exp of the mean over documents, with the 95 % interval of a bootstrap over them (fixed seed)."""
    draws = np.random.default_rng(0).integers(0, len(means), size=(BOOTSTRAP_SAMPLES, len(means)))
    low, high = np.quantile(means[draws].mean(axis=1), [0.025, 0.975])
    return {"perplexity": math.exp(means.mean()), "low": math.exp(low), "high": math.exp(high)}


@dataclass
class PerplexityArguments:
    """What to evaluate, and on what."""

    model: str = field(metadata={"help": "Folder or Hub id of a causal language model."})
    data: str = field(metadata={"help": "Held-out documents: a file, glob, folder or Hub dataset id, as for training."})
    data_split: str = option("train", "Split of --data; files are the split 'train'.")
    text_column: str = option("text", "Column with the text.")
    lengths: list[int] = option([1024, 2048], "Context lengths in tokens, the scored ones included.")
    scored_tokens: int = option(512, "Final tokens of each document that are scored, the same at every length.")
    buckets: int = option(8, "Buckets of positions, at the longest length; 0: none.")
    max_documents: int | None = option(None, "Use the first so many long enough documents.")
    dtype: str = option("float32", "Dtype of the weights.", DTYPES)
    output: str | None = option(None, "JSON file for the results.")


def run_perplexity(args: PerplexityArguments) -> Iterator[str]:
    """Evaluate, and write the results; the main process yields the table to print.

    Raises:
        ValueError: the documents are too short, or an argument doesn't fit.
        OSError: a file is missing.
    """
    documents = load_documents(args.data, split=args.data_split, column=args.text_column)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    enough = [ids for ids in token_lists(documents, tokenizer, args.text_column) if len(ids) >= max(args.lengths)]
    enough = enough[: args.max_documents]

    device = join_processes()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(device).eval()
    by_length = perplexity_by_length(model, enough, args.lengths, scored=args.scored_tokens)
    by_position = perplexity_by_position(model, enough, max(args.lengths), buckets=args.buckets) if args.buckets else []
    if not is_main():
        return
    line = "{:>13} {:>11} {:>9} {:>9} {:>10}".format
    lines = [line("length", "perplexity", "95 % low", "high", "documents")]
    for row in by_length + by_position:
        where = row.get("length") or f"{row['first']}-{row['last']}"
        lines.append(line(where, *(f"{row[name]:.2f}" for name in ("perplexity", "low", "high")), row["documents"]))
    yield "\n".join(lines)
    if args.output:
        path = Path(args.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"settings": asdict(args), "by_length": by_length, "by_position": by_position})
