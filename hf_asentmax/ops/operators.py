"""alpha-entmax and its attention as custom operators: one node each to ``torch.compile`` and ``torch.export``.

The device chooses what computes them: on a GPU the Triton kernels of ``triton_*.py`` for float16, bfloat16 and float32,
and the plain PyTorch of ``reference.py`` for all else.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference

OP_NAMESPACE = "hf_asentmax"
_HAS_TRITON = find_spec("triton") is not None


def uses_kernels(query: Tensor) -> bool:
    """Whether the kernels serve attention of this query."""
    return query.is_cuda and query.dtype != torch.float64 and _HAS_TRITON


def _alpha_for_rows(alpha: Tensor | None, alpha_value: float, dtype: torch.dtype) -> reference.Alpha:
    if alpha is None:
        return alpha_value
    return alpha.to(reference.compute_dtype(dtype)).reshape(-1, 1, 1)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    query_scale: Tensor | None,
    alibi_slopes: Tensor | None,
    alpha: Tensor | None,
    alpha_value: float,
    scaling: float,
    differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, and what the backward needs: each query's threshold, the mean of the values by slope, and which tiles
    have support. The last two are empty unless the kernels are used and ``differentiable``."""
    nothing = query.new_empty(0)
    if uses_kernels(query):
        from .triton_decode import kernel_decode, serves_decode
        from .triton_forward import kernel_forward
        from .triton_launch import Problem

        problem = Problem(query, key, value, first, last, query_scale, alibi_slopes, alpha, alpha_value, scaling)
        if not differentiable and serves_decode(problem):
            state = query.new_empty(*query.shape[:3], 2, dtype=torch.float32)
            return kernel_decode(problem), state, nothing, first.new_empty(0)
        out, state, mean, tiles = kernel_forward(problem, differentiable)
        if mean is None:
            return out, state, nothing, tiles.new_empty(0)
        return out, state, mean, tiles
    rows_alpha = _alpha_for_rows(alpha, alpha_value, query.dtype)
    out, thresholds = reference.attention_forward(
        query, key, value, first, last, query_scale, alibi_slopes, rows_alpha, scaling
    )
    return out, thresholds, nothing, first.new_empty(0)


def _attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    query_scale: Tensor | None,
    alibi_slopes: Tensor | None,
    alpha: Tensor | None,
    alpha_value: float,
    scaling: float,
    differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    nothing, no_tiles = query.new_empty(0), first.new_empty(0)
    if uses_kernels(query):
        from .triton_launch import tiles_shape

        state = query.new_empty(*query.shape[:3], 2, dtype=torch.float32)
        if not differentiable:
            return out, state, nothing, no_tiles
        return out, state, torch.empty_like(out), first.new_empty(tiles_shape(query, key), dtype=torch.int32)
    return out, query.new_empty(*query.shape[:3], 1, dtype=reference.compute_dtype(query.dtype)), nothing, no_tiles


def _attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    query_scale: Tensor | None,
    alibi_slopes: Tensor | None,
    alpha: Tensor | None,
    alpha_value: float,
    scaling: float,
    state: Tensor,
    mean: Tensor,
    tiles: Tensor,
    alpha_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if uses_kernels(query):
        from .triton_backward import kernel_backward
        from .triton_launch import Problem

        if mean.numel() == 0 and query.numel() > 0:
            raise RuntimeError(
                "differentiable must be True for a backward, got False in the forward; call it with the gradient on"
            )
        problem = Problem(query, key, value, first, last, query_scale, alibi_slopes, alpha, alpha_value, scaling)
        dq, dk, dv, dr, dalpha = kernel_backward(problem, grad_out, state, mean, tiles, alpha_grad)
        dq, dk, dv = _laid_out(dq, query), _laid_out(dk, key), _laid_out(dv, value)
        dr = dr if dr is None or query_scale is None else _laid_out(dr, query_scale)
    else:
        rows_alpha = _alpha_for_rows(alpha, alpha_value, query.dtype)
        dq, dk, dv, dr, dalpha = reference.attention_backward(
            grad_out,
            query,
            key,
            value,
            first,
            last,
            query_scale,
            alibi_slopes,
            rows_alpha,
            scaling,
            state,
            alpha_grad,
        )
    nothing = query.new_empty(0)
    return dq, dk, dv, nothing if dr is None else dr, nothing.clone() if dalpha is None else dalpha


def _laid_out(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient in the dtype and with the strides that ``torch.empty_like(x)`` has: what the fake promises."""
    if gradient.dtype == x.dtype and gradient.stride() == x.stride():  # itself of empty_like: x is dense
        return gradient
    layout = torch.empty_like(x, device="meta")
    if gradient.dtype == x.dtype and gradient.stride() == layout.stride():
        return gradient
    return torch.empty_like(x).copy_(gradient)


def _attention_backward_fake(
    _: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    query_scale, alpha_grad = rest[2], rest[-1]
    nothing = query.new_empty(0)
    dr = torch.empty_like(query_scale) if isinstance(query_scale, Tensor) else nothing
    dtype = reference.compute_dtype(query.dtype)
    dalpha = query.new_empty(query.shape[1], dtype=dtype) if alpha_grad else nothing.clone()
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), dr, dalpha


def _attention_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.alpha_value, ctx.scaling, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _attention_autograd(ctx, grad_out, *_):  # type: ignore[no-untyped-def]
    if grad_out is None:
        return (None,) * 11
    query, key, value, first, last, query_scale, alibi_slopes, alpha, *saved = ctx.saved_tensors
    alpha_grad = alpha is not None and ctx.needs_input_grad[7]
    twice = torch.is_grad_enabled()  # the operator says that it has no second derivative
    name = "entmax_attention_backward"
    dq, dk, dv, dr, dalpha = _run(
        name,
        call(name) if twice else _attention_backward,
        grad_out,
        query,
        key,
        value,
        first,
        last,
        query_scale,
        alibi_slopes,
        alpha,
        ctx.alpha_value,
        ctx.scaling,
        *saved,
        alpha_grad,
    )
    if alpha_grad:
        dalpha = (dalpha.sum() if alpha.dim() == 0 else dalpha).to(alpha.dtype)
    dr, dalpha = dr if query_scale is not None else None, dalpha if alpha_grad else None
    return dq, dk, dv, None, None, dr, None, dalpha, None, None, None


class _Attention(torch.autograd.Function):
    """The operator without its name, for :func:`_run`."""

    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        output = _attention(*inputs)
        _attention_context(ctx, inputs, output)
        return output[0]

    backward = staticmethod(_attention_autograd)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    query_scale: Tensor | None,
    alibi_slopes: Tensor | None,
    alpha: Tensor | None,
    alpha_value: float,
    scaling: float,
) -> Tensor:
    """Entmax attention of arguments that :func:`hf_asentmax.ops.attention.attention_from_intervals` has checked."""
    tensors = (query, key, value, first, last, query_scale, alibi_slopes, alpha)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)

    def eager(*arguments) -> tuple[Tensor]:  # type: ignore[no-untyped-def]
        return (_Attention.apply(*arguments),) if differentiable else _attention(*arguments)[:1]

    out: Tensor = _run("entmax_attention", eager, *tensors, alpha_value, scaling, differentiable)[0]
    return out


def _entmax(scores: Tensor, alpha: Tensor | None, alpha_value: float) -> Tensor:
    return reference.entmax_forward(scores, _alpha_for_map(alpha, alpha_value, scores)).contiguous()


def _entmax_fake(scores: Tensor, *_: object) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def _entmax_backward(
    grad: Tensor, output: Tensor, alpha: Tensor | None, alpha_value: float, alpha_grad: bool
) -> tuple[Tensor, Tensor]:
    rows_alpha = _alpha_for_map(alpha, alpha_value, output)
    dscores, dalpha = reference.entmax_backward(grad, output, rows_alpha, alpha_grad)
    return dscores.contiguous(), output.new_empty(0) if dalpha is None else dalpha


def _entmax_backward_fake(_: Tensor, output: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    dtype = reference.compute_dtype(output.dtype)
    dalpha = output.new_empty(*output.shape[:-1], 1, dtype=dtype) if rest[-1] else output.new_empty(0)
    return torch.empty_like(output), dalpha


def _alpha_for_map(alpha: Tensor | None, alpha_value: float, scores: Tensor) -> reference.Alpha:
    return alpha_value if alpha is None else alpha.to(reference.compute_dtype(scores.dtype))


def _entmax_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, alpha, ctx.alpha_value = inputs
    ctx.save_for_backward(output, alpha)


def _entmax_autograd(ctx, grad):  # type: ignore[no-untyped-def]
    output, alpha = ctx.saved_tensors
    alpha_grad = alpha is not None and ctx.needs_input_grad[1]
    dscores, dalpha = call("entmax_backward")(grad, output, alpha, ctx.alpha_value, alpha_grad)
    return dscores, dalpha.sum_to_size(alpha.shape).to(alpha.dtype) if alpha_grad else None, None


_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}


def _transforms() -> bool:
    """Whether torch.func or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def call(name: str):  # type: ignore[no-untyped-def]
    """The registered operator of that name; or the same as an autograd.Function, which torch.func can differentiate,
    and which refuses forward-mode derivatives (of an operator they would be zero)."""
    if not torch.compiler.is_compiling() and _transforms():
        return _FUNCTIONS[name].apply
    return getattr(getattr(torch.ops, OP_NAMESPACE), name)


def _run(name: str, eager, *arguments):  # type: ignore[no-untyped-def]
    """The operator of that name, or ``eager`` in its place where nothing traces, transforms or watches operators and
    tensors have storage: the dispatcher's layers of Python take longer than short attention does on a GPU."""
    plain = (Tensor, torch.nn.Parameter)
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or _transforms()
        or torch.jit.is_tracing()
        or any(isinstance(x, Tensor) and (type(x) not in plain or x.is_meta) for x in arguments)
    ):
        return call(name)(*arguments)
    return eager(*arguments)


def define(name: str, function, fake, autograd=None, context=None) -> None:  # type: ignore[no-untyped-def]
    """Register a custom operator once. A checkpoint's own copy of this code may be executed several times in one
    process; its namespace carries the code's hash, so an operator that is already there is the same operator."""

    def no_derivative(*_: object) -> None:
        raise NotImplementedError(f"{name} must not be differentiated: it has no derivative; ask for first ones only")

    def vmap(info, dims, *arguments):  # type: ignore[no-untyped-def]
        each = (
            [x if dim is None else x.select(dim, i) for x, dim in zip(arguments, dims, strict=True)]
            for i in range(info.batch_size)
        )
        results = [call(name)(*inputs) for inputs in each]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    parts = {"forward": function, "setup_context": context or (lambda *_: None), "backward": autograd or no_derivative}
    parts["vmap"] = vmap
    _FUNCTIONS[name] = type(name, (torch.autograd.Function,), {key: staticmethod(f) for key, f in parts.items()})
    if hasattr(getattr(torch.ops, OP_NAMESPACE), name):
        return
    op = torch.library.custom_op(f"{OP_NAMESPACE}::{name}", function, mutates_args=())
    op.register_fake(fake)
    if autograd is not None:
        op.register_autograd(autograd, setup_context=context)


define("entmax_attention_backward", _attention_backward, _attention_backward_fake)
define("entmax_attention", _attention, _attention_fake, _attention_autograd, _attention_context)
define("entmax_backward", _entmax_backward, _entmax_backward_fake)
define("entmax", _entmax, _entmax_fake, _entmax_autograd, _entmax_context)
