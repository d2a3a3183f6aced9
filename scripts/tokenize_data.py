"""Tokenise training documents once, for any number of runs: pretrain.py and finetune.py take the result as --data.

The tokenizer is an existing one (--tokenizer), or a byte-level BPE learned from all of the documents (--vocab_size).
Documents of several sources are mixed in random order. --output_dir gets a dataset as `save_to_disk` writes it, with
the column input_ids, one row a document, and the tokenizer: --data and --tokenizer of the training are the same folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from transformers import AutoTokenizer, HfArgumentParser

from hf_asentmax.options import HelpFormatter, check_new_folder, option
from hf_asentmax.tokenization import source_texts, tokenize_sources, train_tokenizer

EXAMPLE = """
examples:
  python scripts/tokenize_data.py --data books.parquet code.jsonl --vocab_size 16384 --output_dir tokens
  at most so many tokens of each:   ... --max_tokens 60000000 40000000
  train on it:                      python scripts/pretrain.py --config config.json --data tokens --tokenizer tokens ...
"""


@dataclass
class TokenizeArguments:
    """What to tokenise, and how."""

    data: list[str] = field(
        metadata={
            "help": "One source or several: a file, a glob in quotes, a folder, a dataset written by save_to_disk, "
            "or a Hub dataset id. The split is 'train'."
        }
    )
    output_dir: str = field(metadata={"help": "A new folder for the tokens and the tokenizer."})
    tokenizer: str | None = option(None, "Folder or Hub id of an existing tokenizer.")
    vocab_size: int | None = option(None, "Tokens of the BPE to learn instead, the two special ones included.")
    max_tokens: list[int] | None = option(None, "How many tokens to take of each source, one number a source.")
    text_column: str = option("text", "Column with the text.")
    seed: int = option(0, "Seed of the order of the documents, and so of the choice where there is a limit.")

    def __post_init__(self) -> None:
        if (self.tokenizer is None) == (self.vocab_size is None):
            raise ValueError(
                f"either tokenizer or vocab_size must be given, got {self.tokenizer!r} and {self.vocab_size!r}; "
                "--tokenizer takes an existing one, --vocab_size learns one"
            )
        check_new_folder(self.output_dir)


def main() -> None:
    parser = HfArgumentParser(
        TokenizeArguments,  # type: ignore[arg-type]
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    (args,) = parser.parse_args_into_dataclasses()
    if args.vocab_size is None:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    else:
        tokenizer = train_tokenizer(source_texts(args.data, column=args.text_column), args.vocab_size)
    tokens = tokenize_sources(args.data, tokenizer, max_tokens=args.max_tokens, column=args.text_column, seed=args.seed)
    tokens.save_to_disk(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    lengths = np.asarray([len(ids) for ids in tokens.with_format("numpy")["input_ids"]])
    print(
        f"{len(lengths):,} documents, {lengths.sum():,} tokens (median {np.median(lengths):,.0f} a document), "
        f"vocabulary of {len(tokenizer):,}: {args.output_dir}"
    )


if __name__ == "__main__":
    main()
