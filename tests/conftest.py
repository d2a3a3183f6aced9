"""What every test shares: no network, caches of its own, a fixed seed."""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Read when transformers, datasets and matplotlib are imported, so set before anything else here imports them.
_CACHE = tempfile.mkdtemp(prefix="hf_asentmax-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=_CACHE,  # a checkpoint's remote code is cached here: never read a former run's
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
)

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors. That is asked for before triton is
# imported, which hf_asentmax and parts of torch do. With a GPU the kernels are compiled, and tests/gpu has their tests;
# `TRITON_INTERPRET=1 pytest tests/test_kernels.py` interprets them there.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
collect_ignore = ["test_kernels.py"]
if importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore.clear()

import transformers  # noqa: E402
from helpers import tiny_model  # noqa: E402

from hf_asentmax import patch_model  # noqa: E402

if not collect_ignore:
    from quick_interpreter import quicken

    quicken()

# The same examples in every run and no deadline: a slow machine fails no test.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=30)
hypothesis.settings.load_profile("tests")


# The files that take longest begin: one that came last would leave the other workers idle.
LONG = ["kernels", "models", "synthetic", "remote_code", "generation", "decode_kernels", "tutorial", "hub"]
LONG += ["distributed"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed `random`, `numpy` and `torch`, so that a test does not depend on the ones before it."""
    transformers.set_seed(0)


@pytest.fixture
def nan_in_empty() -> Iterator[None]:
    """Fill `torch.empty` with NaN (integers: the largest value), so that reading what was never written shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # Filling is a part of torch's deterministic mode; warn_only keeps operations without such a version usable.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small ASEntmax checkpoint in one file."""
    folder = tmp_path / "tiny-asentmax"
    patch_model(tiny_model("llama")).save_pretrained(folder)
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The same in several files."""
    folder = tmp_path / "tiny-shards"
    patch_model(tiny_model("llama")).save_pretrained(folder, max_shard_size="20KB")
    return folder
