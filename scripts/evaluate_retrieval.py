"""Retrieval accuracy by length, as far beyond the training length as you like: nothing is cut to a context limit.

passkey and needle hide a number in text and let the model write; needle goes by depth and length. Several models are
compared on the same samples. Prints a table; --output_dir gets results.json, results.md and a picture. For models that
were trained on a generated task there is scripts/evaluate_synthetic.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import hf_asentmax  # noqa: F401  (registers the Auto classes)
from hf_asentmax.evaluation import results_table
from hf_asentmax.plots import write_report
from hf_asentmax.retrieval import needle, passkey
from hf_asentmax.runs import HelpFormatter
from hf_asentmax.sharding import is_main, join_processes

EXAMPLE = """
examples:
  python scripts/evaluate_retrieval.py --model SmolLM2-135M --task needle --lengths 512 1024 --output_dir runs/needle
  two models, one picture:    ... --model runs/softmax runs/asentmax --task passkey --lengths 1024 2048 4096
  several GPUs, the samples shared among them:   accelerate launch scripts/evaluate_retrieval.py ...
"""


@dataclass
class Arguments:
    """What to evaluate, and on what."""

    model: list[str] = field(metadata={"help": "Folders or Hub ids of causal language models, softmax or ASEntmax."})
    task: str = field(default="needle", metadata={"help": "What to retrieve.", "choices": ["needle", "passkey"]})
    lengths: list[int] = field(
        default_factory=lambda: [512, 1024, 2048],
        metadata={"help": "Tokens of prompt and answer together, at most."},
    )
    depths: list[float] = field(
        default_factory=lambda: [0.0, 25.0, 50.0, 75.0, 100.0],
        metadata={"help": "needle: where it is hidden, in %% of the text. passkey hides it anywhere."},
    )
    samples: int = field(default=20, metadata={"help": "Samples in each cell; 20 leave +-20 points, 1000 leave +-3."})
    haystack: str | None = field(
        default=None, metadata={"help": "Text file to hide the number in; by default simple generated sentences."}
    )
    method: list[str] | None = field(
        default=None, metadata={"help": "Names of the models in the results; by default the kind of their attention."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the samples; the same for every model."})
    dtype: str = field(
        default="float32", metadata={"help": "Dtype of the weights.", "choices": ["float32", "bfloat16", "float16"]}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for results.json, results.md and the picture."}
    )


def main() -> None:
    parser = HfArgumentParser(Arguments, description=__doc__, epilog=EXAMPLE, formatter_class=HelpFormatter)  # type: ignore[arg-type]
    (args,) = parser.parse_args_into_dataclasses()
    names = args.method or [None] * len(args.model)
    if len(names) != len(args.model):
        parser.error(f"--method must name each of the {len(args.model)} models, got {names}")

    device = join_processes()
    rows: list[dict[str, Any]] = []
    for name, source in zip(names, args.model, strict=True):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, args.dtype)).to(device)
        tokenizer = AutoTokenizer.from_pretrained(source)
        if args.task == "passkey":
            found = passkey(model, tokenizer, args.lengths, samples=args.samples, seed=args.seed)
        else:
            hay = {"samples": args.samples, "haystack": args.haystack, "seed": args.seed}
            found = needle(model, tokenizer, args.lengths, args.depths, **hay)
        rows += [row if name is None else row | {"method": name} for row in found]
    if not is_main():
        return
    print(results_table(rows))
    if args.output_dir:
        print(f"\nwritten: {', '.join(map(str, write_report(rows, args.output_dir, title=args.task)))}")


if __name__ == "__main__":
    main()
