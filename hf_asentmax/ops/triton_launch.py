"""How the attention kernels are launched: the arguments in the form that they take, and what fits the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.errors import OutOfResources

LARGEST_HEAD_DIM = 256
LARGEST_GROUP = 256  # query heads of a key/value head: what the lists of the keys' kernel have bits for
_HAS_FAST_LOG = torch.version.cuda is not None and not triton.knobs.runtime.interpret
_WIDEST_STRIDE = 1 << 23  # of a token, in elements: the places of 256 tokens from the first are int32
_MOST_HEADS = 65535  # what a grid holds along its second axis
_LISTS_AT_ONCE = 1 << 24  # entries of the transient lists of tiles: 64 MiB
# Sizes that change from call to call: Triton would compile anew for a 1 and for a multiple of 16, to no gain.
SIZES = (
    "T", "N", "H", "GROUP", "HEADS_KV", "n_row_tiles", "n_key_tiles", "n_words", "interval_stride", "alpha_stride",
    "first_head", "n_splits",
)  # fmt: skip


class Config(NamedTuple):
    """How a kernel is laid out on the chip: warps, stages of the pipeline, constants of its own."""

    num_warps: int
    num_stages: int
    constants: dict[str, int] = {}
    maxnreg: int | None = None  # registers of a thread, where the compiler's choice lets too few programs run at once


# What was compiled for a kernel, its constants and variant, with its configuration; and which configurations fit.
_compiled: dict[tuple[Any, ...], tuple[CompiledKernel, Config]] = {}
_fitting: dict[tuple[Any, ...], int] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int],
    configs: Sequence[Config],
    constants: dict[str, Any],
    variant: tuple[Any, ...],
    *arguments: Any,
) -> None:
    """Launch with the first of ``configs`` that fits this device's shared memory. ``grid``: (tiles, heads); a program
    takes ROWS tiles where the configuration says so. ``variant`` holds all else that Triton compiles anew for (see
    :func:`kind`): to ask Triton takes longer than the kernels of a short sequence."""
    dtype, device = arguments[0].dtype, arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, configs, constants, variant, *arguments)
        return
    kernel_key = (kernel.__name__, device, dtype, *constants.values())
    if known := _compiled.get((kernel_key, variant)):
        compiled, config = known
        compiled[_programs(grid, config)](*arguments, *constants.values(), *config.constants.values())
        return
    for i in range(_fitting.get(kernel_key, 0), len(configs)):
        config = configs[i]
        try:
            compiled = kernel[_programs(grid, config)](
                *arguments,
                **constants,
                **config.constants,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                maxnreg=config.maxnreg,
            )
        except OutOfResources as error:
            if i + 1 < len(configs):
                continue
            raise RuntimeError(
                f"head dim must be at most what this device's shared memory holds, got {constants} in {dtype} "
                f"({error}); use 16-bit inputs or a smaller head dim"
            ) from error
        _fitting[kernel_key] = i
        if isinstance(compiled, CompiledKernel):  # not in the interpreter
            _compiled[kernel_key, variant] = compiled, config
        return


def _programs(grid: tuple[int, int], config: Config) -> tuple[int, int, int]:
    return _cdiv(grid[0], config.constants.get("ROWS", 1)), grid[1], 1


def kind(*arguments: Any) -> tuple[Any, ...]:
    """What Triton compiles anew for: whether a tensor is there, its dtype, its alignment and that of its strides."""
    kinds: list[Any] = []
    for x in arguments:
        if x is None:
            kinds.append(None)
        else:
            kinds += x.dtype, x.data_ptr() % 16 == 0
            kinds += [(s % 16 == 0, s == 1, s.bit_length() > 31) for s in x.stride()[:3]]
    return tuple(kinds)


@dataclass
class Problem:
    """The arguments of one attention, brought to the form that the kernels take.

    ``first``, ``last``: int32 (B or 1, T), contiguous. ``alpha``: a float32 tensor of shape () or (H,), or None where
    ``alpha_value`` has it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    first: Tensor
    last: Tensor
    query_scale: Tensor | None
    slopes: Tensor | None
    alpha: Tensor | None
    alpha_value: float
    scaling: float

    def __post_init__(self) -> None:
        for name in ("query", "key", "value"):
            x = getattr(self, name)
            if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
                raise TypeError(f"{name} must be float16, bfloat16 or float32 for the kernels, got {x.dtype}; cast it")
            if x.shape[-1] > LARGEST_HEAD_DIM:
                raise ValueError(
                    f"head dim of {name} must be at most {LARGEST_HEAD_DIM} on a GPU, got {x.shape[-1]}; "
                    "split the heads, or call on CPU tensors"
                )
            if x.stride(-1) != 1 or x.stride(2) > _WIDEST_STRIDE:
                setattr(self, name, x.contiguous())
        self.first, self.last = self.first.contiguous(), self.last.contiguous()
        for name in ("query_scale", "slopes", "alpha"):
            x = getattr(self, name)
            if x is not None:
                setattr(self, name, x.float().contiguous())

        self.group = self.query.shape[1] // self.key.shape[1]
        if self.group > LARGEST_GROUP:
            raise ValueError(
                f"heads of query must be at most {LARGEST_GROUP} for each head of key on a GPU, got {self.group}; "
                "repeat the heads of key and value"
            )
        self.interval_stride = self.first.shape[1] if self.first.shape[0] > 1 else 0
        self.alpha_stride = 0 if self.alpha is None or self.alpha.dim() == 0 else 1
        self.widest = max(self.query.shape[-1], self.value.shape[-1])
        self.tile = _tile(self.query.dtype)
        self.n_key_tiles = _cdiv(self.key.shape[2], self.tile)
        self.tiles_shape = tiles_shape(self.query, self.key)
        *_, self.n_row_tiles, row_words = self.tiles_shape
        self.n_words = row_words - 2
        heads = self.query.shape[0] * self.query.shape[1]
        if heads > _MOST_HEADS:
            raise ValueError(f"batch times heads must be at most {_MOST_HEADS} on a GPU, got {heads}; split the batch")
        self.variant = kind(
            self.query, self.key, self.value, self.first, self.last, self.query_scale, self.slopes, self.alpha
        )
        self.heads_at_once = max(1, min(heads, _LISTS_AT_ONCE // max(1, self.n_row_tiles * self.n_key_tiles)))

    @property
    def tolerance(self) -> float:
        """How far from 1 a row's mass may be before the step to its threshold; the last pass checks what that left."""
        if self.alpha is None and self.alpha_value == 1.0:
            return 1e6  # its step is exact
        return 1.0 if self.query.dtype != torch.float32 and self.alpha is None and self.alpha_value == 1.5 else 1e-3

    def constants(self, value: bool = False) -> dict[str, Any]:
        """The constants of a kernel, those of the values too if asked for."""
        dim, dim_v = self.query.shape[-1], self.value.shape[-1]
        constants = {
            "ALPHA": {1.0: 3, 1.25: 4, 1.5: 1, 2.0: 2}.get(self.alpha_value, 0) if self.alpha is None else 0,
            "TILE": self.tile,
            "DIM": dim,
            "BLOCK_DIM": padded(dim),
            "LANES": self.tile if self.query.dtype == torch.float32 else 8,
            "EXACT": self.query.dtype == torch.float32 or not _HAS_FAST_LOG,
        }
        return constants | {"DIM_V": dim_v, "BLOCK_DIM_V": padded(dim_v)} if value else constants


def _cdiv(a: int, b: int) -> int:  # triton's own takes microseconds
    return -(-a // b)


def padded(dim: int) -> int:
    """The next power of 2, at least 16."""
    return 1 << max(4, (dim - 1).bit_length())


def _tile(dtype: torch.dtype) -> int:
    """Tokens of a tile. Products of float32 run outside the matrix units, unrolled: a larger tile compiles too long."""
    return 32 if dtype == torch.float32 else 64


def tiles_shape(query: Tensor, key: Tensor) -> tuple[int, int, int, int]:
    """Shape of the int32 ``tiles`` of ``triton_common.py``: (B, H, query tiles, words of key tiles + 2)."""
    tile = _tile(query.dtype)
    batch, heads, length = query.shape[:3]
    return batch, heads, _cdiv(length, tile), _cdiv(_cdiv(key.shape[2], tile), 32) + 2
