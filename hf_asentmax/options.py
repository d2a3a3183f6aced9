"""What the argument classes of the command lines are written and checked with, and how their help is shown."""

from __future__ import annotations

from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the lines of description and examples as they are."""


def option(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field that HfArgumentParser makes an option of.

    Args:
        default: its value where it is left out; of a list each instance gets a copy.
        text: its help.
        choices: the values allowed; all if None.
    """
    metadata = {"help": text} | ({} if choices is None else {"choices": list(choices)})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_new_folder(output_dir: str) -> None:
    """Raise ValueError unless the folder is empty or still to be made."""
    folder = Path(output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output_dir must be a new or an empty folder, got {output_dir!r}; name another")
