"""Perplexity by context length, always of the same final tokens of each document, and by position in the document.

Any causal language model can be given, softmax or ASEntmax. Prints tables and writes them to --output as JSON.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import hf_asentmax  # noqa: F401  (registers the Auto classes)
from hf_asentmax.data import load_documents
from hf_asentmax.packing import token_lists
from hf_asentmax.perplexity import perplexity_by_length, perplexity_by_position
from hf_asentmax.runs import HelpFormatter
from hf_asentmax.sharding import is_main, join_processes

EXAMPLE = """
examples:
  python scripts/evaluate_perplexity.py --model runs/smollm2 --data validation.parquet --lengths 1024 2048 4096
  several GPUs, the documents shared among them:   accelerate launch scripts/evaluate_perplexity.py ...
"""


@dataclass
class Arguments:
    """What to evaluate, and on what."""

    model: str = field(metadata={"help": "Folder or Hub id of a causal language model."})
    data: str = field(metadata={"help": "Held-out documents: a file, glob, folder or Hub dataset id, as for training."})
    data_split: str = field(default="train", metadata={"help": "Split of --data; files are the split 'train'."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    lengths: list[int] = field(
        default_factory=lambda: [1024, 2048], metadata={"help": "Context lengths in tokens, the scored ones included."}
    )
    scored_tokens: int = field(
        default=512, metadata={"help": "Final tokens of each document that are scored, the same at every length."}
    )
    buckets: int = field(default=8, metadata={"help": "Buckets of positions, at the longest length; 0: none."})
    max_documents: int | None = field(default=None, metadata={"help": "Use the first so many long enough documents."})
    dtype: str = field(
        default="float32", metadata={"help": "Dtype of the weights.", "choices": ["float32", "bfloat16", "float16"]}
    )
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})


def main() -> None:
    parser = HfArgumentParser(Arguments, description=__doc__, epilog=EXAMPLE, formatter_class=HelpFormatter)  # type: ignore[arg-type]
    (args,) = parser.parse_args_into_dataclasses()
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
    print(line("length", "perplexity", "95 % low", "high", "documents"))
    for row in by_length + by_position:
        where = row.get("length") or f"{row['first']}-{row['last']}"
        print(line(where, *(f"{row[name]:.2f}" for name in ("perplexity", "low", "high")), row["documents"]))
    if args.output:
        path = Path(args.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        results = {"settings": asdict(args), "by_length": by_length, "by_position": by_position}
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
