"""Pictures of what attention does: of the maps themselves, and of trained models.

Without --model, from formulas: entmax against temperature and against alpha beside softmax and top-k, the profile of
each position scheme, dispersion as keys are added. With --model, from a forward pass at each length, exactly and in
memory that grows with the length alone: the learned scale r against n with three fits, the learned alpha, support,
entropy and largest weight against n, support and 64 x 64 block sparsity by layer, head and length, attention maps with
exact zeros white. --output_dir gets the pictures, results.json and results.md with the numbers.
"""

from __future__ import annotations

from transformers import HfArgumentParser

import hf_asentmax  # noqa: F401  (registers the Auto classes)
from hf_asentmax.analysis_report import AnalysisArguments, run_analysis
from hf_asentmax.runs import HelpFormatter

EXAMPLE = """
examples:
  python scripts/analyze.py                                                        the formulas; no model needed
  python scripts/analyze.py --model runs/softmax runs/asentmax --lengths 64 256 1024 4096     generated task
  a language model on a text:   ... --model runs/smollm2 --text book.txt --lengths 512 1024 2048 --samples 2
  one picture:                  ... --model runs/asentmax --figures map --map_length 64 --heads 0:5 1:3 1:6
On a CPU 4,096 tokens are comfortable; on a GPU 16,384 and beyond (--dtype bfloat16 --samples 1).
"""


def main() -> None:
    parser = HfArgumentParser(
        AnalysisArguments,  # type: ignore[arg-type]
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    (args,) = parser.parse_args_into_dataclasses()
    try:
        for text in run_analysis(args):
            print(f"{text}\n", flush=True)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
