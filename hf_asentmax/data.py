"""Training data and held-out documents from any `datasets` source: files, globs, folders, saved datasets, the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .packing import CompletionDataset, PackedDataset, PackedStream, token_lists

# What reads a file, by its ending. A text file is one document, not one document a line.
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".txt": ("text", {"sample_by": "document"}),
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
COMPLETIONS = {"prompt", "completion"}  # the columns of samples that are no running text


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class DataArguments:
    """What to train on, and how it is cut into rows."""

    data: str = field(
        metadata=_help(
            "Training documents: a .json, .jsonl, .parquet, .csv, .tsv, .arrow or .txt file (a text file is one "
            "document), a glob of such files, a folder of them or one written by save_to_disk, or a Hub dataset id."
        )
    )
    data_name: str | None = field(default=None, metadata=_help("Configuration of a Hub dataset, such as 'en'."))
    data_split: str = field(default="train", metadata=_help("Split to train on; files are the split 'train'."))
    text_column: str = field(
        default="text",
        metadata=_help(
            "Column with the text. Where 'input_ids' stands in its place, the data are tokens already, as "
            "tokenize_data.py writes them; with 'prompt' and 'completion' in its place each sample is a row of its "
            "own, with the loss on the completion."
        ),
    )
    sequence_length: int = field(default=1024, metadata=_help("Tokens in a row; documents are packed to this length."))
    streaming: bool = field(
        default=False, metadata=_help("Tokenise while training instead of before it; needs --max_steps.")
    )
    shuffle_buffer: int = field(
        default=1000, metadata=_help("Streaming: documents to shuffle among; 0 keeps the order of the files.")
    )
    eval_data: str | None = field(default=None, metadata=_help("Held-out text, any source that --data takes."))
    eval_split: str = field(default="train", metadata=_help("Split of --eval_data."))
    max_eval_rows: int | None = field(default=None, metadata=_help("Evaluate on the first so many rows."))


def load_documents(
    source: str,
    *,
    name: str | None = None,
    split: str = "train",
    streaming: bool = False,
    column: str = "text",
    completions: bool = False,
) -> Any:
    """Open a source of documents; nothing is tokenised yet, and of a stream only the first document is read.

    Args:
        source: a file, a glob, a folder, a folder written by `save_to_disk`, or a Hub dataset id.
        name: configuration of a Hub dataset.
        split: the split; files given one by one or by a glob make the split "train".
        streaming: give a `datasets.IterableDataset` instead of a `datasets.Dataset`.
        column: the column with the text. Where "input_ids" stands in its place, the documents are tokens already: no
            other column is kept then, and a row's tokens are a NumPy array.
        completions: take "prompt" and "completion" in place of it as well.

    Raises:
        FileNotFoundError: nothing lies at `source`.
        ValueError: the file's ending is unknown, the source is empty, or it has both of the columns or neither.
    """
    path = Path(source).expanduser()
    files = _files(source, path)
    if any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
        documents = _load_saved(path, split, streaming)
    elif files:
        builder, options = _reader(files)
        documents = _load(source, builder, data_files=files, split=split, streaming=streaming, **options)
    elif has_magic(source) or (_looks_local(source) and not path.is_dir()):
        raise _missing(source)
    else:
        where = str(path) if path.is_dir() else source
        documents = _load(source, where, name, split=split, streaming=streaming)
    first = next(iter(documents), None)
    if first is None:
        raise ValueError(f"data source must hold documents, got {source!r}: it is empty; check file and split")
    if "input_ids" not in first:
        if not (column in first or (completions and COMPLETIONS.issubset(first))):
            raise ValueError(
                f"text column of {source} must be one of {sorted(first)}, got {column!r}; set --text_column"
            )
        return documents
    if column in first and column != "input_ids":
        raise ValueError(
            f"columns of {source} must be either {column!r} with text or 'input_ids' with tokens, got both; "
            "set --text_column input_ids to train on the tokens, or remove that column"
        )
    return documents.select_columns(["input_ids"]).with_format("numpy")


def _load(source: str, *args: Any, **kwargs: Any) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(*args, **kwargs)
    except (FileNotFoundError, ConnectionError) as error:
        raise _missing(source) from error
    except ValueError as error:
        raise ValueError(f"data source must hold documents, got {source!r}: {error}; check file and split") from error


def _missing(source: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"data source must be an existing file, glob, folder or Hub dataset id, got {source!r}; "
        f"check the path (seen from {Path.cwd()}), or for a Hub id the spelling and the network"
    )


def _files(source: str, path: Path) -> list[str]:
    """The files that `source` names one by one; none for a Hub id, or a folder for `datasets` to look through."""
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        found = sorted(str(file) for file in path.rglob("*") if _ending(file) in READERS)
        return found if all(_ending(file) == ".txt" for file in found) else []
    return sorted(file for file in glob(str(path), recursive=True) if Path(file).is_file())


def _ending(path: str | Path) -> str:
    suffixes = Path(path).suffixes
    return (suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in COMPRESSED else "".join(suffixes[-1:])).lower()


def _looks_local(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source or _ending(source) in READERS


def _reader(files: list[str]) -> tuple[str, dict[str, Any]]:
    endings = sorted({_ending(file) for file in files})
    reader = READERS.get(endings[0])
    if reader is None or any(READERS.get(ending) != reader for ending in endings):
        raise ValueError(
            f"data files must all be of one kind and end in one of {', '.join(READERS)}, got {', '.join(endings)!r}; "
            "convert them, or give one kind at a time"
        )
    return reader


def _load_saved(path: Path, split: str, streaming: bool) -> Any:
    from datasets import DatasetDict, load_from_disk

    documents = load_from_disk(str(path))
    if isinstance(documents, DatasetDict):
        if split not in documents:
            raise ValueError(f"split of {path} must be one of {sorted(documents)}, got {split!r}; set --data_split")
        documents = documents[split]
    return documents.to_iterable_dataset() if streaming else documents


def long_documents(
    data: str,
    models: Sequence[str],
    longest: int,
    *,
    split: str = "train",
    column: str = "text",
    most: int | None = None,
) -> tuple[int, list[list[int]]]:
    """The tokens of the first so many documents that are long enough, as they are.

    Text is not closed by an end token: long documents are often cut from longer ones, and where a text goes on the end
    token has a probability of e^-20 or so, which weighs as much as all that models differ in.

    Args:
        data: as for :func:`load_documents`.
        models: folders or Hub ids; text is cut by the tokenizer of the first, which must be that of all.
        longest: tokens that a document must have.
        split: the split.
        column: the column with the text; where it is missing, tokens are taken from "input_ids".
        most: stop after so many.

    Returns:
        How many documents were read, and the tokens of those that are long enough.

    Raises:
        ValueError: no document is long enough, or the tokenizers differ.
        FileNotFoundError: nothing lies at `data`.
    """
    documents = load_documents(data, split=split, column=column)
    tokens: Iterable[Sequence[int]]
    if "input_ids" not in next(iter(documents)):
        tokenizer = AutoTokenizer.from_pretrained(models[0])
        for source in models[1:]:
            if AutoTokenizer.from_pretrained(source).get_vocab() != tokenizer.get_vocab():
                raise ValueError(
                    f"models must share one tokenizer to be compared by token, got {models[0]} and {source}; "
                    "evaluate them one by one"
                )
        tokens = token_lists(documents, tokenizer, column, closed=False)
    else:
        tokens = (row["input_ids"] for row in documents)
    read, most_tokens, enough = 0, 0, []
    for ids in tokens:
        read, most_tokens = read + 1, max(most_tokens, len(ids))
        if len(ids) >= longest:
            enough.append(list(map(int, ids)))
        if len(enough) == most:
            break
    if not enough:
        raise ValueError(
            f"documents must hold one of at least {longest} tokens, the longest of {read} has {most_tokens}; "
            "lower the lengths or give longer documents"
        )
    return read, enough


def load_packed(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> tuple[PackedDataset | PackedStream, PackedDataset | None]:
    """The training rows and, where there is `eval_data`, the held-out rows.

    Both sources are opened before either is tokenised, so a wrong path costs no time. Held-out rows are always held in
    memory, in the order of the source. Prompts with completions give a :class:`CompletionDataset`.

    Args:
        args: the sources and the row length.
        tokenizer: a tokenizer with an end-of-sequence token.
        seed: seed of a stream's order.

    Raises:
        FileNotFoundError: nothing lies at a source.
        ValueError: a source is not as :func:`load_documents` takes it, or samples with completions are to be streamed
            or don't fit into a row.
    """
    column, length = args.text_column, args.sequence_length
    shared: dict[str, Any] = {"name": args.data_name, "column": column, "completions": True}
    train = load_documents(args.data, split=args.data_split, streaming=args.streaming, **shared)
    held_out = None if args.eval_data is None else load_documents(args.eval_data, split=args.eval_split, **shared)

    def completions(documents: Any) -> bool:
        return not {column, "input_ids"} & set(next(iter(documents)))

    if args.streaming and completions(train):
        raise ValueError("streaming must be off for samples with completions, got True; leave --streaming out")

    def packed(documents: Any, what: str, max_rows: int | None = None) -> PackedDataset:
        if completions(documents):
            samples = tqdm(islice(documents, max_rows), desc=f"tokenising {what}", unit=" samples")
            return CompletionDataset(samples, tokenizer, length)
        lists = token_lists(tqdm(documents, desc=f"packing {what}", unit=" documents"), tokenizer, column)
        return PackedDataset(lists, length, max_rows=max_rows)

    evaluation = None if held_out is None else packed(held_out, "evaluation data", args.max_eval_rows)
    if args.streaming:
        return PackedStream(train, tokenizer, length, column=column, seed=seed, buffer=args.shuffle_buffer), evaluation
    return packed(train, "training data"), evaluation
