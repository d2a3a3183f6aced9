"""Writing a checkpoint: its modeling code beside it, and all of its files or none."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def modeling_source(family: str) -> str:
    """The self-contained modeling file of a family, as it travels with every checkpoint."""
    name = f"modeling_asentmax_{family}.py"
    if Path(__file__).name == name:  # this code is itself such a file
        return Path(__file__).read_text(encoding="utf-8")
    source: str = import_module(f"{__package__}.hub").generate_modeling(family)
    return source


@contextmanager
def staged(folder: str | os.PathLike) -> Iterator[Path]:
    """A new folder beside ``folder`` to write a checkpoint into. Its files move to ``folder`` when all are written, and
    weights of an earlier checkpoint there go; an error or a kill before that leaves ``folder`` as it was.

    Raises:
        NotADirectoryError: ``folder`` is a file.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"save_directory must be a folder, got the file {str(target)!r}; choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as staging:
        yield Path(staging)
        target.mkdir(exist_ok=True)
        written = {path.name for path in Path(staging).iterdir()}
        stale = [path for path in target.iterdir() if _WEIGHTS.fullmatch(path.name) and path.name not in written]
        for name in sorted(written):
            os.replace(Path(staging) / name, target / name)
        for path in stale:
            path.unlink()
