"""Makes Triton's interpreter quicker where these kernels keep it busy, with the same results.

It calls Python for each element that a function of one's own reduces, and looks through Triton's whole language at each
launch and at each call of a function within a kernel. Here the reduction of bits is NumPy's, and the looking is done
once.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import numpy as np
from triton.language.core import is_builtin
from triton.runtime import interpreter

from hf_asentmax.ops.triton_common import either


@cache
def _builtins(package: Any) -> tuple[str, ...]:
    return tuple(name for name, member in inspect.getmembers(package) if is_builtin(member))


def _patch_builtins(package: Any, builder: Any, scope: Any) -> None:
    for name in _builtins(package):
        if is_builtin(member := getattr(package, name)):  # not patched yet
            interpreter._patch_attr(package, name, member, builder, scope)


def quicken() -> None:
    """Change the interpreter of this process."""
    general = interpreter.ReduceOps.apply_impl

    def reduce(self: Any, input: tuple[Any, ...]) -> Any:
        if self.combine_fn is not either or self.axis is None:
            return general(self, input)
        data = input[0].handle.data
        return self.to_tensor(np.bitwise_or.reduce(data, axis=self.axis, keepdims=self.keep_dims), input[0].dtype)

    interpreter.ReduceOps.apply_impl = reduce
    interpreter._patch_builtin = _patch_builtins
