"""Checkpoints that survive a kill: which one is whole, and whose run it belongs to."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .validation import read_safetensors_header

logger = logging.get_logger(__name__)

BASE = "base"  # folder of the converted base model within an adapter's folder
# What the Trainer needs to go on exactly; DeepSpeed and FSDP write folders of their own instead.
RESUME_FILES = ("optimizer.pt", "scheduler.pt")
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")


def checkpoint_problem(folder: str | os.PathLike[str], *, world_size: int = 1) -> str | None:
    """Why training can't go on from a Trainer checkpoint, None if it can.

    The Trainer writes the weights first, then the states of optimizer, scheduler and random generators, and
    trainer_state.json last; a kill leaves out the end, a full disk cuts files short. Looks at headers and sizes only.

    Args:
        folder: a folder checkpoint-N.
        world_size: number of training processes, each of which has a file of its own for its random generators.
    """
    folder = Path(folder)
    try:
        step = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError) as error:
        return f"trainer_state.json can't be read ({error})"
    if folder.name != f"{PREFIX_CHECKPOINT_DIR}-{step}":
        return f"trainer_state.json is of step {step}"
    random_states = ["rng_state.pth"] if world_size == 1 else [f"rng_state_{rank}.pth" for rank in range(world_size)]
    sharded = any(path.is_dir() and path.name != BASE for path in folder.iterdir())
    needed = random_states if sharded else [*RESUME_FILES, *random_states]
    for name in needed:
        if not (folder / name).is_file():
            return f"{name} is missing"
    weights = {path for pattern in WEIGHT_FILES for path in folder.glob(pattern)}
    if not weights and not sharded:
        return "the weights are missing"
    for index in folder.glob("*.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError) as error:
            return f"{index.name} can't be read ({error})"
        if missing := sorted(name for name in shards if not (folder / name).is_file()):
            return f"{missing[0]} is missing"
    for path in sorted(weights | {path for ending in ("*.pt", "*.pth") for path in folder.glob(ending)}):
        whole = _is_whole_safetensors(path) if path.suffix == ".safetensors" else zipfile.is_zipfile(path)
        if not whole:
            return f"{path.name} is cut short or corrupt"
    return None


def _is_whole_safetensors(path: Path) -> bool:
    try:
        read_safetensors_header(path)
    except (OSError, ValueError):
        return False
    return True


def last_complete_checkpoint(
    output_dir: str | os.PathLike[str], *, world_size: int = 1, set_aside: bool = True
) -> str | None:
    """The newest checkpoint of a run from which it can go on, None if there is none.

    Newer ones that aren't whole are renamed to incomplete-checkpoint-N, with a warning, so that the resumed run does
    not write into their leftovers.

    Args:
        output_dir: the run's folder.
        world_size: number of training processes.
        set_aside: rename what is not whole (one process only should).
    """
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    folders = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if pattern.fullmatch(path.name)]
    for folder in sorted(folders, key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True):
        problem = checkpoint_problem(folder, world_size=world_size)
        if problem is None:
            return str(folder)
        if set_aside:
            aside = folder.with_name(f"incomplete-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            logger.warning(
                f"{folder} is not a complete checkpoint: {problem}. It is now {aside.name}; delete it freely."
            )
    return None


def claim_output_dir(
    output_dir: str | os.PathLike[str],
    settings: dict[str, Any],
    *,
    resume: str = "auto",
    world_size: int = 1,
    main_process: bool = True,
) -> str | None:
    """Find where a run goes on, and note its settings in OUTPUT_DIR/settings.json so that no other run goes on there.

    Args:
        output_dir: the run's folder.
        settings: what defines the run, JSON values.
        resume: "auto", from the last complete checkpoint if there is one; "never"; or a checkpoint's folder.
        world_size: number of training processes.
        main_process: whether this process may write.

    Returns:
        The checkpoint to resume from, None to start.

    Raises:
        ValueError: the folder holds checkpoints of a run with other settings, or any with "never"; or the checkpoint
            named is not complete.
    """
    output_dir, noted = Path(output_dir), Path(output_dir) / "settings.json"
    started = any(output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")) or (output_dir / BASE).exists()
    settings = json.loads(json.dumps(settings))
    if started and resume == "never":
        raise ValueError(
            f"output_dir must hold no run with --resume never, got {output_dir}; choose another or delete it"
        )
    if started and noted.is_file():
        former = json.loads(noted.read_text(encoding="utf-8"))
        if changed := sorted(name for name in former | settings if former.get(name) != settings.get(name)):
            what = ", ".join(f"{name} {former.get(name)!r} then, {settings.get(name)!r} now" for name in changed)
            raise ValueError(
                f"settings must be those of the run in {output_dir} to go on with it, got {what}; "
                "give them as they were, choose another --output_dir, or delete this one"
            )
    if resume in ("auto", "never"):
        checkpoint = last_complete_checkpoint(output_dir, world_size=world_size, set_aside=main_process)
    else:
        checkpoint, problem = resume, checkpoint_problem(resume, world_size=world_size)
        if problem is not None:
            raise ValueError(f"checkpoint must be complete, got {resume}, where {problem}; use --resume auto")
    if main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(noted, settings)
    return checkpoint


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)
