"""The package's import directions, read from the syntax tree of every file."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("hf_asentmax", "patches", "scripts", "tests")

# Modules of the core, lowest first: each may import the ones above its own line at module level, and nothing below.
LAYERS = (
    ("hf_asentmax.ops",),
    ("hf_asentmax.scaling", "hf_asentmax.positions", "hf_asentmax.saving", "hf_asentmax.validation"),
    ("hf_asentmax.attention", "hf_asentmax.configuration_asentmax"),
    ("hf_asentmax.model_mixin", "hf_asentmax.patches"),
    ("hf_asentmax.patching", "hf_asentmax.modeling_asentmax"),
)

# Installed by extras only. A module of metrics is loaded by `evaluate`, which is then there.
EXTRAS = (
    "accelerate",
    "adasplash",
    "datasets",
    "entmax",
    "evaluate",
    "lm_eval",
    "matplotlib",
    "peft",
    "torchao",
    "trl",
)

# Times with triton.testing, imported where there is a GPU to time.
TIMING = "hf_asentmax.benchmark.timing"


class Source(NamedTuple):
    """One file: its path from the root, the name it is imported by, and its tree."""

    path: str
    module: str
    tree: ast.Module


def read_source(path: str, text: str) -> Source:
    """Parse `text` as the file at `path` (from the root, with slashes)."""
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return Source(path, f"hf_asentmax.{module}" if path.startswith("patches/") else module, ast.parse(text))


def read_tree() -> list[Source]:
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    return [read_source(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")) for file in files]


def is_within(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")


def imports(source: Source, *, module_level: bool = False) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of each import; of `from a import b` that is `a.b`."""
    for node in walk_module_level(source.tree) if module_level else ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = node.module or ""
            if node.level:
                package = source.module.split(".")
                package = package[: len(package) + source.path.endswith("__init__.py") - node.level]
                parent = ".".join([*package, parent] if parent else package)
            yield from ((node.lineno, f"{parent}.{alias.name}") for alias in node.names)


def walk_module_level(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that importing the module runs: all but the bodies of functions and of `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from walk_module_level(child)


def is_packaged(source: Source) -> bool:
    return is_within(source.module, "hf_asentmax")


def is_triton_kernel(module: str) -> bool:
    return module.startswith("hf_asentmax.ops.triton_")


def family_modules_elsewhere(source: Source) -> Iterator[tuple[int, str]]:
    if source.path.startswith("patches/") or source.path == "hf_asentmax/modeling_asentmax.py":
        return
    if is_packaged(source):
        yield from ((line, name) for line, name in imports(source) if is_within(name, "transformers.models"))


def triton_elsewhere(source: Source) -> Iterator[tuple[int, str]]:
    if is_packaged(source) and not is_triton_kernel(source.module):
        found = imports(source, module_level=source.module == TIMING)
        yield from ((line, name) for line, name in found if is_within(name, "triton"))


def kernels_at_import_time(source: Source) -> Iterator[tuple[int, str]]:
    if is_packaged(source) and not is_triton_kernel(source.module):
        found = imports(source, module_level=True)
        yield from ((line, name) for line, name in found if is_triton_kernel(name))


def extras_at_import_time(source: Source) -> Iterator[tuple[int, str]]:
    if is_packaged(source) and not is_within(source.module, "hf_asentmax.metrics"):
        found = imports(source, module_level=True)
        yield from ((line, name) for line, name in found if name.split(".")[0] in EXTRAS)


def transformers_in_ops(source: Source) -> Iterator[tuple[int, str]]:
    if is_within(source.module, "hf_asentmax.ops"):
        yield from ((line, name) for line, name in imports(source) if is_within(name, "transformers"))


def upward_imports(source: Source) -> Iterator[tuple[int, str]]:
    def level(name: str) -> int | None:
        return next((i for i, layer in enumerate(LAYERS) if any(is_within(name, module) for module in layer)), None)

    own = level(source.module)
    if own is None:
        return
    for line, name in imports(source, module_level=True):
        other = level(name)
        if other is not None and other > own:
            yield line, name


def imported_scripts(source: Source) -> Iterator[tuple[int, str]]:
    scripts = {file.stem for file in (ROOT / "scripts").glob("*.py")} | {"scripts"}
    yield from ((line, name) for line, name in imports(source) if name.split(".")[0] in scripts)


def prints(source: Source) -> Iterator[tuple[int, str]]:
    if is_packaged(source) and source.module != "hf_asentmax.cli":
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                yield node.lineno, "print("


def assertions(source: Source) -> Iterator[tuple[int, str]]:
    if is_packaged(source):
        yield from ((node.lineno, "assert") for node in ast.walk(source.tree) if isinstance(node, ast.Assert))


Rule = Callable[[Source], Iterator[tuple[int, str]]]

# Each rule with a file that breaks it: a rule that finds nothing there would pass for the wrong reason.
RULES: list[tuple[Rule, str, str]] = [
    (family_modules_elsewhere, "hf_asentmax/hub.py", "from transformers.models.llama import modeling_llama"),
    (family_modules_elsewhere, "hf_asentmax/hub.py", "from transformers import models"),
    (triton_elsewhere, "hf_asentmax/ops/attention.py", "def launch():\n    import triton.language as tl"),
    (triton_elsewhere, "hf_asentmax/benchmark/timing.py", "from triton.testing import do_bench"),
    (kernels_at_import_time, "hf_asentmax/ops/attention.py", "from .triton_forward import forward"),
    (kernels_at_import_time, "hf_asentmax/ops/__init__.py", "from . import triton_forward"),
    (extras_at_import_time, "hf_asentmax/training.py", "if True:\n    from peft import PeftModel"),
    (transformers_in_ops, "hf_asentmax/ops/reference.py", "def f():\n    from transformers import utils"),
    (upward_imports, "hf_asentmax/ops/reference.py", "from ..scaling import QueryScale"),
    (upward_imports, "hf_asentmax/attention.py", "from hf_asentmax.patching import Patch"),
    (imported_scripts, "tests/test_demo.py", "from scripts.smoke import main"),
    (prints, "patches/llama.py", "def f():\n    print(1)"),
    (assertions, "hf_asentmax/scaling.py", "assert True"),
]
ALL_RULES = list(dict.fromkeys(rule for rule, _, _ in RULES))


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: rule.__name__)
def test_architecture_holds(rule: Rule) -> None:
    sources = read_tree()
    assert {source.path.split("/")[0] for source in sources} == set(FOLDERS)
    assert [f"{source.path}:{line}: {name}" for source in sources for line, name in rule(source)] == []


@pytest.mark.parametrize(("rule", "path", "text"), RULES, ids=lambda value: getattr(value, "__name__", None))
def test_architecture_rule_finds_a_violation(rule: Rule, path: str, text: str) -> None:
    assert len(list(rule(read_source(path, text)))) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("hf_asentmax/adapters.py", "def load():\n    from peft import PeftModel"),
        ("hf_asentmax/training.py", "if TYPE_CHECKING:\n    from datasets import Dataset"),
        ("patches/llama.py", "from transformers.models.llama.modeling_llama import LlamaAttention"),
        ("hf_asentmax/modeling_asentmax.py", "from transformers.models.llama import LlamaModel"),
        ("hf_asentmax/ops/triton_forward.py", "import triton\nfrom .triton_common import block"),
        ("hf_asentmax/ops/attention.py", "def launch():\n    from .triton_forward import forward"),
        ("hf_asentmax/benchmark/timing.py", "def sample():\n    from triton.testing import do_bench"),
        ("hf_asentmax/patching.py", "from hf_asentmax.model_mixin import swap_classes"),
        ("hf_asentmax/cli.py", "print(1)"),
        ("scripts/demo.py", "import hf_asentmax\nprint(hf_asentmax)"),
    ],
)
def test_architecture_rules_allow_what_is_meant(path: str, text: str) -> None:
    source = read_source(path, text)
    assert [found for rule in ALL_RULES for found in rule(source)] == []
