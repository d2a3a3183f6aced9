"""One file out of a package's modules, on packages of a few lines."""

from __future__ import annotations

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import pytest

from hf_asentmax.remote_code import Source, bundle


def bundle_toy(roots: dict[str, list[str]], **modules: str) -> str:
    """`bundle` of the package `toy`, whose modules are given by name, dots written as two underscores."""
    sources = {f"toy.{name.replace('__', '.')}": Source(dedent(text)) for name, text in modules.items()}
    return bundle(roots, package="toy", read=sources.get)


def run(text: str) -> ModuleType:
    module = ModuleType("bundled")
    exec(compile(text, "bundled.py", "exec"), module.__dict__)
    return module


def run_file(text: str, path: Path) -> ModuleType:
    """The same from a file, where Triton looks for the source of a kernel."""
    path.write_text(text, encoding="utf-8")
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bundle_keeps_what_is_needed_in_import_order() -> None:
    text = bundle_toy(
        {"toy.top": ["Top"]},
        top="""
            from .deep.base import Base
            from .deep import tools

            class Top(Base):
                value = tools.double(3)

            class Unused(Base):
                pass
        """,
        deep__base="""
            # why the base is as it is
            class Base:
                '''A docstring.'''
        """,
        deep__tools="""
            import math

            FACTOR = 2  # a comment

            def double(x):
                return FACTOR * x

            def unused():
                return math.pi
        """,
    )
    assert run(text).Top.value == 6
    assert "# why the base is as it is" in text
    assert "# a comment" in text
    assert "Unused" not in text
    assert "unused" not in text
    assert "math" not in text
    assert "tools." not in text.split("toy.deep.tools:")[1]


def test_bundle_hoists_and_merges_imports() -> None:
    text = bundle_toy(
        {"toy.a": ["f"]},
        a="""
            from __future__ import annotations
            import os.path
            from typing import TYPE_CHECKING
            from collections.abc import Iterator
            from .b import g

            if TYPE_CHECKING:
                from collections.abc import Mapping

            def f(x: Mapping) -> Iterator:
                import json
                return json.loads(g(os.path.join(x)))
        """,
        b="""
            import os
            from collections.abc import Iterable, Iterator

            def g(x: Iterable) -> Iterator:
                return os.fspath(x)
        """,
    )
    assert text.count("from collections.abc import Iterable, Iterator, Mapping") == 1
    assert "import os\nimport os.path" in text
    assert "        import json" not in text
    assert "    import json" in text
    assert text.startswith("from __future__ import annotations\n\nimport os")
    assert run(text).f('"text"') == "text"


def test_bundle_takes_own_imports_out_of_functions() -> None:
    text = bundle_toy(
        {"toy.a": ["f", "nothing"]},
        a="""
            def f():
                # lazily
                from .b import g
                from toy import b
                return g() + b.h()

            def nothing():
                from .b import g
        """,
        b="""
            def g():
                return 1

            def h():
                return 2
        """,
    )
    module = run(text)
    assert module.f() == 3
    assert module.nothing() is None
    assert "toy import" not in text


def test_bundle_follows_imports_in_a_try_block() -> None:
    text = bundle_toy(
        {"toy.a": ["f"]},
        a="""
            try:
                from .b import g
            except ImportError:
                pass

            try:
                import not_there
            except ImportError:
                not_there = None

            def f():
                return g(), not_there
        """,
        b="def g():\n    return 1\n",
    )
    assert run(text).f() == (1, None)


def test_bundle_keeps_registrations_unless_told() -> None:
    sources = {
        "toy.a": Source("from .b import table\n\nclass A:\n    pass\n\ntable.append(A)\n"),
        "toy.b": Source("table = []\ntable.append(1)\n"),
    }
    with_a = run(bundle({"toy.a": ["A"]}, package="toy", read=sources.get))
    assert with_a.table == [1, with_a.A]
    without = run(bundle({"toy.a": ["A"]}, package="toy", read=sources.get, leave_out=["toy.a"]))
    assert without.table == [1]


def test_bundle_keeps_a_module_of_an_optional_package_behind_a_check(tmp_path: Path) -> None:
    text = bundle_toy(
        {"toy.a": ["f"]},
        a="""
            def f(fast=False):
                if fast:
                    from .kernel import launch
                    return launch()
                return 1
        """,
        kernel="""
            import triton
            import triton.language as tl

            @triton.jit
            def kernel(x: tl.constexpr):
                return x

            def launch():
                return kernel(1)
        """,
    )
    assert "try:\n    import triton\n    import triton.language as tl\nexcept ImportError:\n    triton = None" in text
    assert "if triton is not None:\n    @triton.jit\n    def kernel" in text
    assert run_file(text, tmp_path / "bundled.py").f() == 1


def test_bundle_merges_an_assignment_that_is_made_twice() -> None:
    logger = "from logging import getLogger\nlogger = getLogger('x')\n"
    text = bundle_toy(
        {"toy.a": ["f"]},
        a=logger + "from .b import g\ndef f():\n    return logger, g()\n",
        b=logger + "def g():\n    return logger\n",
    )
    one, other = run(text).f()
    assert one is other


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ("from .b import g\ndef helper(): ...\ndef f(): helper(g)", "def helper(): ...\ndef g(): helper()", "helper"),
        ("from .b import g\nimport json as x\ndef f(): x(g)", "from json import loads as x\ndef g(): x()", "x must"),
        ("from .b import g\nLIMIT = 1\ndef f(): g(LIMIT)", "LIMIT = 2\ndef g(): LIMIT", "LIMIT"),
        ("from .b import g\ndef f(): map(g)", "def map(x): ...\ndef g(): map(1)", "map must not be the name of"),
        ("try:\n    from .b import g\nexcept ImportError:\n    g = 1\ndef f(): g()", "def g(): ...", "g must mean one"),
        ("from .b import missing\ndef f(): missing()", "", "missing must be defined in toy.b"),
        ("from .c import g\ndef f(): g()", "", "toy.c must be a module"),
        ("from .b import *\ndef f(): g()", "def g(): ...", "by its own name"),
        ("from .b import g as h\ndef f(): h()", "def g(): ...", "by its own name"),
        ("import toy.b\ndef f(): toy.b.g()", "def g(): ...", "from ... import"),
        ("from . import b\ndef f(): return b", "def g(): ...", "module.name"),
        ("from . import b\ndef f(g): return b.g(g)", "def g(x): ...", "b.g must keep its name"),
        ("import peft\ndef f(): peft", "", "peft must be imported inside try/except"),
        ("def f():\n    '''Write\n    from .b import g\n    '''", "", "no relative import"),
    ],
)  # fmt: skip
def test_bundle_refuses_what_one_file_can_not_hold(a: str, b: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        bundle_toy({"toy.a": ["f"]}, a=a, b=b)


def test_bundle_names_both_places_of_a_collision() -> None:
    with pytest.raises(ValueError, match=r"helper .* toy\.b and one in toy\.a"):
        bundle_toy(
            {"toy.a": ["f"]},
            a="from .b import g\ndef helper(): ...\ndef f(): helper(g)",
            b="def helper(): ...\ndef g(): helper()",
        )
