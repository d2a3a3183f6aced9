"""Turn a softmax checkpoint into an ASEntmax one on disk, file by file: the model need not fit into memory.

The weights stay as they are; each attention layer gains the few parameters of its query scale, which starts at r = 1.
With --alpha 1 the result computes what the original does. With --alpha 1.5 attention is sparse at once, which costs
quality until the model is fine-tuned; scripts/finetune.py converts too, and moves alpha there gently.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from hf_asentmax.conversion import convert_checkpoint
from hf_asentmax.methods import METHODS
from hf_asentmax.runs import HelpFormatter

EXAMPLE = """
example:
  python scripts/convert.py --model SmolLM2-135M --output_dir SmolLM2-135M-asentmax --alpha 1.5
"""


@dataclass
class ConvertArguments:
    """What to convert, and into what."""

    model: str = field(metadata={"help": "Folder or Hub id of a softmax checkpoint: llama, mistral, qwen2/3, smollm3."})
    output_dir: str = field(metadata={"help": "Folder to write: new or empty. It appears when it is whole."})
    method: str = field(
        default="asentmax",
        metadata={"help": "Decides what the options below leave open.", "choices": list(METHODS)},
    )
    alpha: float | None = field(
        default=None, metadata={"help": "1 is softmax, 2 sparsemax; the larger, the fewer keys keep a weight."}
    )
    alpha_learned: bool | None = field(
        default=None, metadata={"help": "Learn one alpha a head, starting from --alpha."}
    )
    attention_top_k: int | None = field(default=None, metadata={"help": "Keys that --method top_k keeps a query."})
    query_scaling: str | None = field(
        default=None,
        metadata={
            "help": "Factor of the scores: adaptive (ASEntmax), static, log (SSMax) or none.",
            "choices": ["none", "log", "static", "adaptive"],
        },
    )
    positions: str = field(
        default="rope",
        metadata={
            "help": "rope keeps the model's own; nope, alibi or nape replace them and need much training.",
            "choices": ["rope", "nope", "alibi", "nape"],
        },
    )
    query_scale_delta: float | None = field(
        default=None,
        metadata={"help": "Constant part of the query scale; by default 1 - ln 2, to start at 1."},
    )


def main() -> None:
    parser = HfArgumentParser(
        ConvertArguments,  # type: ignore[arg-type]
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    (arguments,) = parser.parse_args_into_dataclasses()
    settings = asdict(arguments)
    source, target = settings.pop("model"), Path(settings.pop("output_dir"))
    try:
        convert_checkpoint(source, target, **settings)
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    for name, value in settings.items():
        print(f"{name:<24}{'of the method' if value is None else value}")
    print(f"\n{'file':<44}{'bytes':>16}")
    for path in sorted(target.iterdir()):
        print(f"{path.name:<44}{path.stat().st_size:>16,}")
    print(f"\nLoad {target} with AutoModelForCausalLM, after `import hf_asentmax` or with trust_remote_code=True.")


if __name__ == "__main__":
    main()
