"""The map `entmax`, its gradients, and the properties that define it."""

from __future__ import annotations

import math

import entmax as entmax_package
import hypothesis.strategies as st
import pytest
import torch
from dense_reference import dense_entmax
from helpers import TOLERANCE
from hypothesis import assume, given
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from hf_asentmax import entmax

ALPHAS = (1.05, 1.2, 1.5, 1.8, 2.0)
OPS = torch.ops.hf_asentmax

alphas = st.sampled_from([1.0, *ALPHAS]) | st.floats(1.01, 2.0)
rows = st.lists(st.floats(-30.0, 30.0), min_size=1, max_size=24).map(lambda x: torch.tensor(x, dtype=torch.float64))


def results(scores: Tensor, alpha: Tensor, weight: Tensor, function=entmax) -> tuple[Tensor, Tensor, Tensor]:
    """The map and its gradients in the scores and in alpha (one alpha a row), in float64 from the dtype of `scores`."""
    scores, alpha = scores.detach().clone().requires_grad_(), alpha.detach().clone().requires_grad_()
    p = function(scores, alpha=alpha)
    gradients = torch.autograd.grad((p * weight.to(p.dtype)).sum(), (scores, alpha))
    return p.detach().double(), *(x.double() for x in gradients)


def by_package(scores: Tensor, alpha: Tensor) -> Tensor:
    return entmax_package.entmax_bisect(scores, alpha, dim=-1, n_iter=70)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_entmax_float64_equals_the_entmax_package(alpha: float) -> None:
    scores, weight = 4 * torch.randn(32, 17, dtype=torch.float64), torch.randn(32, 17, dtype=torch.float64)
    values = torch.full((32, 1), alpha, dtype=torch.float64)
    for ours, theirs in zip(results(scores, values, weight), results(scores, values, weight, by_package), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    torch.testing.assert_close(entmax(scores, alpha=alpha), dense_entmax(scores, alpha), rtol=0, atol=1e-9)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_entmax_float32_error_is_bounded(alpha: float) -> None:
    scores, weight = 4 * torch.randn(256, 33), torch.randn(256, 33)
    values = torch.full((256, 1), alpha)
    p, dscores, dalpha = results(scores, values, weight)
    p64, dscores64, dalpha64 = results(scores.double(), values.double(), weight.double())
    torch.testing.assert_close(p, p64, rtol=0, atol=1e-6)
    torch.testing.assert_close(entmax(scores, alpha=alpha).double(), p64, rtol=0, atol=1e-6)
    torch.testing.assert_close(dscores, dscores64, **TOLERANCE[torch.float32])
    # Measured: at most 1.2e-6 at every alpha from 1.01, where the papers' formula loses 1e-6 / (alpha - 1)^2. Only a
    # weight at the edge of the support is ill-conditioned (its slope p^(2-alpha) isn't Lipschitz): 3e-5 at alpha 1.8.
    clear = ((p64 == 0) | (p64 ** (alpha - 1) > 1e-2)).all(-1)
    assert clear.sum() > 64
    torch.testing.assert_close(dalpha[clear], dalpha64[clear], rtol=0, atol=min(1e-6 / (alpha - 1) ** 2, 5e-6))
    torch.testing.assert_close(dalpha, dalpha64, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_entmax_16_bit_rounds_the_float32_result(alpha: float, dtype: torch.dtype) -> None:
    scores, weight = (3 * torch.randn(64, 33)).to(dtype), torch.randn(64, 33).to(dtype)
    leaf = scores.clone().requires_grad_()
    p = entmax(leaf, alpha=alpha)
    (gradient,) = torch.autograd.grad(p, leaf, weight)
    assert p.dtype == gradient.dtype == dtype
    assert torch.equal(p, entmax(scores.float(), alpha=alpha).to(dtype))
    exact = results(scores.double(), torch.full((64, 1), alpha, dtype=torch.float64), weight.double())[1]
    torch.testing.assert_close(gradient.double(), exact, **TOLERANCE[dtype])


@pytest.mark.parametrize("alpha", [1.0, *ALPHAS])
def test_entmax_gradcheck_scores(alpha: float) -> None:
    scores = (2 * torch.randn(3, 6, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: entmax(s, alpha=alpha), scores)


@pytest.mark.parametrize("alpha", [x for x in ALPHAS if x < 2])  # at 2 a step to the right leaves the range
@pytest.mark.parametrize("shape", [(), (3, 1)], ids=["scalar", "per_row"])
def test_entmax_gradcheck_alpha(alpha: float, shape: tuple[int, ...]) -> None:
    scores = (2 * torch.randn(3, 6, dtype=torch.float64)).requires_grad_()
    values = torch.full(shape, alpha, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, a: entmax(s, alpha=a), (scores, values))


def test_entmax_alpha_gradient_equals_one_sided_difference_at_2() -> None:
    scores, weight = torch.randn(8, 9, dtype=torch.float64), torch.randn(8, 9, dtype=torch.float64)
    gradient = results(scores, torch.full((8, 1), 2.0, dtype=torch.float64), weight)[2]
    h = 1e-5
    at = [(entmax(scores, alpha=2.0 - k * h) * weight).sum(-1, keepdim=True) for k in range(3)]
    torch.testing.assert_close(gradient, (3 * at[0] - 4 * at[1] + at[2]) / (2 * h), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-5), (torch.float32, 4e-5)], ids=str)
def test_entmax_tensor_alpha_of_1_is_softmax_with_its_limit_gradient(dtype: torch.dtype, tolerance: float) -> None:
    scores, weight = 3 * torch.randn(16, 9, dtype=torch.float64), torch.randn(16, 9, dtype=torch.float64)
    p, dscores, dalpha = results(scores.to(dtype), torch.ones(16, 1, dtype=dtype), weight)
    exact = scores.softmax(-1)
    centred = weight - (exact * weight).sum(-1, keepdim=True)
    torch.testing.assert_close(p, exact, rtol=0, atol=tolerance)
    torch.testing.assert_close(dscores, exact * centred, rtol=0, atol=tolerance)
    limit = -(centred * exact * exact.log().square() / 2).sum(-1, keepdim=True)
    torch.testing.assert_close(dalpha, limit, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_entmax_alpha_of_1_equals_softmax(dtype: torch.dtype) -> None:
    scores = 5 * torch.randn(7, 40, dtype=dtype)
    torch.testing.assert_close(entmax(scores, alpha=1), scores.softmax(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dim", [-3, -2, -1, 0, 1, 2])
@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, torch.tensor(1.4, dtype=torch.float64)], ids=str)
def test_entmax_works_along_any_dimension(alpha: float | Tensor, dim: int) -> None:
    leaf = torch.randn(3, 4, 5, dtype=torch.float64).requires_grad_()
    weight = torch.randn(3, 4, 5, dtype=torch.float64)
    p = entmax(leaf, alpha=alpha, dim=dim)
    expected = entmax(leaf.movedim(dim, -1).contiguous(), alpha=alpha).movedim(-1, dim)
    assert p.shape == leaf.shape
    torch.testing.assert_close(p, expected, rtol=0, atol=1e-15)
    gradients = (torch.autograd.grad(x, leaf, weight, retain_graph=True)[0] for x in (p, expected))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("shape", "dim"), [((4, 1, 1), -1), ((5, 1), -1), ((1,), -1), ((4, 1, 6), 1), ((1, 5, 6), 0)])
def test_entmax_alpha_tensor_broadcasts_one_value_a_row(shape: tuple[int, ...], dim: int) -> None:
    scores, weight = torch.randn(4, 5, 6, dtype=torch.float64), torch.randn(4, 5, 6, dtype=torch.float64)
    alpha = 1.05 + 0.9 * torch.rand(shape, dtype=torch.float64)
    leaf = alpha.clone().requires_grad_()
    p = entmax(scores, alpha=leaf, dim=dim)
    (gradient,) = torch.autograd.grad(p, leaf, weight)
    reference = alpha.clone().requires_grad_()
    expected = entmax_package.entmax_bisect(scores, reference, dim=dim, n_iter=70)
    (expected_gradient,) = torch.autograd.grad(expected, reference, weight)
    torch.testing.assert_close(p, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-9)


def test_entmax_alpha_tensor_keeps_its_dtype_and_device() -> None:
    alpha = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    entmax(torch.randn(3, 4), alpha=alpha)[0, 0].backward()
    assert alpha.grad is not None
    assert alpha.grad.dtype == torch.float64
    assert alpha.grad.shape == ()


def test_entmax_accepts_any_memory_layout() -> None:
    base = torch.randn(6, 10)
    for scores in (base.T, base[:, ::2], base[::2].T, base[:, :1].expand(6, 5), base.unfold(1, 4, 2)):
        leaf = scores.detach().requires_grad_()
        p = entmax(leaf)
        (gradient,) = torch.autograd.grad(p[..., 0].sum(), leaf)
        other = scores.clone(memory_format=torch.contiguous_format).requires_grad_()
        expected = entmax(other)
        torch.testing.assert_close(p, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected[..., 0].sum(), other)[0], rtol=0, atol=1e-6)


# Edge cases. Every one for a float alpha (specialised code) and for a tensor, with finite gradients.
EDGES = {
    "one_key": ([3.0], [1.0]),
    "ties": ([2.0, 2.0, -200.0], [0.5, 0.5, 0.0]),
    "all_equal": ([7.0] * 5, [0.2] * 5),
    "large": ([1e4, -1e4, 0.0], [1.0, 0.0, 0.0]),
    "large_ties": ([1e4, 1e4, -1e4], [0.5, 0.5, 0.0]),
    "all_large_negative": ([-1e4, -1e4], [0.5, 0.5]),
    "hidden": ([-math.inf, 1.0, -math.inf, 1.0], [0.0, 0.5, 0.0, 0.5]),
    "no_key": ([-math.inf] * 3, [0.0] * 3),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("alpha", [1.01, *ALPHAS])
@pytest.mark.usefixtures("nan_in_empty")
def test_entmax_edge_case_is_exact_with_finite_gradients(alpha: float, edge: str, dtype: torch.dtype) -> None:
    scores, expected = (torch.tensor(x, dtype=dtype) for x in EDGES[edge])
    for value in (alpha, torch.tensor(alpha, requires_grad=True)):
        leaf = scores.clone().requires_grad_()
        p = entmax(leaf, alpha=value)
        torch.testing.assert_close(p, expected, rtol=8 * torch.finfo(dtype).eps, atol=0)
        inputs = (leaf, value) if isinstance(value, Tensor) else (leaf,)
        gradients = torch.autograd.grad(p, inputs, torch.randn_like(p))
        assert all(x.isfinite().all() for x in gradients)
        assert (gradients[0][expected == 0] == 0).all()
        assert gradients[0].double().sum().abs() <= 8 * torch.finfo(dtype).eps
        if edge == "no_key":
            assert all((x == 0).all() for x in gradients)


def test_entmax_row_without_a_key_leaves_its_neighbours_alone() -> None:
    scores = torch.randn(3, 5, dtype=torch.float64)
    scores[1] = -math.inf
    p = entmax(scores)
    assert torch.equal(p[1], torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(p[::2], dense_entmax(scores[::2], 1.5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("alpha", [1.0, *ALPHAS])
def test_entmax_keeps_mass_1_with_262144_near_equal_keys(alpha: float, as_tensor: bool) -> None:
    n = 262_144
    noise = torch.randn(n)
    for scores in (torch.zeros(n), torch.zeros(n - 7777), 1e-4 * noise, 1e-2 * noise, 100 + 1e-3 * noise):
        p = entmax(scores, alpha=torch.tensor(alpha) if as_tensor else alpha)
        assert abs(p.double().sum().item() - 1) < 1e-5


@pytest.mark.parametrize(("shape", "dim"), [((0,), -1), ((3, 0), -1), ((0, 3), -1), ((2, 0, 4), 0)])
def test_entmax_of_an_empty_tensor_is_empty_and_differentiable(shape: tuple[int, ...], dim: int) -> None:
    scores, alpha = torch.empty(shape, requires_grad=True), torch.tensor(1.5, requires_grad=True)
    p = entmax(scores, alpha=alpha, dim=dim)
    assert p.shape == shape
    p.sum().backward()
    assert scores.grad is not None
    assert scores.grad.shape == shape


# Properties, in float64.


@given(rows, alphas)
def test_entmax_is_a_distribution(scores: Tensor, alpha: float) -> None:
    p = entmax(scores, alpha=alpha)
    assert (p >= 0).all()
    assert abs(p.sum().item() - 1) < 1e-12


@given(rows, alphas)
def test_entmax_solves_its_equation(scores: Tensor, alpha: float) -> None:
    assume(alpha > 1)
    p = entmax(scores, alpha=alpha)
    z, e = (alpha - 1) * scores, alpha - 1
    support = p > 1e-9
    tau = (z - p**e)[support]
    assert (tau - tau[0]).abs().max() < 1e-6
    assert (z[p == 0] <= tau.max() + 1e-9).all()
    assert z.max() - 1 - 1e-9 <= tau.max() <= z.max() - len(z) ** -e + 1e-9


@given(rows, alphas, st.data())
def test_entmax_is_monotone_in_a_score(scores: Tensor, alpha: float, data: st.DataObject) -> None:
    j = data.draw(st.integers(0, len(scores) - 1))
    raised = scores.clone()
    raised[j] += data.draw(st.floats(0.0, 5.0))
    change = entmax(raised, alpha=alpha) - entmax(scores, alpha=alpha)
    assert change[j] >= -1e-12
    change[j] = 0
    assert (change <= 1e-12).all()


@given(rows, alphas)
def test_entmax_keeps_the_order_of_the_scores(scores: Tensor, alpha: float) -> None:
    p = entmax(scores, alpha=alpha)[scores.argsort()]
    assert (p.diff() >= 0).all()


@given(rows, alphas, st.floats(-1000.0, 1000.0))
def test_entmax_does_not_change_with_a_shift(scores: Tensor, alpha: float, shift: float) -> None:
    torch.testing.assert_close(entmax(scores + shift, alpha=alpha), entmax(scores, alpha=alpha), rtol=0, atol=1e-11)


@given(rows, alphas, st.randoms(use_true_random=False))
def test_entmax_is_permutation_equivariant(scores: Tensor, alpha: float, random) -> None:
    order = list(range(len(scores)))
    random.shuffle(order)
    torch.testing.assert_close(
        entmax(scores[order], alpha=alpha), entmax(scores, alpha=alpha)[order], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(st.lists(st.floats(0.0, 50.0, width=16), max_size=20), st.sampled_from([1.125, 1.25, 1.5, 2.0]), st.booleans())
def test_entmax_gives_exact_zeros_where_z_is_below_the_maximum_by_1(
    dtype: torch.dtype, below: list[float], alpha: float, as_tensor: bool
) -> None:
    # With these alphas every number here is exact in every dtype: z <= max - 1 is s <= -1 / (alpha - 1).
    scores = torch.tensor([0.0, *(-1 / (alpha - 1) - x for x in below)]).to(dtype)
    p = entmax(scores, alpha=torch.tensor(alpha) if as_tensor else alpha)
    assert p.tolist() == [1.0] + [0.0] * len(below)


@given(rows, alphas, alphas)
def test_entmax_support_shrinks_as_alpha_grows(scores: Tensor, alpha: float, other: float) -> None:
    low, high = sorted((alpha, other))
    assert (entmax(scores, alpha=low)[entmax(scores, alpha=high) > 1e-12] > 0).all()


@given(rows, st.floats(1.01, 2.0), st.floats(0.0, 10.0))
def test_entmax_weights_stay_when_a_key_below_the_threshold_is_added(scores: Tensor, alpha: float, x: float) -> None:
    p = entmax(scores, alpha=alpha)
    added = torch.cat([scores, (scores.max() - 1 / (alpha - 1) - x)[None]])
    torch.testing.assert_close(entmax(added, alpha=alpha), torch.cat([p, p.new_zeros(1)]), rtol=0, atol=1e-12)


# The operators.
ALPHA_ARGUMENTS = {
    "float": (None, 1.3),
    "softmax": (None, 1.0),
    "scalar": (torch.tensor(1.4, requires_grad=True), 0.0),
    "per_row": (torch.full((3, 1), 1.4, requires_grad=True), 0.0),
}


@pytest.mark.parametrize("alpha", ALPHA_ARGUMENTS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "bfloat16"])
def test_entmax_operators_pass_opcheck(alpha: str, layout: str) -> None:
    scores = torch.randn(4, 3).T if layout == "transposed" else torch.randn(3, 4)
    scores = scores.to(torch.bfloat16 if layout == "bfloat16" else torch.float32).requires_grad_()
    tensor, value = ALPHA_ARGUMENTS[alpha]
    opcheck(OPS.entmax.default, (scores, tensor, value))
    output = OPS.entmax(scores.detach(), tensor, value).detach()
    constant = None if tensor is None else tensor.detach()
    opcheck(OPS.entmax_backward.default, (scores.detach(), output, constant, value, tensor is not None))


@pytest.mark.parametrize("dim", [-1, 0])
def test_entmax_compiles_to_the_strides_that_it_promises(dim: int) -> None:
    # A compiler lays out what follows by the operator's fake: its strides must be the real ones (inductor checks).
    scores = torch.randn(6, 5).movedim(dim, -1)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = OPS.entmax(mode.from_tensor(scores), None, 1.5)
    assert OPS.entmax(scores, None, 1.5).stride() == fake.stride()


def test_entmax_compiles_to_one_graph_for_every_alpha_tensor() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda s, a: 2 * entmax(s, alpha=a), fullgraph=True, backend=counter)
    scores = torch.randn(3, 8, requires_grad=True)
    for value in (1.1, 1.5, 1.9):
        alpha = torch.tensor(value, requires_grad=True)
        ours = torch.autograd.grad(compiled(scores, alpha)[:, 0].sum(), (scores, alpha))
        eager = torch.autograd.grad(2 * entmax(scores, alpha=alpha)[:, 0].sum(), (scores, alpha))
        torch.testing.assert_close(ours, eager)
    assert counter.frame_count == 1
    nodes = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert sum("hf_asentmax.entmax" in name for name in nodes) == 1


def test_entmax_double_backward_raises() -> None:
    scores = torch.randn(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(entmax(scores).square().sum(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad(gradient.square().sum(), scores)


BAD = {
    "integer_scores": ((torch.arange(3),), {}, TypeError, ("scores", "floating point", "int64")),
    "scalar_scores": ((torch.tensor(1.0),), {}, ValueError, ("dim", "()")),
    "dim_too_large": ((torch.ones(2, 3),), {"dim": 2}, ValueError, ("dim", "(2, 3)", "2")),
    "dim_too_small": ((torch.ones(2, 3),), {"dim": -3}, ValueError, ("dim", "(2, 3)", "-3")),
    "alpha_small": ((torch.ones(2, 3),), {"alpha": 0.99}, ValueError, ("alpha", "between 1.0", "0.99")),
    "alpha_large": ((torch.ones(2, 3),), {"alpha": 2.5}, ValueError, ("alpha", "2.0", "2.5")),
    "alpha_nan": ((torch.ones(2, 3),), {"alpha": math.nan}, ValueError, ("alpha", "nan")),
    "alpha_bool": ((torch.ones(2, 3),), {"alpha": True}, TypeError, ("alpha", "bool")),
    "alpha_text": ((torch.ones(2, 3),), {"alpha": "1.5"}, TypeError, ("alpha", "str")),
    "alpha_none": ((torch.ones(2, 3),), {"alpha": None}, TypeError, ("alpha", "NoneType")),
    "alpha_integer_tensor": ((torch.ones(2, 3),), {"alpha": torch.tensor(2)}, TypeError, ("alpha", "int64")),
    "alpha_tensor_large": ((torch.ones(2, 3),), {"alpha": torch.tensor(2.5)}, ValueError, ("alpha", "2.5")),
    "alpha_tensor_nan": ((torch.ones(2, 3),), {"alpha": torch.tensor(math.nan)}, ValueError, ("alpha", "nan")),
    "alpha_one_row": (
        (torch.ones(2, 3),),
        {"alpha": torch.tensor([[1.5], [0.5]])},
        ValueError,
        ("alpha", "[[1.5], [0.5]]"),
    ),
    "alpha_shape": ((torch.ones(2, 3),), {"alpha": torch.full((3,), 1.5)}, ValueError, ("alpha", "(2, 1)", "(3,)")),
    "alpha_dims": ((torch.ones(3),), {"alpha": torch.full((2, 1), 1.5)}, ValueError, ("alpha", "(1,)", "(2, 1)")),
}


@pytest.mark.parametrize("case", BAD)
def test_entmax_bad_input_raises_what_rule_and_value(case: str) -> None:
    arguments, options, error, words = BAD[case]
    with pytest.raises(error) as caught:
        entmax(*arguments, **options)
    message = str(caught.value)
    assert message.startswith(f"{words[0]} must ")
    assert ", got " in message
    assert all(word in message for word in words)
