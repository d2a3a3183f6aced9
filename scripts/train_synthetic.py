"""Train any method on a generated task from scratch, and show how far beyond its training length it holds.

The data are drawn on the device that trains, without files. A task's defaults are the recipe that docs/recipe-log.md
arrived at; --task with --help shows them. A killed run goes on from its last complete checkpoint when the same command
is given again. --output_dir gets the model, task.json, results.json and the ladder of the validation stream: choose
settings by that. The test stream is for scripts/evaluate_synthetic.py, once.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments

from hf_asentmax.checkpoints import write_json
from hf_asentmax.evaluation import results_table
from hf_asentmax.ladder import synthetic_ladder
from hf_asentmax.options import HelpFormatter
from hf_asentmax.plots import write_report
from hf_asentmax.pruning import PruneHeads, zero_heads
from hf_asentmax.recall_tasks import CrowdedRecall
from hf_asentmax.runs import RunArguments, begin_run, run_training, summary
from hf_asentmax.synthetic import TaskStream, build_synthetic_model
from hf_asentmax.tasks import TASKS, RetrievalTask, build_task, save_task

PRUNING_BATCHES = 8  # that tell which heads a model needs
# The defaults of every task, and what a recipe has in place of them.
DEFAULTS: dict[str, Any] = {
    "attention": "asentmax",
    "positions": "nape",
    "max_steps": 26000,
    "per_device_train_batch_size": 1024,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 300,
    "adam_beta2": 0.99,
}
RECIPES: dict[str, dict[str, Any]] = {
    "mqmtar": {"prune_tolerance": 1e-5},
    "copy": {
        "attention": "asentmax_learned_alpha",
        "family": "gemma2",
        "per_device_train_batch_size": 256,
        "max_steps": 36000,
        "learning_rate": 4e-4,
    },
    "reverse": {
        "family": "gemma2",
        "query_scale_delta": 1.0,
        "query_scale_gamma_range": 1.0,
        "per_device_train_batch_size": 256,
        "max_steps": 24000,
        "learning_rate": 4e-4,
        "prune_tolerance": 1e-5,
    },
    "sort": {  # alpha is the method's, so the command names it: see EXAMPLE
        "family": "llama",
        "positions": "nope",
        "query_scale_delta": 1.0,
        "query_scale_gamma_range": 1.0,
        "per_device_train_batch_size": 512,
        "max_steps": 34000,
        "learning_rate": 1e-3,
        "weight_decay": 0.03,
    },
}
EXAMPLE = """
examples:
  the recipe of docs/recipe-log.md:   python scripts/train_synthetic.py --task mqmtar --bf16 --torch_compile
  Sort's, whose alpha is 1.25:        ... --task sort --alpha 1.25 --fp16 --torch_compile
  a twin of another method:           ... --attention softmax --output_dir runs/softmax
  its test ladder, once:              python scripts/evaluate_synthetic.py --model runs/synthetic --bf16
"""


@dataclass
class SyntheticArguments:
    """What to learn, and with which model."""

    task: str = field(default="mqmtar", metadata={"help": "What to learn.", "choices": sorted(TASKS)})
    task_options: str | None = field(
        default=None, metadata={"help": "Options of the task as JSON, such as '{\"symbols\": 16}'; else its defaults."}
    )
    family: str = field(
        default="qwen3",
        metadata={
            "help": "llama; qwen3, which normalises queries and keys; gemma2, with norms after attention and MLP too.",
            "choices": ["llama", "qwen3", "gemma2"],
        },
    )
    sizes: list[int] | None = field(
        default=None, metadata={"help": "Layers, width, heads, MLP width; by default the paper's for the task."}
    )
    min_length: int = field(default=32, metadata={"help": "Shortest source in training, in tokens."})
    max_length: int = field(default=64, metadata={"help": "Longest source in training, in tokens."})
    query_scale_delta: float = field(
        default=0.0, metadata={"help": "Constant part of the query scale, which does not grow with n."}
    )
    query_scale_gamma_center: float = field(
        default=1.0, metadata={"help": "From which the exponent of log n starts; 0 as in the paper."}
    )
    query_scale_gamma_range: float = field(
        default=0.5, metadata={"help": "How far it may go from there; less than its center: the scale grows with n."}
    )
    lengths: list[int] = field(
        default_factory=lambda: [64, 128, 256, 512, 1024],
        metadata={"help": "Sources of the ladder; the validation stream goes to 16 times the training length."},
    )
    samples: int = field(default=1000, metadata={"help": "Samples a length: 1000 leave +-3 points."})
    prune_tolerance: float = field(
        default=0.0,
        metadata={
            "help": "After half of the steps zero, for good, the heads that the model does not need: how far the loss "
            "of further batches may rise, in nats a token; 0 keeps all. They may do harm beyond the training length."
        },
    )
    hard_negatives: float = field(
        default=0.0,
        metadata={
            "help": "MQMTAR: share of the training sequences whose words come from 16 symbols, so that many are nearly "
            "what is asked for, as among very many words; 0 to 1. Validation and test stay as they are."
        },
    )

    def __post_init__(self) -> None:
        if self.sizes is not None and (len(self.sizes) != 4 or min(self.sizes) < 1):
            raise ValueError(f"sizes must be layers, width, heads and MLP width, all positive, got {self.sizes!r}")
        if not 0 <= self.prune_tolerance < math.inf:
            raise ValueError(f"prune_tolerance must be at least 0 and finite, got {self.prune_tolerance!r}; try 1e-5")
        if not 0 <= self.hard_negatives <= 1 or (self.hard_negatives and self.task != "mqmtar"):
            raise ValueError(
                "hard_negatives must be in [0, 1], and 0 but for the task mqmtar, "
                f"got {self.hard_negatives!r} for {self.task}; leave it out"
            )

    def training_task(self, task: RetrievalTask) -> RetrievalTask:
        """What is trained on: the task, or MQMTAR with hard negatives."""
        return CrowdedRecall(**vars(task), share=self.hard_negatives) if self.hard_negatives else task


def as_trained(args: TrainingArguments) -> torch.autocast:
    """The precision that training computes in, for what is computed beside it."""
    half = torch.float16 if args.fp16 else torch.bfloat16
    return torch.autocast(args.device.type, half, enabled=args.fp16 or args.bf16)


def pruning_loss(
    task: RetrievalTask, lengths: tuple[int, int], args: TrainingArguments
) -> Callable[[torch.nn.Module], float]:
    """The mean loss, in nats a token, on batches that no process is trained on; the same ones for all."""
    stream = TaskStream(task, args.per_device_train_batch_size, lengths, seed=args.seed, device=args.device)
    stream.begin = lambda: (args.max_steps * args.gradient_accumulation_steps + stream.POOL) * args.world_size
    batches = list(islice(stream, PRUNING_BATCHES))

    @torch.no_grad()
    def loss(model: torch.nn.Module) -> float:
        with as_trained(args):
            return torch.stack([model(**batch, use_cache=False).loss for batch in batches]).mean().item()

    return loss


def named_task() -> str:
    """The task on the command line, on which the other defaults depend."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task", default=SyntheticArguments.task)
    return parser.parse_known_args()[0].task


def main() -> None:
    parser = HfArgumentParser(
        (SyntheticArguments, RunArguments, TrainingArguments),  # type: ignore[arg-type]
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(output_dir="runs/synthetic", logging_steps=100, save_steps=1000, save_total_limit=2)
    parser.set_defaults(logging_nan_inf_filter=False, report_to="none")  # the filter waits for the device at every step
    parser.set_defaults(**DEFAULTS | RECIPES.get(named_task(), {}))
    choice, run, args = parser.parse_args_into_dataclasses()

    task = build_task(choice.task, **json.loads(choice.task_options or "{}"))
    trained = choice.training_task(task)
    settings, checkpoint = begin_run(args, choice, run)
    alpha = run.target_alpha
    schedule = None if run.settings["entmax_alpha_learned"] else run.schedule(start=alpha, target=alpha)
    overrides = {
        name: getattr(choice, name)
        for name in ("query_scale_delta", "query_scale_gamma_center", "query_scale_gamma_range")
    }
    overrides |= {} if schedule is None else {"entmax_alpha": schedule.start}
    overrides |= {} if run.query_scaling is None else {"query_scaling": run.query_scaling}
    model = build_synthetic_model(
        task,
        run.method,
        positions=run.positions,
        family=choice.family,
        length=choice.max_length,
        sizes=None if choice.sizes is None else tuple(choice.sizes),
        **overrides,
    )
    train = TaskStream(
        trained,
        args.per_device_train_batch_size,
        (choice.min_length, choice.max_length),
        seed=args.seed,
        device=args.device,
        process=args.process_index,
        processes=args.world_size,
    )
    callbacks = []
    if choice.prune_tolerance:
        loss = pruning_loss(trained, (choice.min_length, choice.max_length), args)
        callbacks.append(PruneHeads(loss, tolerance=choice.prune_tolerance))
    results = run_training(
        model,
        None,
        train,
        None,
        args,
        run,
        schedule=schedule,
        callbacks=callbacks,
        checkpoint=checkpoint,
        settings=settings,
    )
    with as_trained(args):
        rows = synthetic_ladder(
            model, task, choice.lengths, samples=choice.samples, seed=args.seed, stream="validation"
        )
    if args.process_index == 0:
        if choice.prune_tolerance:
            write_json(Path(args.output_dir) / "results.json", results | {"pruned_heads": zero_heads(model)})
        save_task(task, args.output_dir)
        folder = Path(args.output_dir) / "validation"
        print(summary(results, args.output_dir))
        print(results_table(rows))
        print(f"\nwritten: {', '.join(map(str, write_report(rows, folder, title=f'{choice.task}, validation')))}")


if __name__ == "__main__":
    main()
