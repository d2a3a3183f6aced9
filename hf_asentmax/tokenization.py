"""Training data tokenised once: a tokenizer learned from the texts, and their tokens as a `datasets` dataset."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .data import load_documents
from .packing import token_lists

END, PAD = "<|endoftext|>", "<|pad|>"
BYTES = 256


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly ``vocab_size`` tokens, with an end-of-sequence and a padding token.

    Every digit is a token of its own, and nothing is unknown: bytes that never met become tokens one by one.

    Args:
        texts: what to learn the merges from.
        vocab_size: tokens, the two special ones and the 256 bytes included.

    Raises:
        ValueError: the vocabulary has no room for the bytes, or the texts give fewer tokens than asked for.
    """
    least = BYTES + 2
    if vocab_size < least:
        raise ValueError(f"vocab_size must be at least {least}, 256 bytes and two special tokens, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise ValueError(
            f"vocab_size must be at most the {tokenizer.get_vocab_size()} tokens that the texts give, "
            f"got {vocab_size}; lower it or add text"
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


def source_texts(sources: Sequence[str], *, column: str = "text") -> Iterator[str]:
    """The texts of all sources, one after the other.

    Args:
        sources: as :func:`hf_asentmax.data.load_documents` takes them.
        column: the column with the text.

    Raises:
        ValueError: a source holds tokens.
    """
    opened = [(source, load_documents(source, column=column)) for source in sources]
    for source, documents in opened:
        if column not in documents.column_names:
            raise ValueError(
                f"data source {source} must have the column {column!r} to learn from, got tokens; give the texts that "
                "they were made from, or --tokenizer"
            )
    for source, documents in opened:
        for row in tqdm(documents, desc=f"reading {source}", unit=" documents"):
            if row[column]:
                yield row[column]


def tokenize_sources(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: Sequence[int] | None = None,
    column: str = "text",
    seed: int = 0,
) -> Any:
    """The tokens of documents from one or several sources, mixed in random order, held in memory.

    Args:
        sources: as :func:`hf_asentmax.data.load_documents` takes them.
        tokenizer: a tokenizer with an end-of-sequence token, which closes every document.
        max_tokens: one limit a source: of its documents, in random order, as many are taken as it takes to reach it.
        column: the column with the text.
        seed: of both orders.

    Returns:
        A `datasets.Dataset`, one row a document, with the column ``input_ids``: uint16 where the vocabulary allows,
        else int32.

    Raises:
        ValueError: there are limits for more or fewer sources, or a limit is below 1.
    """
    import datasets

    if max_tokens is not None and (len(max_tokens) != len(sources) or min(max_tokens) < 1):
        raise ValueError(
            f"max_tokens must be one number of at least 1 for each of the {len(sources)} sources, got "
            f"{list(max_tokens)}; give as many, in the order of the sources"
        )
    dtype = "uint16" if len(tokenizer) <= 1 << 16 else "int32"
    features = datasets.Features({"input_ids": datasets.Sequence(datasets.Value(dtype))})
    opened = [load_documents(source, column=column).shuffle(seed=seed) for source in sources]
    parts = []
    limits: Sequence[int | None] = max_tokens or [None] * len(sources)
    for source, documents, limit in zip(sources, opened, limits, strict=True):
        taken: list[np.ndarray] = []
        with tqdm(total=limit, desc=f"tokenising {source}", unit=" tokens", unit_scale=True) as progress:
            count = 0
            for ids in token_lists(documents, tokenizer, column):
                taken.append(np.asarray(ids, dtype=dtype))
                count += len(ids)
                progress.update(len(ids))
                if limit is not None and count >= limit:
                    break
        parts.append(datasets.Dataset.from_dict({"input_ids": taken}, features=features))
    return datasets.concatenate_datasets(parts).shuffle(seed=seed).flatten_indices()
