"""Follows names through the modules of a package: which top-level statements they need, and which imports.

Works on the syntax tree and keeps the text, comments included. The package's own imports are taken out of it: in one
file every name is at hand, and ``module.name`` becomes ``name``.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

# Local name -> (module, name in it), or (module, None) for the module itself.
_Own = dict[str, tuple[str, "str | None"]]


class Source(NamedTuple):
    """The text of a module, and whether it is a package (its relative imports then start at itself)."""

    text: str
    is_package: bool = False


class Import(NamedTuple):
    """``import module`` or ``from module import name``, with an ``as`` if there is one."""

    module: str
    name: str | None = None  # None: `import module`
    alias: str | None = None


@dataclass(eq=False)
class Statement:
    """One top-level statement: the names it binds and uses, and its text without the package's imports."""

    node: ast.stmt
    text: str
    binds: set[str]
    uses: set[str]
    own: _Own = field(default_factory=dict)


@dataclass(eq=False)
class Module:
    """A module taken apart; ``requires`` are the package's modules that Python imports before it."""

    name: str
    summary: str = ""
    statements: list[Statement] = field(default_factory=list)
    imports: dict[str, Import] = field(default_factory=dict)
    own: _Own = field(default_factory=dict)
    requires: list[str] = field(default_factory=list)


class Collector:
    """What a set of names needs of a package.

    Args:
        package: dotted name of the package; imports below it are its own.
        read: gives a module's source by dotted name, None where there is no such module.
        leave_out: modules whose top-level calls are not wanted.

    Attributes:
        modules: the modules that were visited, in the order in which Python would import them.
        kept: the statements that are needed. One that binds nothing (a registration, say) is kept with its module.
        imports: the imports from elsewhere that are needed, with one of the modules that have them.
    """

    def __init__(self, package: str, read: Callable[[str], Source | None], leave_out: Collection[str]) -> None:
        self.package, self.read, self.leave_out = package, read, leave_out
        self.modules: dict[str, Module] = {}
        self.kept: set[Statement] = set()
        self.imports: dict[Import, str] = {}

    def need(self, module_name: str, name: str, user: str) -> None:
        """Keep what ``name`` means in a module, and all that it needs; ``user`` says who asked, for the error."""
        module = self.load(module_name)
        bound = [s for s in module.statements if name in s.binds]
        for statement in bound:
            self.keep(module, statement)
        if bound or self._follow(module, name, module.own):
            return
        if name not in module.imports:
            raise ValueError(f"{name} must be defined in {module_name}, where {user} takes it from; correct the import")
        self.imports.setdefault(module.imports[name], module_name)

    def keep(self, module: Module, statement: Statement) -> None:
        if statement in self.kept:
            return
        self.kept.add(statement)
        known = set(module.imports) | set(module.own) | {name for s in module.statements for name in s.binds}
        for name in sorted(statement.uses):
            if not self._follow(module, name, statement.own) and name in known:
                self.need(module.name, name, module.name)

    def load(self, name: str) -> Module:
        if name in self.modules:
            return self.modules[name]
        source = self.read(name)
        if source is None:
            raise ValueError(f"{name} must be a module of {self.package}, but there is none; correct the import")
        module = _Parser(self, name, source).parse()
        for target in module.requires:
            self.load(target)
        self.modules[name] = module
        for statement in module.statements:
            if not statement.binds and name not in self.leave_out:
                self.keep(module, statement)
        return module

    def _follow(self, module: Module, name: str, own: _Own) -> bool:
        if name not in own:
            return False
        target, wanted = own[name]
        if wanted is not None:
            self.need(target, wanted, module.name)
        return True


class _Edit(NamedTuple):
    """A change of the text: ``old`` (empty: the node's whole lines) becomes ``new``."""

    node: ast.stmt | ast.expr
    old: str
    new: str


class _Parser:
    """Takes one module apart: imports, and statements whose text stands without the package's imports."""

    def __init__(self, collector: Collector, name: str, source: Source) -> None:
        self.collector, self.source = collector, source
        self.module = Module(name)
        self.lines = source.text.encode().split(b"\n")

    def parse(self) -> Module:
        tree = ast.parse(self.source.text)
        self.module.summary = (ast.get_docstring(tree) or "").split("\n")[0]
        statements = []
        after = 0
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                if self._read_import(node, self.module.own, self.module.imports):
                    self.module.requires = [target for target, _ in self.module.own.values()]
            elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                for inner in ast.walk(node):
                    self._read_import(inner, self.module.own, self.module.imports)
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                statements.append((node, after))
            after = node.end_lineno or after
        for node, after in statements:
            self._read_statement(node, after)
        return self.module

    def _read_import(self, node: ast.AST, own: _Own, others: dict[str, Import]) -> bool:
        """Whether the node imports from the package."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == self.collector.package:
                    raise ValueError(f"{self.module.name} must import names from {alias.name}; use `from ... import`")
                others[alias.asname or alias.name.split(".")[0]] = Import(alias.name, None, alias.asname)
        if not isinstance(node, ast.ImportFrom) or node.module == "__future__":
            return False
        base = node.module or ""
        if node.level:
            parents = self.module.name.split(".")[: None if self.source.is_package else -1]
            base = ".".join(parents[: len(parents) - node.level + 1] + ([base] if base else []))
        inside = base.split(".")[0] == self.collector.package
        for alias in node.names:
            if alias.name == "*" or (inside and alias.asname not in (None, alias.name)):
                raise ValueError(f"{self.module.name} must import {base}.{alias.name} by its own name; rename it there")
            if not inside:
                others[alias.asname or alias.name] = Import(base, alias.name, alias.asname)
            elif self.collector.read(f"{base}.{alias.name}") is not None:
                own[alias.name] = (f"{base}.{alias.name}", None)
            else:
                own[alias.name] = (base, alias.name)
        return inside

    def _read_statement(self, node: ast.stmt, after: int) -> None:
        binds = set(_bound_names(node))
        if "__all__" in binds:
            return
        statement = Statement(node, "", binds, _used_names(node))
        local = _local_names(node)
        edits: list[_Edit] = []
        for parent in ast.walk(node):
            for _, value in ast.iter_fields(parent):
                body = [n for n in value if isinstance(n, ast.stmt)] if isinstance(value, list) else []
                own = [n for n in body if self._read_import(n, statement.own, {})]
                edits += [_Edit(n, "", "pass" if len(own) == len(body) and n is own[0] else "") for n in own]
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            binds.difference_update(statement.own.keys() - local)
            self.module.own |= statement.own  # imported by a top-level try or if
        scope = self.module.own | statement.own
        modules = {name: target for name, (target, wanted) in scope.items() if wanted is None}
        for inner in ast.walk(node):
            if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name) and inner.value.id in modules:
                target = modules[inner.value.id]
                other = self.module.own.get(inner.attr, (target, inner.attr))
                if inner.attr in local or other != (target, inner.attr) or inner.attr in self.module.imports:
                    raise ValueError(
                        f"{inner.value.id}.{inner.attr} must keep its name without the module, but {self.module.name} "
                        f"line {inner.lineno} has another {inner.attr}; rename that"
                    )
                statement.own[inner.attr] = (target, inner.attr)
                statement.uses.add(inner.attr)
                edits.append(_Edit(inner, f"{inner.value.id}.{inner.attr}", inner.attr))
        uses = sum(isinstance(inner, ast.Name) and inner.id in modules for inner in ast.walk(node))
        if uses != sum(bool(edit.old) for edit in edits):
            raise ValueError(f"{self.module.name} must use {sorted(modules)} as `module.name` only; import its names")
        statement.text = self._text(node, after, edits)
        self.module.statements.append(statement)

    def _text(self, node: ast.stmt, after: int, edits: list[_Edit]) -> str:
        """The lines of a statement and of the comments above it, edited; a line that an edit empties is dropped."""
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        while start > after and self.lines[start - 1].startswith(b"#"):
            start -= 1
        lines = list(self.lines)
        for item, old, new in sorted(edits, key=lambda edit: (edit.node.lineno, edit.node.col_offset), reverse=True):
            first, last = item.lineno - 1, (item.end_lineno or item.lineno) - 1
            head, tail = lines[first][: item.col_offset], lines[last][item.end_col_offset :]
            if old and not lines[first][item.col_offset :].startswith(old.encode()):
                raise ValueError(f"{self.module.name} line {first + 1} must hold {old} on one line; write it out")
            merged = head + new.encode() + tail
            lines[first : last + 1] = [merged if old or new else b"\0"] + [b"\0"] * (last - first)
        return b"\n".join(x for x in lines[start : node.end_lineno] if x != b"\0").decode()


def _bound_names(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign | ast.If | ast.Try):
        for inner in _walk_outside_functions(node):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                yield inner.id
            elif isinstance(inner, ast.Import | ast.ImportFrom):
                yield from (alias.asname or alias.name.split(".")[0] for alias in inner.names)
            elif inner is not node and isinstance(inner, ast.FunctionDef | ast.ClassDef):
                yield inner.name


def _walk_outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from _walk_outside_functions(child)


def _used_names(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def _local_names(node: ast.AST) -> set[str]:
    """Names that a statement binds in its own functions, arguments among them."""
    stored = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return stored | {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
