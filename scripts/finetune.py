"""Fine-tune a causal language model with ASEntmax attention, converting it first if it is a softmax model.

A converted model computes softmax at the start (alpha = 1, query scale 1) and its alpha moves to --alpha over the first
--alpha_fraction of the steps. A killed run goes on from its last complete checkpoint when the same command is given
again. --output_dir gets the model (with LoRA: the adapter, and the converted base in OUTPUT_DIR/base), the tokenizer
and results.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import AutoTokenizer, HfArgumentParser, TrainingArguments

from hf_asentmax.adapters import add_lora
from hf_asentmax.data import DataArguments, load_packed
from hf_asentmax.options import HelpFormatter
from hf_asentmax.runs import RunArguments, begin_run, load_for_finetuning, run_training, summary

EXAMPLE = """
examples:
  python scripts/finetune.py --model SmolLM2-135M --data books.parquet --sequence_length 1024 --max_steps 500 \\
      --per_device_train_batch_size 4 --learning_rate 1e-4 --query_scale_learning_rate 1e-3 --output_dir runs/smollm2
  the softmax twin, same data and order:   ... --attention softmax --output_dir runs/smollm2-softmax
  an adapter only:                         ... --lora_r 16 --output_dir runs/smollm2-lora
  several GPUs:                            accelerate launch scripts/finetune.py ...
"""


@dataclass
class ModelArguments:
    """Which model, and what becomes of its attention."""

    model: str = field(metadata={"help": "Folder or Hub id of a causal language model, softmax or already ASEntmax."})
    tokenizer: str | None = field(default=None, metadata={"help": "Folder or Hub id; by default the model's."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Dtype of the weights. For mixed precision leave it and give --bf16.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    lora_r: int | None = field(
        default=None,
        metadata={"help": "Train a LoRA adapter of this rank, and the query scale, instead of all weights."},
    )
    lora_alpha: int | None = field(
        default=None, metadata={"help": "Numerator of the adapter's factor; 2 r by default."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapter's input."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Last names of the layers to adapt; by default every projection."}
    )


def main() -> None:
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, RunArguments, TrainingArguments),  # type: ignore[arg-type]
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(output_dir="runs/finetune", logging_steps=10, save_total_limit=2, learning_rate=1e-4)
    parser.set_defaults(lr_scheduler_type="cosine", warmup_steps=0.05, report_to="none")
    choice, data, run, args = parser.parse_args_into_dataclasses()

    tokenizer = AutoTokenizer.from_pretrained(choice.tokenizer or choice.model)
    train, evaluation = load_packed(data, tokenizer, seed=args.seed)
    settings, checkpoint = begin_run(args, choice, data, run)
    model, schedule = load_for_finetuning(choice.model, run, dtype=getattr(torch, choice.dtype))
    if choice.lora_r is not None:
        if args.gradient_checkpointing:
            model.enable_input_require_grads()
        with args.main_process_first(local=False, desc="saving the converted base"):
            model = add_lora(
                model,
                args.output_dir,
                r=choice.lora_r,
                lora_alpha=choice.lora_alpha,
                dropout=choice.lora_dropout,
                target_modules=choice.lora_target_modules,
                tokenizer=tokenizer,
            )
    results = run_training(
        model,
        tokenizer,
        train,
        evaluation,
        args,
        run,
        schedule=schedule,
        checkpoint=checkpoint,
        settings=settings,
    )
    if args.process_index == 0:
        print(summary(results, args.output_dir))


if __name__ == "__main__":
    main()
