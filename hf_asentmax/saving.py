"""Writing a checkpoint: its modeling code beside it, all of its files or none, adapters with their base."""

from __future__ import annotations

import json
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
    """A new folder within ``folder`` to write a checkpoint into. Its files move up when all are written, and weights of
    an earlier checkpoint that they replace go; an error or a kill before that leaves the files there as they were.

    Raises:
        NotADirectoryError: ``folder`` is a file.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"save_directory must be a folder, got the file {str(target)!r}; choose another name")
    existed = target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix=".saving-", dir=target) as staging:
            yield Path(staging)
            written = {path.name for path in Path(staging).iterdir()}
            stale = [path for path in target.iterdir() if _WEIGHTS.fullmatch(path.name) and path.name not in written]
            for name in sorted(written):
                os.replace(Path(staging) / name, target / name)
            if any(_WEIGHTS.fullmatch(name) for name in written):
                for path in stale:
                    path.unlink()
    except BaseException:
        if not existed:
            target.rmdir()
        raise


def check_adapter_base(base: str | None, alpha: float) -> None:
    """Raises where an adapter, saved now, would later be put onto a base that computes something else.

    Args:
        base: what the adapter names as its base: a folder or a Hub id.
        alpha: what the model computes with now.

    Raises:
        RuntimeError: the base has no name, or is a folder with another alpha or with a softmax model.
    """
    config = Path(base or "") / "config.json"
    found = json.loads(config.read_text(encoding="utf-8")).get("entmax_alpha") if base and config.is_file() else alpha
    if not base or found != alpha:
        got = "a base that was patched in memory only" if not base else f"alpha {found} in {base}, {alpha} in the model"
        raise RuntimeError(
            f"an adapter must be saved with the name of a converted base that computes what the model does, got {got}; "
            "call model.save_pretrained(folder) on the patched model before get_peft_model or add_adapter"
        )
