"""Problems for the attention kernels, and how far from float64 their results may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from dense_reference import dense_attention, dense_entmax, dense_scores
from torch import Tensor

# The largest relative Frobenius error against float64, beside what the scores' own rounding costs (see `allowed`): in
# float32 that alone. In float16 the cases measured at most 2.8e-4 (out, value), 6.6e-4, 9.2e-4 (query_scale) and 1.4e-3
# (alpha); bfloat16 rounds eight times as much. They are worse than usual inputs: few keys, of which much cancels.
ROUNDING: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {},
    torch.float16: {"out": 4e-4, "query": 8e-4, "key": 8e-4, "value": 4e-4, "query_scale": 1.2e-3, "alpha": 2e-3},
    torch.bfloat16: {"out": 3e-3, "query": 6e-3, "key": 6e-3, "value": 3e-3, "query_scale": 9e-3, "alpha": 1e-2},
}

TWO_ROWS = {"B": 2, "H": 1}  # of a batch
BASE: dict[str, Any] = {"B": 1, "H": 2, "K": 1, "T": 63, "N": 63, "D": 16, "V": 16}


def ints(*values: int) -> Tensor:
    return torch.tensor(values)


# Sizes: B batch, H heads, K key/value heads, T queries, N keys, D and V head dims. "scale" is the sign of a random
# query scale (0: some of them are 0); "slopes" are ALiBi's by head, repeated; a tuple alpha is a learned tensor; "keys"
# are "identical" or "huge" (one of them is); "layout" is "transposed" (as the projections of a model give them),
# "strided" (every second element of the head dim) or both; the rest goes to `entmax_attention` as it is.
CASES: dict[str, dict[str, Any]] = {
    "one_token": {"T": 1, "N": 1, "H": 1, "scale": 1},
    "length_17": {"T": 17, "N": 17, "B": 2},
    "length_63": {},
    "length_64": {"T": 64, "N": 64, "alpha": 1.3},
    "length_111": {"T": 111, "N": 111, "H": 1},
    "length_170": {"T": 170, "N": 170, "scale": 1, "slopes": (0.0, 0.1)},
    "length_200": {"T": 200, "N": 200, "H": 1, "alpha": 2.0},
    "decode": {"T": 1, "N": 111, "scale": -1},
    "chunk_of_a_longer_text": {"T": 20, "N": 111, "scale": 1, "slopes": (0.0, 0.1)},
    "multi_head": {"K": 2},
    "groups_of_4": {"B": 2, "H": 4, "T": 20, "N": 30, "scale": 1},
    "groups_of_8": {"H": 8, "T": 20, "N": 33},
    "groups_of_130": {"H": 130, "T": 2, "N": 2},  # more heads than 7 bits name
    "head_dim_24": {"D": 24, "V": 16},
    "head_dim_64": {"D": 64, "V": 64, "scale": 1},
    "head_dim_80": {"D": 80, "V": 64, "T": 40, "N": 40, "alpha": 1.3},
    "head_dim_5": {"D": 5, "V": 80, "T": 40, "N": 40},
    "scaling": {"scaling": 0.6, "alpha": 1.3},
    "negative_scaling": {"scaling": -0.6},
    "sparsemax": {"alpha": 2.0, "scale": 1, "slopes": (0.2, 0.0)},
    "alpha_1.25": {"alpha": 1.25, "scale": 1, "slopes": (0.2, 0.0)},
    "alpha_1.25_longer": {"alpha": 1.25, "H": 1, "T": 170, "N": 170, "scale": 1},
    "alpha_1.25_that_hides_tiles": {"alpha": 1.25, "H": 1, "T": 300, "N": 300, "slopes": (1.0,)},
    "alpha_1.25_padding_to_nothing": {
        **TWO_ROWS,
        "alpha": 1.25,
        "key_start": ints(63, 10),
        "key_length": ints(0, 30),
        "scale": 1,
        "slopes": (0.1,),
    },
    "alpha_1.25_first_step_unseen": {"T": 100, "N": 300, "H": 1, "alpha": 1.25, "scaling": 0.3, "scale": 1},
    "alpha_1.25_identical_keys": {"alpha": 1.25, "keys": "identical", "T": 111, "N": 111, "H": 1},
    "alpha_1.25_one_huge_key": {"alpha": 1.25, "keys": "huge", "scale": 1},
    "softmax": {"alpha": 1.0, "T": 111, "N": 111, "H": 1},
    "softmax_groups_of_4": {"alpha": 1.0, "B": 2, "H": 4, "T": 20, "N": 30, "D": 24, "scale": 1},
    "softmax_alibi_that_hides_tiles": {"alpha": 1.0, "slopes": (0.0, 2.0), "T": 300, "N": 300, "scale": 1},
    "softmax_scale_with_zeros": {"alpha": 1.0, "scale": 0, "slopes": (0.0, 0.3)},
    "softmax_negative_scale": {"alpha": 1.0, "scale": -1},
    "softmax_window": {"alpha": 1.0, "window": 40, "T": 111, "N": 111, "H": 1},
    "softmax_padding_to_nothing": {
        **TWO_ROWS,
        "alpha": 1.0,
        "key_start": ints(63, 10),
        "key_length": ints(0, 30),
        "scale": 1,
        "slopes": (0.1,),
    },
    "softmax_offset_by_row": {**TWO_ROWS, "alpha": 1.0, "T": 10, "N": 70, "query_offset": ints(60, 0), "scale": 1},
    "softmax_packed": {"alpha": 1.0, "cu_seqlens": ints(0, 1, 20, 20, 50, 63), "scale": 1},
    "softmax_not_causal": {"alpha": 1.0, "is_causal": False, "T": 20, "N": 70},
    "softmax_decode": {"alpha": 1.0, "T": 1, "N": 300, "scale": 1, "slopes": (0.0, 0.1)},
    # Of each block of queries the first do not see the step of keys that the candidates begin with.
    "first_step_unseen": {"T": 100, "N": 300, "H": 1, "alpha": 1.4, "scaling": 0.3, "scale": 1},
    "softmax_first_step_unseen": {"T": 100, "N": 300, "H": 1, "alpha": 1.0, "scaling": 0.3, "scale": 1},
    "softmax_identical_keys": {"alpha": 1.0, "keys": "identical", "T": 111, "N": 111, "H": 1},
    "softmax_one_huge_key": {"alpha": 1.0, "keys": "huge", "scale": 1},
    "softmax_scores_of_1e4": {"alpha": 1.0, "scaling": 1000.0, "scale": 1},
    "learned_alpha": {"alpha": (1.4,), "scale": 1},
    "learned_alpha_by_head": {
        "H": 4,
        "T": 20,
        "N": 40,
        "alpha": (1.02, 1.3, 1.5, 2.0),
        "scale": 1,
        "slopes": (0.0, 0.1),
    },
    "scale_negative": {"scale": -1, "slopes": (0.0, 0.3)},
    "scale_with_zeros": {"scale": 0, "alpha": (1.5, 1.2)},
    "alibi": {"slopes": (0.0, 0.5)},
    "alibi_that_hides_tiles": {"slopes": (1.0,), "H": 1, "T": 300, "N": 300, "scale": 1},
    "alibi_of_one_slope": {"slopes": (2.0,), "H": 1, "T": 111, "N": 160, "alpha": (1.3,)},
    "alibi_past_the_keys": {"slopes": (0.0, 0.3), "T": 20, "N": 40, "query_offset": 35},
    "window_1": {"window": 1},
    "window_8": {"window": 8, "scale": 1, "alpha": (1.4,)},
    "window_40": {"window": 40, "T": 111, "N": 111, "H": 1},
    "window_larger_than_text": {"window": 10**6, "slopes": (0.0, 0.1)},
    "left_padding": {**TWO_ROWS, "key_start": ints(0, 35), "scale": 1, "alpha": 1.3},
    "right_padding": {**TWO_ROWS, "key_length": ints(63, 30), "scale": 1, "alpha": (1.5,)},
    "both_paddings": {**TWO_ROWS, "key_start": ints(5, 0), "key_length": ints(30, 63), "scale": 1, "slopes": (0.1,)},
    "padding_to_nothing": {
        **TWO_ROWS,
        "key_start": ints(63, 10),
        "key_length": ints(0, 0),
        "scale": 1,
        "slopes": (0.1,),
    },
    "one_row_without_keys": {**TWO_ROWS, "key_start": ints(0, 63), "alpha": (1.2,)},
    "window_in_padding": {
        **TWO_ROWS,
        "window": 5,
        "key_start": ints(9, 0),
        "key_length": ints(30, 63),
        "alpha": (1.1,),
    },
    "offset": {"T": 10, "N": 70, "query_offset": 3, "scale": 1, "slopes": (0.0, 0.1)},
    "offset_tensor": {"T": 10, "N": 70, "query_offset": torch.tensor(41), "window": 4},
    "offset_by_row": {**TWO_ROWS, "T": 10, "N": 70, "query_offset": ints(60, 0), "scale": 1, "slopes": (0.1,)},
    "offset_and_padding": {
        **TWO_ROWS,
        "T": 1,
        "N": 70,
        "query_offset": ints(69, 12),
        "key_start": ints(0, 4),
        "scale": 1,
    },
    "offset_past_the_keys": {"T": 10, "N": 12, "query_offset": 9, "window": 4, "alpha": (1.5,)},
    "packed": {"cu_seqlens": ints(0, 1, 20, 20, 50, 63), "scale": 1, "alpha": (1.05, 1.5)},
    "packed_window": {"cu_seqlens": ints(0, 30, 63).int(), "window": 7, "slopes": (0.0, 0.1)},
    "packed_not_causal": {"H": 1, "cu_seqlens": ints(0, 0, 30, 63), "is_causal": False},
    "not_causal": {"is_causal": False, "T": 20, "N": 70, "scale": 1, "alpha": (1.3,)},
    "not_causal_more_queries": {"H": 1, "is_causal": False, "T": 70, "N": 7},
    "not_causal_padded": {
        **TWO_ROWS,
        "is_causal": False,
        "key_start": ints(3, 0),
        "key_length": ints(50, 0),
        "scale": 1,
    },
    "identical_keys": {"keys": "identical", "T": 111, "N": 111, "H": 1},
    "identical_keys_alpha_1.3": {"keys": "identical", "H": 1, "alpha": (1.3,)},
    "one_huge_key": {"keys": "huge", "scale": 1},
    # Which rows the solver's first step takes past the equal ones depends on how far the one key is above them.
    "a_key_above_many_equal_ones": {"keys": "sink", "T": 64, "N": 700, "H": 1, "is_causal": False, "scaling": 1.0},
    "scores_of_1e4": {"scaling": 1000.0, "alpha": (1.5,), "scale": 1},
    "scores_of_-1e4": {"scaling": 1000.0, "scale": -1, "slopes": (0.0, 0.1)},
    "transposed": {"K": 2, "layout": ("transposed",), "T": 20, "N": 40, "scale": 1},
    "strided": {"K": 2, "layout": ("strided",), "T": 20, "N": 40},
    "transposed_and_strided": {"K": 2, "layout": ("transposed", "strided"), "T": 20, "N": 40, "scale": 1},
}


def build(case: dict[str, Any], dtype: torch.dtype, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The differentiable arguments (leaves), and the others."""
    case = {**BASE, **case}
    B, H, K, T, N, D, V = (case.pop(x) for x in "BHKTNDV")
    leaves = {
        "query": torch.randn(B, H, T, D),
        "key": 2 * torch.randn(B, K, N, D),
        "value": torch.randn(B, K, N, V),
    }
    match case.pop("keys", None):
        case "identical":
            leaves["key"][:] = leaves["key"][:, :, :1]
        case "huge":
            leaves["key"][:, :, N // 3] *= 300
        case "sink":
            leaves["query"][..., 0] = torch.linspace(1.0, 2.5, T)
            leaves["query"][..., 1:] = 0.0
            leaves["key"][..., 0] *= 0.005
            leaves["key"][:, :, N // 3, 0] = 1.0
    leaves = {name: x.to(device, dtype) for name, x in leaves.items()}
    layout = case.pop("layout", ())
    if transposed := "transposed" in layout:
        leaves = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in leaves.items()}
    if "strided" in layout:
        leaves = {name: _every_second(x) for name, x in leaves.items()}
    if (sign := case.pop("scale", None)) is not None:
        scale = torch.rand(B, H, T)
        scale = (scale - 0.5).relu() * 4 if sign == 0 else sign * (0.2 + 2 * scale)
        leaves["query_scale"] = (scale.mT.contiguous().mT if transposed else scale).to(device)
    if slopes := case.pop("slopes", None):
        case["alibi_slopes"] = torch.tensor(slopes * (H // len(slopes)), device=device)
    alpha = case.pop("alpha", 1.5)
    if isinstance(alpha, tuple):
        leaves["alpha"] = torch.tensor(alpha[0] if len(alpha) == 1 else alpha, device=device)
    else:
        case["alpha"] = alpha
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in case.items()}
    return {name: x.requires_grad_() for name, x in leaves.items()}, options


def _every_second(x: Tensor) -> Tensor:
    """The same values, two elements apart, the other dimensions in their order."""
    if x.is_contiguous():
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    return x.transpose(1, 2).repeat_interleave(2, dim=-1)[..., ::2].transpose(1, 2)


def run(
    function: Callable[..., Tensor], leaves: dict[str, Tensor], options: dict[str, Any], weight: Tensor | None = None
) -> dict[str, Tensor]:
    """The output and every gradient by name, for a fixed gradient of the output."""
    out = function(**leaves, **options)
    if weight is None:
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(out, list(leaves.values()), weight.to(out))
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def exact(leaves: dict[str, Tensor], options: dict[str, Any], device: str = "cpu") -> tuple[dict[str, Tensor], Any]:
    """The same arguments in float64 on a device; the rounding to their dtype stays."""
    doubles = {name: x.detach().to(device, torch.float64).requires_grad_() for name, x in leaves.items()}
    return doubles, {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}


def allowed(name: str, dtype: torch.dtype, largest_score: float) -> float:
    """The largest relative error of a result. Scores of more than 30 are rounded by as many units of the threshold."""
    return ROUNDING[dtype].get(name, 0.0) + 1e-5 * max(1.0, largest_score / 30)


def relative_errors(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative Frobenius errors; NaN or infinite where a result is."""
    return {
        name: float((ours[name].double() - x.to(ours[name].device)).norm() / x.norm().clamp_min(1e-300))
        for name, x in expected.items()
    }


def assert_equals_dense(ours: dict[str, Tensor], leaves: dict[str, Tensor], options: dict[str, Any]) -> None:
    """`ours` (of `run`, with its own gradient of the output) against the dense reference.

    A gradient may vanish although its terms do not: at identical keys, or where one key takes everything. So it is
    measured against at least a tenth of what its terms come to without their signs; in bfloat16 a fifth: the roundings
    of the slopes, of their mean of the values and of the terms, done in float64 to identical keys, alone cost up to 1.3
    times the tenth's limit (1.44 on an H100). Softmax, which uses every key, has twice the room in the gradient of the
    scale: in float16 the rounding of the output and the slopes, done in float64, alone cost 1.9e-3.
    """
    dtype = leaves["query"].dtype
    share = 0.2 if dtype == torch.bfloat16 else 0.1
    doubles, options = exact(leaves, options)
    weight = torch.randn(ours["out"].shape, generator=torch.Generator().manual_seed(1)).to(dtype).double()
    expected = run(dense_attention, doubles, options, weight)
    sizes, largest_score = _sizes({name: x.detach() for name, x in doubles.items()}, options, weight)
    assert ours.keys() == expected.keys()
    for name, x in expected.items():
        assert ours[name].shape == x.shape
        assert ours[name].dtype == leaves["query" if name == "out" else name].dtype
        error = (ours[name].cpu().double() - x).norm()
        limit = allowed(name, dtype, largest_score) * max(x.norm(), share * sizes[name])
        limit *= 2 if name == "query_scale" and options.get("alpha") == 1.0 else 1
        limit += 1e-12 * max(1.0, largest_score)  # one that vanishes with all its terms
        assert error <= limit, f"{name}: {error:.2e} is more than {limit:.2e}, of {x.norm():.2e}"


def assert_weights_are_right(weights: Tensor, leaves: dict[str, Tensor], options: dict[str, Any]) -> None:
    """Of weights (B, H, T, N), which are the output if the values are the identity: mass 1, the reference's values, and
    its support but for keys so close to the threshold that float32 cannot tell."""
    leaves, options = exact(leaves, options)
    leaves = {name: x.detach() for name, x in leaves.items()}
    alpha = float(leaves.pop("alpha") if "alpha" in leaves else options.pop("alpha"))
    rounding = torch.finfo(weights.dtype).eps
    weights = weights.cpu().double()
    scores = dense_scores(leaves["query"], leaves["key"], query_scale=leaves.get("query_scale"), **options)
    expected = dense_entmax(scores, alpha if alpha in (1.0, 1.5, 2.0) else torch.tensor(alpha).double())
    alive = (scores > -torch.inf).any(-1)
    assert (weights[~alive] == 0).all()
    z = (alpha - 1) * scores[alive]
    weights, expected = weights[alive], expected[alive]
    if not len(z):
        return
    largest = max(1.0, float(z[z > -torch.inf].abs().max()) / 30)
    tau = z.amax(-1, keepdim=True) - expected.amax(-1, keepdim=True) ** (alpha - 1)
    sure = (z - tau).abs() > 1e-3 * largest
    assert (weights[sure & (expected == 0)] == 0).all()
    assert (weights[sure & (expected > 1e-30)] > 0).all()  # smaller ones may underflow
    assert (weights >= -1e-6).all()
    assert (weights.sum(-1) - 1).abs().max() <= 1e-5 + rounding
    assert (weights - expected).abs().max() <= 2e-5 * largest + rounding


def _sizes(leaves: dict[str, Tensor], options: dict[str, Any], grad: Tensor) -> tuple[dict[str, Tensor], float]:
    """Norms of the output and the gradients with the absolute values of their terms, and the largest absolute score."""
    query, key, value = (leaves[x] for x in ("query", "key", "value"))
    options = dict(options)
    alpha = leaves["alpha"].reshape(-1, 1, 1) if "alpha" in leaves else options.pop("alpha", 1.5)
    scale = leaves.get("query_scale", torch.ones(query.shape[:3], dtype=torch.float64))[..., None]
    scores = dense_scores(query, key, query_scale=leaves.get("query_scale"), **options)
    p = dense_entmax(scores, alpha)
    g = torch.where(p > 0, p ** (2 - alpha), 0.0)
    groups = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    dp = grad @ values.mT
    delta = (g * dp).sum(-1, keepdim=True) / g.sum(-1, keepdim=True).clamp_min(1e-300)
    centred = dp.abs() + delta.abs()
    ds = g * centred * abs(options.get("scaling") or query.shape[-1] ** -0.5)
    dq = ds @ keys.abs()
    terms = {
        "out": p @ values.abs(),
        "query": dq * scale,
        "key": (ds * scale).mT.matmul(query.abs()).unflatten(1, (-1, groups)).sum(2),
        "value": p.mT.matmul(grad.abs()).unflatten(1, (-1, groups)).sum(2),
        "query_scale": (dq * query.abs()).sum(-1),
        "alpha": (centred * p * p.clamp_min(1e-300).log() ** 2 / 2).sum(),
    }
    finite = scores[scores > -torch.inf]
    return {name: x.norm() for name, x in terms.items()}, float(finite.abs().max()) if len(finite) else 0.0
