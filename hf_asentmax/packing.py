"""Packing documents into rows of one length that keep the document boundaries.

A row is cut from the documents laid end to end, each closed by the end-of-sequence token. It holds

    input_ids     the tokens
    position_ids  0, 1, 2, ... restarting at 0 where a document (or the row) begins
    labels        the tokens, -100 on the first of each document: nothing is predicted across a boundary

and no attention_mask: Transformers recognises packed documents by position_ids that restart, and only when there is no
mask and no cache. A document that does not fit goes on in the next row, as a document of its own there. Every token is
used, except the last `total % length` ones, which fill no row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

logger = logging.get_logger(__name__)

TOKENIZER_BATCH = 64  # documents handed to the tokenizer at once


def token_lists(
    documents: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, column: str, *, closed: bool = True
) -> Iterator[Sequence[int]]:
    """Each document's tokens, with the first token that the tokenizer adds (if it does), closed by its end token.

    Args:
        documents: rows with the text in `column`, or with tokens in "input_ids", which are used as they are.
        tokenizer: a tokenizer with an end-of-sequence token.
        column: the column with the text.
        closed: whether text is closed by the end token; else it is what the tokenizer makes of it, and needs none.

    Raises:
        ValueError: the tokenizer has no end-of-sequence token, or tokens lie outside of its vocabulary.
    """
    end = [_end_token(tokenizer)] if closed else []
    rows, size = iter(documents), len(tokenizer)
    while batch := list(islice(rows, TOKENIZER_BATCH)):
        if "input_ids" in batch[0]:
            for row in batch:
                ids = np.asarray(row["input_ids"], dtype=np.int64)
                if len(ids):
                    _check_vocabulary(ids, size)
                    yield cast("Sequence[int]", ids)  # an array: no list of 100 million integers
            continue
        texts = [row[column] for row in batch if row[column]]
        for ids in tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"] if texts else []:
            yield ids if ids[-1:] == end else [*ids, *end]


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("tokenizer must have an end-of-sequence token, got None; set `eos_token` and save it again")
    return int(end)


def _check_vocabulary(ids: np.ndarray, size: int) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        raise ValueError(
            f"input_ids must be in [0, {size}), the tokenizer's vocabulary, got {low if low < 0 else high}; "
            "give the tokenizer that the data were made with"
        )


def packed_row(tokens: np.ndarray, starts: np.ndarray) -> dict[str, torch.Tensor]:
    """One row of the model's inputs.

    Args:
        tokens: token ids, shape (L,), integer.
        starts: True where a document begins, shape (L,), bool.

    Returns:
        input_ids, labels, position_ids, each of shape (L,), int64.
    """
    ids = torch.from_numpy(tokens.astype(np.int64))
    begins = torch.from_numpy(starts.copy())
    begins[0] = True
    index = torch.arange(len(ids))
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(begins, -100),
        "position_ids": index - torch.where(begins, index, 0).cummax(0).values,
    }


class PackedDataset(torch.utils.data.Dataset):
    """Packed rows held in memory, five bytes a token; a row is a function of its index, so any sampler can resume.

    Args:
        documents: the tokens of each document.
        length: tokens in a row, L.
        max_rows: stop after so many rows.

    Raises:
        ValueError: the length is below 2, or the documents fill no row.
    """

    def __init__(self, documents: Iterable[Sequence[int]], length: int, *, max_rows: int | None = None) -> None:
        _check_length(length)
        self.length = length
        pieces: list[np.ndarray] = []
        total = 0
        for ids in documents:
            pieces.append(np.asarray(ids, dtype=np.int32))
            total += len(ids)
            if max_rows is not None and total >= max_rows * length:
                break
        self._rows = total // length if max_rows is None else min(total // length, max_rows)
        if self._rows == 0:
            raise ValueError(
                f"data must fill at least one row of {length} tokens, got {total}; lower --sequence_length or add text"
            )
        self._tokens = np.concatenate(pieces)
        self._starts = np.zeros(total, dtype=bool)
        self._starts[np.cumsum([0] + [len(piece) for piece in pieces[:-1]])] = True
        logger.info(f"{len(pieces)} documents, {total} tokens, {self._rows} rows of {length}")

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self._rows:
            raise IndexError(f"row must be in [0, {self._rows}), got {index}")
        cut = slice(index * self.length, (index + 1) * self.length)
        return packed_row(self._tokens[cut], self._starts[cut])


class CompletionDataset(PackedDataset):
    """A prompt and its completion in each row, with the loss on the completion and the end token after it.

    What is left of a row is filled with end tokens, as a document of their own that nothing is asked of.

    Args:
        samples: rows with the texts "prompt" and "completion", as TRL names them.
        tokenizer: a tokenizer with an end-of-sequence token.
        length: tokens in a row.

    Raises:
        ValueError: a sample doesn't fit into a row, there is none, or the tokenizer has no end-of-sequence token.
    """

    def __init__(self, samples: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        end = _end_token(tokenizer)
        asked: list[np.ndarray] = []

        def documents() -> Iterator[list[int]]:
            for number, sample in enumerate(samples):
                prompt = tokenizer(sample["prompt"], verbose=False)["input_ids"]
                answer = [*tokenizer(sample["completion"], add_special_tokens=False, verbose=False)["input_ids"], end]
                rest = length - len(prompt) - len(answer)
                if rest < 0:
                    raise ValueError(
                        f"samples must fit into a row of {length} tokens, got {length - rest} in sample {number}; "
                        "raise --sequence_length, or make shorter samples"
                    )
                asked.append(np.repeat([False, True, False], [len(prompt), len(answer), rest]))
                yield [*prompt, *answer]
                if rest:
                    yield [end] * rest

        super().__init__(documents(), length)
        self._asked = np.concatenate(asked)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)
        asked = torch.from_numpy(self._asked[index * self.length : (index + 1) * self.length])
        return row | {"labels": row["labels"].masked_fill(~asked, -100)}


class PackedStream(torch.utils.data.IterableDataset):
    """Packed rows read while training, pass after pass without end: the order depends on the seed and nothing else.

    It never ends because the Trainer resumes by skipping the batches already seen in one pass over its loader; with one
    endless pass that is exact however often the data has been read. What fills no row at the end of a pass begins the
    next one. Several loader workers share the files of the source; the order then depends on their number too.

    Args:
        documents: a `datasets.IterableDataset`.
        tokenizer: a tokenizer with an end-of-sequence token.
        length: tokens in a row, L.
        column: the column with the text.
        seed: seed of the order; each pass has its own.
        buffer: documents to shuffle among; 0 keeps the order of the source.
    """

    def __init__(
        self,
        documents: Any,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        *,
        column: str = "text",
        seed: int = 0,
        buffer: int = 1000,
    ) -> None:
        _check_length(length)
        self.documents, self.tokenizer, self.length = documents, tokenizer, length
        self.column, self.seed, self.buffer = column, seed, buffer

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        tokens, starts = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool)
        number = 0
        while True:
            documents = self.documents
            if self.buffer:
                documents = documents.shuffle(self.seed + number, buffer_size=self.buffer)
            empty = True
            for ids in token_lists(documents, self.tokenizer, self.column):
                empty = False
                tokens = np.concatenate([tokens, np.asarray(ids, dtype=np.int32)])
                starts = np.concatenate([starts, np.arange(len(ids)) == 0])
                full = len(tokens) // self.length * self.length
                for row in range(0, full, self.length):
                    yield packed_row(tokens[row : row + self.length], starts[row : row + self.length])
                tokens, starts = tokens[full:], starts[full:]
            if empty:  # a loader worker that got none of the files
                return
            number += 1


def _check_length(length: int) -> None:
    if length < 2:
        raise ValueError(f"sequence length must be at least 2, got {length}; a row needs a token to predict from")
