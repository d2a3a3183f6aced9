"""Train two small twins from scratch, softmax and ASEntmax, and compare them far beyond their training length.

The task is Max Retrieval (generated): which value belongs to the item of highest priority? Both twins have the same
sizes, first weights, data, order, steps and learning rate. --output_dir gets the ASEntmax checkpoint with its model
card, the softmax twin, results.json, results.md and a picture; then the checkpoint is loaded again and answers.
"""

from __future__ import annotations

from transformers import HfArgumentParser

from hf_asentmax.demo import DemoArguments, answer_prompts, run_demo
from hf_asentmax.options import HelpFormatter

EXAMPLE = """
examples:
  python scripts/demo.py                                              what `make demo` does
  python scripts/demo.py --seed 1 --output_dir runs/demo-1            another seed
  python scripts/demo.py --stream validation --learning_rate 3e-3 --output_dir runs/try    to choose settings
"""


def main() -> None:
    parser = HfArgumentParser(DemoArguments, description=__doc__, epilog=EXAMPLE, formatter_class=HelpFormatter)  # type: ignore[arg-type]
    (args,) = parser.parse_args_into_dataclasses()
    found = run_demo(args)
    print(f"\nexact match in % (95 % interval), seed {args.seed}, trained on up to {args.train_length} tokens:\n")
    print(found["table"])
    for method, spent in found["seconds"].items():
        loss, training, evaluation = found["losses"][method], spent["training"], spent["evaluation"]
        print(f"{method}: last training loss {loss:.3f}; trained in {training:.0f} s, evaluated in {evaluation:.0f} s")
    length = 16 * args.train_length
    print(f"\n{args.output_dir}, loaded again, on prompts of {length} items:")
    for answer in answer_prompts(args.output_dir, args, length=length):
        end = " ".join(answer["prompt"].split()[-4:])
        print(f"  ... {end} -> {answer['generated']}   (highest: {answer['highest']}, right: {answer['expected']})")


if __name__ == "__main__":
    main()
