"""Exact match on a generated task by length, from the training length to 65,536 tokens and beyond.

For models that were trained on the task (scripts/train_synthetic.py): task and options are read from task.json in the
model's folder. One teacher-forced pass a batch tells what greedy decoding would give (in 2Back and local count, which
class each token gets), and nothing is cut to a context limit. Several models are compared on the same samples. Prints a
table with 95 % intervals; --output_dir gets results.json, results.md and a picture.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, HfArgumentParser

import hf_asentmax  # noqa: F401  (registers the Auto classes)
from hf_asentmax.evaluation import results_table
from hf_asentmax.ladder import LENGTHS, synthetic_ladder
from hf_asentmax.plots import write_report
from hf_asentmax.runs import HelpFormatter
from hf_asentmax.sharding import is_main, join_processes
from hf_asentmax.tasks import STREAMS, TASKS, load_task

EXAMPLE = """
examples:
  python scripts/evaluate_synthetic.py --model runs/synthetic --bf16 --output_dir runs/synthetic/test
  two models, one picture:     ... --model runs/softmax runs/asentmax --output_dir runs/comparison
  to choose settings, quickly: ... --model runs/synthetic --stream validation --lengths 64 1024 --samples 100
  the demo's checkpoint:       ... --model runs/demo --lengths 32 512 8192
  several GPUs, the samples shared among them:   accelerate launch scripts/evaluate_synthetic.py --model ...
"""


@dataclass
class Arguments:
    """What to evaluate, and on what."""

    model: list[str] = field(metadata={"help": "Folders or Hub ids of causal language models, softmax or ASEntmax."})
    task: str | None = field(
        default=None, metadata={"help": "The task; by default the one of task.json.", "choices": sorted(TASKS)}
    )
    task_options: str | None = field(
        default=None,
        metadata={"help": "Options of the task as JSON, such as '{\"values\": 10}'; else task.json's, else defaults."},
    )
    lengths: list[int] = field(
        default_factory=lambda: list(LENGTHS),
        metadata={"help": "Tokens of the source; special tokens, queries and the answer come on top."},
    )
    samples: int = field(default=1000, metadata={"help": "Samples at each length; 200 leave +-7 points, 1000 +-3."})
    samples_beyond: int = field(default=200, metadata={"help": "Samples beyond 4096 tokens, at most."})
    stream: str = field(
        default="test", metadata={"help": "What to draw from; choose settings on validation.", "choices": STREAMS[1:]}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the samples; the same for every model."})
    batch_tokens: int = field(
        default=1 << 15, metadata={"help": "Tokens in a forward pass; changes memory, not the samples."}
    )
    dtype: str = field(
        default="float32", metadata={"help": "Dtype of the weights.", "choices": ["float32", "bfloat16", "float16"]}
    )
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16 as training with --bf16 does (autocast)."})
    method: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the models in the results; by default the kind of their attention."},
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
    options = json.loads(args.task_options) if args.task_options else None
    tasks = [load_task(args.task, source, options) for source in args.model]

    device = join_processes()
    rows: list[dict[str, Any]] = []
    for name, source, task in zip(names, args.model, tasks, strict=True):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, args.dtype)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            found = synthetic_ladder(
                model,
                task,
                args.lengths,
                samples=args.samples,
                samples_beyond=args.samples_beyond,
                batch_tokens=args.batch_tokens,
                seed=args.seed,
                stream=args.stream,
            )
        own = {"model": source} if name is None else {"model": source, "method": name}
        rows += [row | own for row in found]
    if not is_main():
        return
    print(results_table(rows))
    if args.output_dir:
        title = f"{', '.join(dict.fromkeys(row['task'] for row in rows))}, {args.stream}"
        print(f"\nwritten: {', '.join(map(str, write_report(rows, args.output_dir, title=title)))}")


if __name__ == "__main__":
    main()
