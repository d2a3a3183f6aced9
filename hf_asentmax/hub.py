"""Checkpoints for others: the push to the Hub, and what goes with it.

A checkpoint's remote code is made in ``remote_code.py``, its card in ``model_card.py``; ``validation.py`` says whether
its files are whole.
"""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects, validate_repo_id

from .model_card import write_model_card
from .remote_code import generate_modeling
from .validation import check_asentmax_checkpoint

__all__ = ["check_asentmax_checkpoint", "generate_modeling", "plan_upload", "push", "write_model_card"]

# A training run's own files, which a model's users have no use for.
IGNORED = [
    "checkpoint-*",
    "incomplete-checkpoint-*",
    "runs/*",
    "*.unfinished*",
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "scaler.pt",
    "trainer_state.json",
    "training_args.bin",
    "*__pycache__*",
]


def plan_upload(folder: str | os.PathLike[str]) -> dict[str, int]:
    """What a push would send: the folder's files without a training run's own, by path in it, with their bytes."""
    folder = Path(folder)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    sent = filter_repo_objects(files, ignore_patterns=[*IGNORED, *DEFAULT_IGNORE_PATTERNS])
    return {name: (folder / name).stat().st_size for name in sent}


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload an ASEntmax model",
    token: str | None = None,
) -> str:
    """Uploads a checkpoint folder to the Hub, after checking that it is whole. Writes a card if it has none.

    Args:
        folder: what ``save_pretrained`` wrote.
        repo_id: ``owner/name``; created if it isn't there.
        private: whether a new repository is private; the account's default if None.
        revision: branch to push to, which must exist; ``main`` by default.
        token: access token; by default the one that ``hf auth login`` stored.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError, ValueError: the folder isn't whole, or the name can't be one; nothing was sent.
    """
    check_asentmax_checkpoint(folder)
    validate_repo_id(repo_id)
    if not (Path(folder) / "README.md").is_file():
        write_model_card(folder, name=repo_id)
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=str(folder),
        commit_message=commit_message,
        revision=revision,
        ignore_patterns=list(IGNORED),
    )
    return str(commit.commit_url)
