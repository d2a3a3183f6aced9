"""Push an ASEntmax checkpoint to the Hub: check that it is whole, write its model card, upload.

The card gets the numbers that you give, and no others: --results takes JSON files with lists of measurements
({"method": ..., "length": ..., "accuracy": ..., "seed": ..., "samples": ...}), as the evaluation scripts write them.
Log in first with `hf auth login`, or set HF_TOKEN. --dry-run shows what would go; it writes and sends nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.utils import validate_repo_id
from transformers import HfArgumentParser

from hf_asentmax.hub import check_asentmax_checkpoint, plan_upload, push
from hf_asentmax.model_card import check_pictures, render_model_card, write_model_card
from hf_asentmax.options import HelpFormatter

EXAMPLE = """
example:
  python scripts/push_to_hub.py --model runs/smollm2 --repo_id me/SmolLM2-135M-asentmax --dry-run \\
      --base_model HuggingFaceTB/SmolLM2-135M-Instruct --results runs/smollm2/results.json --pictures runs/needle.png
"""


@dataclass
class PushArguments:
    """What goes where, and what its card says."""

    model: str = field(metadata={"help": "Folder of the checkpoint, as save_pretrained wrote it."})
    repo_id: str = field(metadata={"help": "OWNER/NAME on the Hub; created if it is not there."})
    dry_run: bool = field(default=False, metadata={"help": "Show what would go, and do nothing."})
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    revision: str | None = field(default=None, metadata={"help": "An existing branch to push to; main by default."})
    keep_card: bool = field(default=False, metadata={"help": "Push the folder's README.md instead of writing it anew."})
    title: str | None = field(default=None, metadata={"help": "Heading of the card; by default the repository's name."})
    base_model: str | None = field(default=None, metadata={"help": "Hub id of the model that was converted."})
    datasets: list[str] = field(default_factory=list, metadata={"help": "Hub ids of the training data."})
    results: list[str] = field(default_factory=list, metadata={"help": "JSON files with lists of measurements."})
    pictures: list[str] = field(default_factory=list, metadata={"help": "Image files to show; copied into the folder."})
    training: str | None = field(default=None, metadata={"help": "A Markdown file that tells how it was trained."})
    license: str | None = field(default="apache-2.0", metadata={"help": "Licence of the weights, as the Hub names it."})


def read_results(files: list[str]) -> list[dict[str, Any]]:
    """The rows of all files."""
    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} must be JSON, got {error}; write it with an evaluation script") from error
        if not isinstance(content, list):
            raise ValueError(f"{file} must hold a list of results, got {type(content).__name__}; see --help")
        rows += content
    return rows


def send(arguments: PushArguments) -> None:
    validate_repo_id(arguments.repo_id)
    check_asentmax_checkpoint(arguments.model)
    pictures = check_pictures(arguments.pictures)
    card: dict[str, Any] = {
        "base_model": arguments.base_model,
        "datasets": arguments.datasets,
        "results": read_results(arguments.results),
        "title": arguments.title or arguments.repo_id.split("/")[-1],
        "name": arguments.repo_id,
        "training": Path(arguments.training).read_text(encoding="utf-8") if arguments.training else None,
        "license": arguments.license,
    }
    files = plan_upload(arguments.model)
    if not arguments.keep_card:
        text = render_model_card(arguments.model, pictures=[path.name for path in pictures], **card)
        files |= {path.name: path.stat().st_size for path in pictures} | {"README.md": len(text.encode())}
    print(f"{'file':<44}{'bytes':>16}")
    for name in sorted(files):
        print(f"{name:<44}{files[name]:>16,}")
    print(f"{'total':<44}{sum(files.values()):>16,}\n")
    if arguments.dry_run:
        print(f"Would go to {arguments.repo_id}. Nothing was sent or written.")
        return
    if not arguments.keep_card:
        write_model_card(arguments.model, pictures=pictures, **card)
    print(push(arguments.model, arguments.repo_id, private=arguments.private or None, revision=arguments.revision))


def main() -> None:
    parser = HfArgumentParser(
        PushArguments,  # type: ignore[arg-type]
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    (arguments,) = parser.parse_args_into_dataclasses()
    try:
        send(arguments)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
