"""Take documents to evaluate on out of a corpus, before anything is trained on the rest.

Long documents, for perplexity by length, are whole groups (the files of a folder or package, one after the other), of
which nothing is trained on. Short ones, for the loss while training, are single documents. --output_dir gets
train.parquet, long.parquet and short.parquet. The choice is by hashes: the same whenever the documents are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from hf_asentmax.holding_out import hold_out
from hf_asentmax.options import HelpFormatter, check_new_folder, option

EXAMPLE = """
examples:
  python scripts/hold_out.py --data books.parquet --output_dir prose
  files of a package in order:     ... --data code.parquet --group_column package --order_column path --output_dir code
  then train on the rest:          python scripts/tokenize_data.py --data prose/train.parquet code/train.parquet ...
  and evaluate:                    python scripts/evaluate_perplexity.py --model OUT --data prose/long.parquet ...
"""


@dataclass
class HoldOutArguments:
    """What to hold out, and of what."""

    data: list[str] = field(
        metadata={"help": "One source or several of the same columns: a file, a glob in quotes, a folder, or a Hub id."}
    )
    output_dir: str = field(metadata={"help": "A new folder for the three files."})
    long: int = option(48, "Long documents to hold out.")
    long_chars: list[int] = field(
        default_factory=lambda: [140_000, 175_000],
        metadata={"help": "Fewest and most characters of a long document; a token of a 16K BPE has 3 to 4."},
    )
    short: int = option(400, "Single documents to hold out.")
    text_column: str = option("text", "Column with the text.")
    group_column: str | None = option(None, "Column that a group's documents share; by default each is its own group.")
    order_column: str | None = option(None, "Column that orders a group's documents; by default as they come.")
    seed: int = option(0, "Seed of the choice.")

    def __post_init__(self) -> None:
        if len(self.long_chars) != 2:
            raise ValueError(f"long_chars must be two numbers, fewest and most, got {self.long_chars!r}; give both")
        check_new_folder(self.output_dir)


def main() -> None:
    parser = HfArgumentParser(
        HoldOutArguments,  # type: ignore[arg-type]
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    (args,) = parser.parse_args_into_dataclasses()
    parts = hold_out(
        args.data,
        long=args.long,
        long_chars=tuple(args.long_chars),
        short=args.short,
        column=args.text_column,
        group_column=args.group_column,
        order_column=args.order_column,
        seed=args.seed,
    )
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents in parts._asdict().items():
        documents.to_parquet(str(folder / f"{name}.parquet"))
        chars = sum(map(len, filter(None, documents[args.text_column])))
        print(f"{folder / name}.parquet: {len(documents):,} documents, {chars:,} characters")


if __name__ == "__main__":
    main()
