"""Runs Python where torch, transformers and what they require are installed, and nothing else: not this package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

_PRELUDE = """\
import importlib.util, sys
sys.path.append({packages!r})
for name in ("hf_asentmax", "peft", "accelerate", "datasets", "entmax"):
    assert importlib.util.find_spec(name) is None, name
"""


def _top_level_names(*wanted: str) -> dict[str, Path]:
    """Files and folders of installed packages and of everything that they require, by their name in site-packages."""
    found: dict[str, Path] = {}
    seen: set[str] = set()
    todo = list(wanted)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            package = distribution(name)
        except PackageNotFoundError:  # required on other platforms only
            continue
        for file in package.files or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__"):
                found[top] = Path(str(package.locate_file(top)))
        for text in package.requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
    return found


def run_clean(code: str, *arguments: object, folder: Path, environment: dict[str, str] | None = None) -> str:
    """What `code` prints; it fails the test if it exits with an error.

    Args:
        code: a Python program that finds `arguments` in `sys.argv[1:]`.
        folder: where the environment and the caches go.
        environment: environment variables beside the present ones.
    """
    packages = folder / "packages"
    if not packages.exists():
        packages.mkdir(parents=True)
        for name, path in _top_level_names("torch", "transformers").items():
            (packages / name).symlink_to(path)
    program = folder / "program.py"
    program.write_text(_PRELUDE.format(packages=str(packages)) + code, encoding="utf-8")
    # -I and -S: no variables of the caller's Python, no site-packages, not even through .pth files.
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(program), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "HF_HOME": str(folder / "home"), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
