"""The self-contained remote code of a checkpoint: one Python file a family, made from this package's own sources.

A checkpoint carries this file, so that it loads with ``trust_remote_code=True`` where only torch and transformers are
installed. It holds the family's classes and whatever they need of the package, module by module in import order.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import importlib.util
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path

from .bundling import Collector, Import, Source, Statement
from .configuration_asentmax import CONFIG_CLASSES

PACKAGE = "hf_asentmax"

# What a clean environment has: transformers refuses a file that imports anything else outside a try block.
_INSTALLED = {"torch", "transformers", "safetensors", "huggingface_hub", "numpy", "tqdm"} | set(sys.stdlib_module_names)
# A module that imports one of these at its top is kept behind a check that it is there.
_OPTIONAL = {"triton"}
_LINE_LENGTH = 120
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

_HEADER = '''\
# Copyright The hf_asentmax authors.
# SPDX-License-Identifier: Apache-2.0
#
# Generated from hf_asentmax {version}, do not edit. Every checkpoint carries such a file, so that it loads with
# trust_remote_code=True where only torch and transformers are installed.
"""ASEntmax attention (arXiv 2506.16640) for {family} models."""

'''

# The operators of two different files must not meet under one name, those of one file must: the file's hash tells.
_NAMESPACE = 'OP_NAMESPACE = "hf_asentmax"\n'


@cache
def generate_modeling(family: str) -> str:
    """The file ``modeling_asentmax_<family>.py``: config and model classes, attention and operators in one.

    The file leaves the ``Auto`` classes alone. Transformers finds its classes by ``auto_map``, checkpoint by
    checkpoint. Registered, the first checkpoint's code would serve the next one too, which may be another version's.

    Args:
        family: native model type, such as ``llama``.

    Raises:
        ValueError: the family isn't supported, or the package's sources can't be put into one file.
    """
    if family not in CONFIG_CLASSES:
        raise ValueError(f"family must be one of {', '.join(CONFIG_CLASSES)}, got {family!r}; convert one of these")
    config = CONFIG_CLASSES[family]
    modeling = f"{PACKAGE}.modeling_asentmax"
    roots = {
        f"{PACKAGE}.patches.{family}": [f"{config.__name__.removesuffix('Config')}Attention"],
        f"{PACKAGE}.configuration_asentmax": [config.__name__],
        modeling: config.class_names().values(),
    }
    body = bundle(roots, package=PACKAGE, read=read_source, leave_out=[modeling])
    text = _HEADER.format(version=import_module(PACKAGE).__version__, family=family) + body
    if text.count(_NAMESPACE) != 1:
        raise ValueError(f"the package must set {_NAMESPACE.strip()} once, got {text.count(_NAMESPACE)} times")
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return text.replace(_NAMESPACE, f'OP_NAMESPACE = "hf_asentmax_{digest}"\n')


def bundle(
    roots: Mapping[str, Iterable[str]],
    *,
    package: str,
    read: Callable[[str], Source | None],
    leave_out: Collection[str] = (),
) -> str:
    """The source of one module that defines the names of ``roots`` and whatever they need of the package.

    Args:
        roots: wanted names, by the dotted name of the module that defines them.
        package: dotted name of the package; imports below it are its own.
        read: gives a module's source by dotted name, None where there is no such module.
        leave_out: modules whose top-level calls are not wanted.

    Returns:
        Python source that imports the standard library, torch, transformers and what they bring, and nothing relative.

    Raises:
        ValueError: two modules define one name, a name is not there, or an import can't be honoured; names the places.
    """
    collector = Collector(package, read, leave_out)
    for module_name, names in roots.items():
        for name in names:
            collector.need(module_name, name, "the list of wanted names")
    _check_definitions(collector)

    optional = {wanted for wanted in collector.imports if _top(wanted.module) in _OPTIONAL}
    sections = ["from __future__ import annotations\n\n" + _import_lines(set(collector.imports) - optional)]
    if optional:
        missing = " = ".join(sorted({_top(wanted.module) for wanted in optional}))
        sections[0] += f"\n\ntry:\n{_indent(_import_lines(optional))}\nexcept ImportError:\n    {missing} = None"
    for module in collector.modules.values():
        body = _join([statement for statement in module.statements if statement in collector.kept])
        for name in sorted({_top(wanted.module) for wanted in module.imports.values()} & _OPTIONAL):
            body = f"if {name} is not None:\n{_indent(body)}"
        if body:
            origin = textwrap.fill(f"{module.name}: {module.summary}", _LINE_LENGTH - 2)
            sections.append(f"{textwrap.indent(origin, '# ')}\n\n\n{body}")
    text = "\n\n\n".join(sections) + "\n"
    _check_imports(text)
    return text


def _top(module: str) -> str:
    return module.split(".")[0]


def _indent(text: str) -> str:
    return textwrap.indent(text, "    ")


def _check_definitions(collector: Collector) -> None:
    """Every name must mean one thing in one file."""
    places: dict[str, tuple[str, object]] = {}
    for wanted, where in collector.imports.items():
        # `import a` and `import a.b` bind the same a
        plain = not wanted.name and not wanted.alias
        _place(places, wanted.alias or wanted.name or _top(wanted.module), where, "import" if plain else wanted)
    for module in collector.modules.values():
        for statement in (s for s in module.statements if s in collector.kept):
            # The same assignment twice, of a logger for example, is one.
            once = isinstance(statement.node, ast.Assign)
            for name in sorted(statement.binds):
                _place(places, name, module.name, statement.text if once else statement)


def _place(places: dict[str, tuple[str, object]], name: str, where: str, meaning: object) -> None:
    if name in vars(builtins):  # another module may mean the builtin one
        raise ValueError(f"{name} must not be the name of a builtin, got one in {where}; rename it")
    first, known = places.setdefault(name, (where, meaning))
    if known != meaning and first != where:
        raise ValueError(f"{name} must mean one thing in one file, got one in {first} and one in {where}; rename one")


def _join(statements: list[Statement]) -> str:
    text = ""
    for previous, statement in zip([None, *statements], statements, strict=False):
        node = statement.node
        if previous is not None:
            blocks = isinstance(node, _DEFINITIONS) or isinstance(previous.node, _DEFINITIONS)
            near = node.lineno == (previous.node.end_lineno or 0) + 1
            text += "\n\n\n" if blocks else "\n" if near else "\n\n"
        text += statement.text
    return text


def _import_lines(imports: Iterable[Import]) -> str:
    modules: set[tuple[str, str]] = set()
    names: dict[str, set[str]] = {}
    for module, name, alias in imports:
        suffix = f" as {alias}" if alias else ""
        if name is None:
            modules.add((module, f"import {module}{suffix}"))
        else:
            names.setdefault(module, set()).add(name + suffix)
    lines = sorted(modules)
    for module in sorted(names):
        order = sorted(names[module], key=lambda name: (not name.isupper(), not name[0].isupper(), name))
        line = f"from {module} import {', '.join(order)}"
        if len(line) > _LINE_LENGTH:
            line = f"from {module} import (\n" + "".join(f"    {name},\n" for name in order) + ")"
        lines.append((module, line))
    standard = [line for module, line in lines if _top(module) in sys.stdlib_module_names]
    others = [line for module, line in lines if _top(module) not in sys.stdlib_module_names]
    return "\n\n".join("\n".join(group) for group in (standard, others) if group)


def _check_imports(text: str) -> None:
    """What transformers looks for before it runs the file: relative imports, and packages that may be missing."""
    if found := re.search(r"^\s*(import\s+\.|from\s+\.\S*\s+import).*", text, flags=re.MULTILINE):
        raise ValueError(f"the file must hold no relative import, not even in a string, got {found[0]!r}; reword it")

    def visit(node: ast.AST) -> None:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            if _top(name) not in _INSTALLED:
                raise ValueError(f"{name} must be imported inside try/except, since it may be missing; wrap the import")
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.Try):
                visit(child)

    visit(ast.parse(text))


def read_source(name: str) -> Source | None:
    """The source of an installed module by its dotted name, None where there is none."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Source(Path(spec.origin).read_text(encoding="utf-8"), bool(spec.submodule_search_locations))
