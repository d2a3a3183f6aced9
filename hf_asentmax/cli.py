"""The command line ``hf-asentmax``, and the doors of those scripts that do the same from a source tree.

What a command does lives beside its subject, as an argument class and a function that yields the texts to print; here
are their names and what their ``--help`` says, once for both doors.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from .analysis_report import AnalysisArguments, run_analysis
from .cloze import ClozeArguments, run_cloze
from .conversion import ConvertArguments, run_conversion
from .inspection import inspect_checkpoint
from .joining import JoinArguments, run_join
from .ladder import LadderArguments, run_ladder
from .options import HelpFormatter
from .perplexity import PerplexityArguments, run_perplexity
from .retrieval import RetrievalArguments, SamplesArguments, run_retrieval, run_samples

EXTRA_PACKAGES = ("accelerate", "datasets", "matplotlib")  # of the extra "eval"; a command imports what it needs


@dataclass(frozen=True)
class Command:
    """A command: its argument class, its function, and its help, where ``%(prog)s`` is what calls it.

    Without an argument class it takes a folder.
    """

    arguments: type[Any] | None
    run: Callable[[Any], Iterable[str]]
    summary: str
    description: str
    examples: str


COMMANDS: dict[tuple[str, ...], Command] = {
    ("convert",): Command(
        ConvertArguments,
        run_conversion,
        "a softmax checkpoint into an ASEntmax one, file by file",
        """\
Turn a softmax checkpoint into an ASEntmax one on disk, file by file: the model need not fit into memory.

The weights stay as they are; each attention layer gains the few parameters of its query scale, which starts at r = 1.
With --alpha 1 the result computes what the original does. With --alpha 1.5 attention is sparse at once, which costs
quality until the model is fine-tuned; scripts/finetune.py converts too, and moves alpha there gently.""",
        """\
examples:
  %(prog)s --model SmolLM2-135M --output_dir SmolLM2-135M-asentmax --alpha 1.5
  the softmax twin, with the same code:   %(prog)s --model SmolLM2-135M --output_dir twin --method softmax
""",
    ),
    ("inspect",): Command(
        None,
        lambda args: inspect_checkpoint(args.folder),
        "what a checkpoint is: method, alpha, learned scale, positions, and whether it is whole",
        """\
Show what a checkpoint folder holds: class and family, method, alpha, positions, context, parameters, remote code, and
whether its safetensors are whole. Of a learned alpha, each head's; of the query scale, r at 64, 1,024 and 65,536
visible keys by layer, mean and range over the heads. With "adaptive", where r depends on the hidden state: what the
biases alone give.

Reads config.json, headers, and the query scale; builds no model and runs no code of the folder. Exits with 1 where a
weight is missing or a file is damaged.""",
        """\
examples:
  %(prog)s SmolLM2-135M-asentmax
  %(prog)s runs/smollm2 && echo whole
""",
    ),
    ("evaluate", "perplexity"): Command(
        PerplexityArguments,
        run_perplexity,
        "perplexity by context length and position",
        """\
Perplexity by context length, always of the same final tokens of each document, and by position in the document.

Any causal language model can be given, softmax or ASEntmax; several are compared on the same tokens, with the ratio to
the first one's perplexity, and each with itself at the shortest length: whether more context helps or hurts. Only
documents that hold the longest length count, at every length. Intervals are bootstrapped by document. Prints tables;
--output_dir gets results.json (with the loss of each document), results.md and a picture.""",
        """\
examples:
  %(prog)s --model runs/smollm2 --data validation.parquet --lengths 1024 2048 4096
  several models:   ... --model runs/softmax runs/nape --method softmax ASEntmax --bf16 --output_dir runs/perplexity
  RoPE stretched eight times, beside itself:   ... --model runs/softmax runs/softmax --rope none yarn:8
  several GPUs, the documents shared among them:   accelerate launch -m hf_asentmax evaluate perplexity ...
""",
    ),
    ("evaluate", "retrieval"): Command(
        RetrievalArguments,
        run_retrieval,
        "facts hidden in text, by length and depth",
        """\
Retrieval accuracy by length, as far beyond the training length as you like: nothing is cut to a context limit.

Facts are hidden in text and asked for, and the model writes: a pass key, a magic number (needle), one of four
(multikey), four of one name (multivalue) or of four (multiquery), variables set to each other, the common words of a
list, the most frequent ones: RULER's tasks in words of our own, from 256 tokens on, scored by the share of the answers
that the text contains. needle and multikey go by depth and length. Several models are compared on the same samples.
Prints a table; --output_dir gets results.json, results.md and a picture. For models that were trained on a generated
task there is `hf-asentmax evaluate synthetic` (scripts/evaluate_synthetic.py).""",
        """\
examples:
  %(prog)s --model SmolLM2-135M --task needle --lengths 512 1024 --output_dir runs/needle
  two models, one picture:    ... --model runs/softmax runs/asentmax --task passkey --lengths 1024 2048 4096
  on a GPU, several tasks:    ... --task multikey multivalue variables --samples 200 --batch_size 16 --bf16
  RoPE stretched eight times, beside itself:   ... --model runs/softmax runs/softmax --rope none yarn:8
  several GPUs, the samples shared among them:   accelerate launch -m hf_asentmax evaluate retrieval ...
""",
    ),
    ("evaluate", "synthetic"): Command(
        LadderArguments,
        run_ladder,
        "exact match on the generated task a model was trained on",
        """\
Exact match on a generated task by length, from the training length to 65,536 tokens and beyond.

For models that were trained on the task (scripts/train_synthetic.py): task and options are read from task.json in the
model's folder. One teacher-forced pass a batch tells what greedy decoding would give (in 2Back and local count, which
class each token gets), and nothing is cut to a context limit. Several models are compared on the same samples. Prints a
table with 95 % intervals; --output_dir gets results.json, results.md and a picture.""",
        """\
examples:
  %(prog)s --model runs/synthetic --bf16 --output_dir runs/synthetic/test
  two models, one picture:     ... --model runs/softmax runs/asentmax --output_dir runs/comparison
  to choose settings, quickly: ... --model runs/synthetic --stream validation --lengths 64 1024 --samples 100
  the demo's checkpoint:       ... --model runs/demo --lengths 32 512 8192
  several GPUs, the samples shared among them:   accelerate launch -m hf_asentmax evaluate synthetic ...
""",
    ),
    ("evaluate", "join"): Command(
        JoinArguments,
        run_join,
        "results of several evaluations in one table and one picture",
        """\
Put together what was evaluated one by one: a line a method, a column a length, and one picture of all.

Takes results of perplexity (of the same documents: compared document by document, each with itself at the shortest
length), of retrieval or of a generated task. Results of one name are runs of it: mean and range, and thin lines in the
picture. --output_dir gets results.json, results.md and the picture; what is put together stays as it is.""",
        """\
examples:
  %(prog)s --results runs/softmax/perplexity runs/asentmax/perplexity --method softmax ASEntmax
  two seeds as runs of one method:   ... --results runs/a-0/needle runs/a-1/needle --method ASEntmax ASEntmax
  a picture, too:                    ... --output_dir runs/report/needle --title 'Needle, zero-shot'
""",
    ),
    ("write", "retrieval"): Command(
        SamplesArguments,
        run_samples,
        "prompts of the retrieval tasks with their answers, to fine-tune on",
        """\
Prompts of the retrieval tasks with their answers, to fine-tune on. A small model that was never asked to retrieve
scores 0 at every length, which says nothing: train every method on the same file, at the training length only, and
evaluate with `hf-asentmax evaluate retrieval`, whose samples are drawn from other seeds. Keep these scores apart from
zero-shot ones.

Each line has prompt and completion, which scripts/finetune.py takes (the loss is on the completion), and TRL's
SFTTrainer.""",
        """\
examples:
  %(prog)s --tokenizer runs/nape --length 1024 --output retrieval.jsonl
  two tasks:   ... --task needle variables --samples 4000
  then:        python scripts/finetune.py --model runs/nape --data retrieval.jsonl --sequence_length 1024 ...
""",
    ),
    ("write", "cloze"): Command(
        ClozeArguments,
        run_cloze,
        "a cloze set made of text, as a task of lm-eval",
        """\
A cloze set of held-out text, as a local task of lm-eval: does a model still do at short contexts what it did?

After LAMBADA: the last word of a sentence is asked for where it stands in the 50 to 150 words before. It has four
lower-case letters or more and comes once in its sentence; passages don't overlap (hf_asentmax.cloze has the rules).
lm-eval gives the accuracy of the greedy word with its standard error, and the perplexity of a word.""",
        """\
examples:
  %(prog)s --data held-out.parquet --samples 2000 --output_dir runs/cloze
  then:   lm_eval --model hf --model_args pretrained=runs/nape,trust_remote_code=True --include_path runs/cloze \\
              --tasks cloze --batch_size 16
""",
    ),
    ("plot",): Command(
        AnalysisArguments,
        run_analysis,
        "pictures of what attention does: of formulas, and of checkpoints",
        """\
Pictures of what attention does: of the maps themselves, and of trained models.

Without --model, from formulas: entmax against temperature and against alpha beside softmax and top-k, the profile of
each position scheme, dispersion as keys are added. With --model, from a forward pass at each length, exactly and in
memory that grows with the length alone: the learned scale r against n with three fits, the learned alpha, support,
entropy and largest weight against n, support and 64 x 64 block sparsity by layer, head and length, attention maps with
exact zeros white. --output_dir gets the pictures, results.json and results.md with the numbers.""",
        """\
examples:
  %(prog)s                                                        the formulas; no model needed
  %(prog)s --model runs/softmax runs/asentmax --lengths 64 256 1024 4096     generated task
  a language model on a text:   ... --model runs/smollm2 --text book.txt --lengths 512 1024 2048 --samples 2
  on documents:                 ... --model runs/softmax runs/nape --data held-out.parquet --figures sparsity heads
  one picture:                  ... --model runs/asentmax --figures map --map_length 64 --heads 0:5 1:3 1:6
On a CPU 4,096 tokens are comfortable; on a GPU 16,384 and beyond (--dtype bfloat16 --samples 1).
""",
    ),
}

_EXAMPLES = """\
examples:
  %(prog)s convert --model SmolLM2-135M --output_dir SmolLM2-135M-asentmax
  %(prog)s inspect SmolLM2-135M-asentmax
  %(prog)s evaluate perplexity --model SmolLM2-135M-asentmax --data held-out.parquet --lengths 1024 2048
  %(prog)s plot --model SmolLM2-135M-asentmax --text book.txt --lengths 512 1024
Each command has a --help of its own.
"""

_GROUPS: dict[tuple[str, ...], dict[str, Any]] = {
    ("evaluate",): {
        "help": "perplexity, retrieval from text, or a generated task, by length; several put together",
        "description": "Measure models, softmax and ASEntmax alike, at ever longer contexts.",
        "epilog": """\
examples:
  %(prog)s perplexity --model runs/smollm2 --data validation.parquet --lengths 1024 2048
  %(prog)s retrieval --model SmolLM2-135M --task needle --lengths 512 1024 --output_dir runs/needle
  %(prog)s synthetic --model runs/synthetic --bf16 --output_dir runs/synthetic/test
  %(prog)s join --results runs/softmax/needle runs/asentmax/needle
Each has a --help of its own.
""",
    },
    ("write",): {
        "help": "data to train on, or to evaluate with lm-eval",
        "description": "Write data sets: samples to fine-tune on, and tests of short contexts.",
        "epilog": """\
examples:
  %(prog)s retrieval --tokenizer runs/nape --length 1024 --output retrieval.jsonl
  %(prog)s cloze --data held-out.parquet --samples 2000 --output_dir runs/cloze
Each has a --help of its own.
""",
    },
}


def main(words: Sequence[str] | None = None) -> None:
    """``hf-asentmax COMMAND ...``.

    Args:
        words: what follows the program's name; by default the process's own arguments.

    Raises:
        SystemExit: something doesn't fit (a message that begins with "error:", or usage), or help was asked for.
    """
    by_module = Path(sys.argv[0]).name == "__main__.py"
    parser = HfArgumentParser(
        prog="python -m hf_asentmax" if by_module else "hf-asentmax",
        description="ASEntmax checkpoints: make one, look into it, measure it, draw it.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    groups: dict[tuple[str, ...], Any] = {(): commands}
    for name, command in COMMANDS.items():
        group = name[:-1]
        if group not in groups:
            groups[group] = commands.add_parser(*group, formatter_class=HelpFormatter, **_GROUPS[group]).add_subparsers(
                title="commands", metavar="COMMAND", required=True
            )
        _complete(groups[group].add_parser(name[-1], help=command.summary, **_settings(command)), command)
    _execute(parser.parse_args(words))


def script(*name: str) -> None:
    """The door of a script to one of the commands: the same options, and itself in the examples."""
    command = COMMANDS[name]
    parser = HfArgumentParser(prog=f"python scripts/{Path(sys.argv[0]).name}", **_settings(command))
    _complete(parser, command)
    _execute(parser.parse_args())


def _settings(command: Command) -> dict[str, Any]:
    return {
        "dataclass_types": [] if command.arguments is None else [command.arguments],
        "description": command.description,
        "epilog": command.examples,
        "formatter_class": HelpFormatter,
    }


def _complete(parser: HfArgumentParser, command: Command) -> None:
    if command.arguments is None:
        parser.add_argument("folder", help="Folder of a checkpoint.")
    parser.set_defaults(command=command)


def _execute(chosen: Any) -> None:
    command: Command = chosen.command
    args = chosen
    if command.arguments is not None:
        args = command.arguments(**{field.name: getattr(chosen, field.name) for field in fields(command.arguments)})
    try:
        for text in command.run(args):
            print(f"{text}\n", flush=True)
    except ModuleNotFoundError as error:
        if error.name not in EXTRA_PACKAGES:
            raise
        raise SystemExit(
            f"error: {error.name} must be installed for this command, got none; pip install 'hf_asentmax[eval]'"
        ) from error
    except BrokenPipeError as error:  # whoever read, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes at exit
        raise SystemExit(1) from error
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
