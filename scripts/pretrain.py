"""Train a language model from scratch: the architecture from a config, the text cut by an existing tokenizer.

The data are texts, or tokens (a column input_ids) as tokenize_data.py makes them once for all runs, with a tokenizer.

The config is a config.json (or a folder with one) of a supported family, as the README lists them. With
a softmax one, --alpha, --query_scaling and --positions say what its attention becomes; an ASEntmax one says it itself.
A killed run goes on from its last complete checkpoint when the same command is given again. --output_dir gets the
model, the tokenizer and results.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import AutoTokenizer, HfArgumentParser, TrainingArguments

from hf_asentmax.data import DataArguments, load_packed
from hf_asentmax.options import HelpFormatter
from hf_asentmax.runs import RunArguments, begin_run, build_from_config, run_training, summary

EXAMPLE = """
examples:
  python scripts/pretrain.py --config config.json --tokenizer SmolLM2-135M --data 'corpus/*.parquet' --streaming \\
      --sequence_length 1024 --max_steps 20000 --per_device_train_batch_size 32 --positions nape --output_dir runs/nape
  the softmax twin, same data and order:   ... --attention softmax --output_dir runs/softmax
  the same by Transformers' own model:     ... --attention softmax --attn_implementation sdpa --output_dir runs/sdpa
  on a GPU, fast:                          ... --bf16 --torch_compile --dataloader_drop_last
  several GPUs:                            accelerate launch scripts/pretrain.py ...
"""


@dataclass
class ArchitectureArguments:
    """What to build."""

    config: str = field(metadata={"help": "A config.json, a folder with one, or a Hub id; softmax or ASEntmax."})
    tokenizer: str = field(metadata={"help": "Folder or Hub id of the tokenizer."})


def main() -> None:
    parser = HfArgumentParser(
        (ArchitectureArguments, DataArguments, RunArguments, TrainingArguments),  # type: ignore[arg-type]
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(output_dir="runs/pretrain", logging_steps=10, save_total_limit=2, learning_rate=1e-3)
    parser.set_defaults(lr_scheduler_type="cosine", warmup_steps=0.05, weight_decay=0.1, report_to="none")
    # Nothing in a step waits for the GPU: batches are copied beside the computation, and a loss of NaN is logged as it
    # is (the Trainer would look at each, and log the mean of those before in its place).
    parser.set_defaults(accelerator_config={"non_blocking": True}, logging_nan_inf_filter=False)
    choice, data, run, args = parser.parse_args_into_dataclasses()

    tokenizer = AutoTokenizer.from_pretrained(choice.tokenizer)
    train, evaluation = load_packed(data, tokenizer, seed=args.seed)
    settings, checkpoint = begin_run(args, choice, data, run)
    model, schedule = build_from_config(choice.config, run, tokenizer, length=data.sequence_length)
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
