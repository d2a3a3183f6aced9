"""The query scale r and the learned alpha against their formulas, written out in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_asentmax import QueryScale
from hf_asentmax.scaling import LEARNED_ALPHA_RANGE, NEUTRAL_DELTA, QUERY_SCALINGS

HEADS, HIDDEN, BATCH, TOKENS = 4, 16, 2, 7
SCALED = [x for x in QUERY_SCALINGS if x != "none"]


def make(query_scaling: str, *, random: bool = True, **settings: Any) -> QueryScale:
    config = {
        "num_attention_heads": HEADS,
        "hidden_size": HIDDEN,
        "query_scaling": query_scaling,
        "query_scale_delta": 1.0,
        "query_scale_gamma_range": 2.0,
        "query_scale_gamma_center": 0.0,
        "query_scale_length": 512,
        "entmax_alpha": 1.5,
        "entmax_alpha_learned": False,
    }
    module = QueryScale(SimpleNamespace(**{**config, **settings}))
    if random:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.7)
    return module


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hidden states, and numbers of visible keys with a padded query (0) and a long context among them."""
    hidden = torch.randn(BATCH, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return hidden, torch.tensor([[1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 64, 4096, 1_000_000, 2]], dtype=torch.int32)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def expected_scale(module: QueryScale, hidden: Tensor, n: Tensor, delta: float, c: float, m: float) -> Tensor:
    """r by the table of the papers, one number at a time."""
    state = {name: x.detach().double() for name, x in module.named_parameters()}
    r = torch.empty(BATCH, HEADS, TOKENS, dtype=torch.float64)
    for b in range(BATCH):
        for h in range(HEADS):
            for i in range(TOKENS):
                log_n = math.log(1 + max(int(n[b, i]), 1))
                x = hidden[b, i].double()
                if module.query_scaling == "log":
                    r[b, h, i] = state["log_scale"][h] * log_n
                    continue
                if module.query_scaling == "static":
                    beta, gamma = state["beta"][h], state["gamma"][h]
                else:
                    beta = state["beta.weight"][h] @ x + state["beta.bias"][h]
                    gamma = state["gamma.weight"][h] @ x + state["gamma.bias"][h]
                r[b, h, i] = delta + softplus(float(beta)) * log_n ** (m + c * math.tanh(float(gamma)))
    return r


@pytest.mark.parametrize("query_scaling", SCALED)
@pytest.mark.parametrize(
    ("delta", "c", "m"), [(1.0, 2.0, 0.0), (NEUTRAL_DELTA, 0.5, 0.0), (1.0, 1.0, 1.0), (0.0, 0.5, 1.0)]
)
def test_query_scale_equals_its_formula(query_scaling: str, delta: float, c: float, m: float) -> None:
    settings = {"query_scale_delta": delta, "query_scale_gamma_range": c, "query_scale_gamma_center": m}
    module = make(query_scaling, **settings)
    hidden, n = inputs()
    r, alpha = module(hidden, n)
    assert alpha is None
    assert r.dtype == torch.float32
    assert r.shape == (BATCH, HEADS, TOKENS)
    torch.testing.assert_close(r.double(), expected_scale(module, hidden, n, delta, c, m), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("query_scaling", ["static", "adaptive"])
def test_query_scale_never_falls_with_n_where_the_exponent_is_not_negative(query_scaling: str) -> None:
    hidden, n = torch.randn(1, 1, HIDDEN).expand(1, 6, -1), torch.tensor([[2, 3, 64, 91, 4096, 1_000_000]])
    free, kept = (make(query_scaling, query_scale_gamma_center=m, query_scale_gamma_range=2.0 - m) for m in (0.0, 1.0))
    assert (free(hidden, n)[0].diff() < 0).any()
    assert (kept(hidden, n)[0].diff() >= 0).all()


@pytest.mark.parametrize("query_scaling", ["static", "adaptive"])
def test_query_scale_without_a_constant_part_grows_between_two_powers_of_log_n(query_scaling: str) -> None:
    settings = {"query_scale_delta": 0.0, "query_scale_gamma_center": 1.0, "query_scale_gamma_range": 0.5}
    hidden, n = torch.randn(1, 1, HIDDEN).expand(1, 2, -1), torch.tensor([[91, 65_536]])
    r = make(query_scaling, **settings)(hidden, n)[0]
    growth, of_log_n = r[..., 1] / r[..., 0], math.log(65_537) / math.log(92)
    assert (growth > of_log_n**0.5 - 1e-5).all()
    assert (growth < of_log_n**1.5 + 1e-5).all()


@pytest.mark.parametrize("query_scaling", SCALED)
def test_query_scale_takes_one_row_of_n_for_every_batch(query_scaling: str) -> None:
    module = make(query_scaling)
    hidden, n = inputs()
    shared, _ = module(hidden, n[:1])
    assert torch.equal(shared, module(hidden, n[:1].expand(BATCH, -1))[0])
    assert shared.shape == (BATCH, HEADS, TOKENS)


def test_query_scale_none_has_no_scale_and_no_parameters() -> None:
    module = make("none")
    assert module(*inputs()) == (None, None)
    assert list(module.parameters()) == []


@pytest.mark.parametrize("query_scaling", ["static", "adaptive"])
@pytest.mark.parametrize(("delta", "start"), [(NEUTRAL_DELTA, 1.0), (1.0, 1.0 + math.log(2.0))])
def test_query_scale_starts_at_delta_plus_log_2(query_scaling: str, delta: float, start: float) -> None:
    module = make(query_scaling, random=False, query_scale_delta=delta)
    r, _ = module(*inputs())
    torch.testing.assert_close(r, torch.full_like(r, start), rtol=0, atol=2e-7)
    r.sum().backward()
    # A neutral start must not be a dead one: r moves with its first step.
    beta = module.beta if query_scaling == "static" else module.beta.bias
    assert (beta.grad > 0.1).all()


@pytest.mark.parametrize("query_scaling", ["static", "adaptive"])
def test_query_scale_with_a_center_starts_alike_at_its_length_and_grows(query_scaling: str) -> None:
    settings = {"query_scale_gamma_center": 1.0, "query_scale_gamma_range": 1.0, "query_scale_length": 4096}
    r, _ = make(query_scaling, random=False, query_scale_delta=1.0, **settings)(*inputs())
    torch.testing.assert_close(r[1, :, 4], torch.full((HEADS,), 1 + math.log(2.0)), rtol=0, atol=1e-6)  # n = 4096
    growth = 1 + math.log(2.0) * math.log(1_000_001) / math.log(4097)
    torch.testing.assert_close(r[1, :, 5], torch.full((HEADS,), growth), rtol=0, atol=1e-6)


def test_query_scale_log_starts_at_1_at_its_length() -> None:
    module = make("log", random=False, query_scale_length=4096)
    r, _ = module(*inputs())
    torch.testing.assert_close(r[1, :, 4], torch.ones(HEADS), rtol=0, atol=1e-6)  # n = 4096
    assert (r[1, :, 5] > 1).all()
    assert (r[1, :, 3] < 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("query_scaling", SCALED)
def test_query_scale_computes_in_float32_whatever_the_weights(query_scaling: str, dtype: torch.dtype) -> None:
    module = make(query_scaling).to(dtype)
    hidden, n = inputs()
    r, _ = module(hidden.to(dtype), n)
    single = make(query_scaling)
    single.load_state_dict({name: x.float() for name, x in module.state_dict().items()})
    assert r.dtype == torch.float32
    assert torch.equal(r, single(hidden.to(dtype).float(), n)[0])
    r.sum().backward()
    assert all(x.grad.dtype == dtype and x.grad.isfinite().all() for x in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("query_scaling", SCALED)
def test_query_scale_does_not_change_under_autocast(query_scaling: str, dtype: torch.dtype) -> None:
    module = make(query_scaling, entmax_alpha_learned=True)
    expected = module(*inputs())
    with torch.autocast("cpu", dtype=dtype):
        actual = module(*inputs())
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("query_scaling", SCALED)
@pytest.mark.parametrize("gamma", [-50.0, -0.5, 0.0, 0.5, 50.0])
def test_query_scale_and_gradients_are_finite_for_queries_that_see_nothing(query_scaling: str, gamma: float) -> None:
    module = make(query_scaling, entmax_alpha_learned=True)
    with torch.no_grad():
        if query_scaling == "static":
            module.gamma.fill_(gamma)
        elif query_scaling == "adaptive":
            module.gamma.bias.fill_(gamma)
    hidden, _ = inputs()
    for n in (torch.zeros(BATCH, TOKENS, dtype=torch.int32), torch.full((1, TOKENS), -3, dtype=torch.int32)):
        leaf = hidden.clone().requires_grad_()
        r, alpha = module(leaf, n)
        assert r.isfinite().all()
        assert torch.equal(r, module(leaf, torch.ones_like(n))[0])  # counts as one key
        (r.square().sum() + alpha.sum()).backward()
        assert all(x.grad.isfinite().all() for x in module.parameters())
        assert query_scaling != "adaptive" or leaf.grad.isfinite().all()


@pytest.mark.parametrize("query_scaling", ["static", "adaptive"])
def test_query_scale_gradients_equal_autograd_of_the_formula(query_scaling: str) -> None:
    module = make(query_scaling)
    hidden, n = inputs()
    weight = torch.randn(BATCH, HEADS, TOKENS)
    leaf = hidden.clone().requires_grad_()
    (module(leaf, n)[0] * weight).sum().backward()
    state = {name: x.detach().double().requires_grad_() for name, x in module.named_parameters()}
    leaf64 = hidden.double().requires_grad_()
    if query_scaling == "static":
        beta, gamma = (state[x][None, :, None].expand(BATCH, -1, TOKENS) for x in ("beta", "gamma"))
    else:
        beta, gamma = (
            torch.einsum("bth,kh->bkt", leaf64, state[f"{x}.weight"]) + state[f"{x}.bias"][:, None]
            for x in ("beta", "gamma")
        )
    log_n = torch.log(1 + n.double().clamp(min=1))[:, None]
    r = 1 + torch.log1p(beta.exp()) * torch.exp(2 * torch.tanh(gamma) * log_n.log())
    (r * weight.double()).sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), state[name].grad, rtol=1e-4, atol=1e-4)
    if query_scaling == "adaptive":
        torch.testing.assert_close(leaf.grad.double(), leaf64.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", [1.02, 1.3, 1.5, 1.99])
@pytest.mark.parametrize("query_scaling", QUERY_SCALINGS)
def test_learned_alpha_starts_where_the_config_says(query_scaling: str, start: float) -> None:
    module = make(query_scaling, random=False, entmax_alpha=start, entmax_alpha_learned=True)
    _, alpha = module(*inputs())
    torch.testing.assert_close(alpha, torch.full((HEADS,), start), rtol=0, atol=1e-6)
    alpha.sum().backward()
    assert (module.alpha_logit.grad > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_learned_alpha_stays_in_its_range(dtype: torch.dtype) -> None:
    module = make("none", entmax_alpha_learned=True)
    with torch.no_grad():
        module.alpha_logit.copy_(torch.tensor([-1e4, -20.0, 20.0, 1e4]))
    _, alpha = module.to(dtype)(*inputs())
    low, high = LEARNED_ALPHA_RANGE
    assert alpha.dtype == torch.float32
    assert (alpha >= torch.tensor(low)).all()
    assert (alpha <= torch.tensor(high)).all()
    expected = low + (high - low) * module.alpha_logit.double().sigmoid()
    torch.testing.assert_close(alpha.double(), expected, rtol=0, atol=1e-6)


def test_reset_parameters_returns_to_the_neutral_start() -> None:
    for query_scaling in QUERY_SCALINGS:
        settings = {"entmax_alpha_learned": True, "query_scale_delta": NEUTRAL_DELTA}
        module, fresh = make(query_scaling, **settings), make(query_scaling, random=False, **settings)
        module.reset_parameters()
        state, expected = module.state_dict(), fresh.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], x) for name, x in expected.items())
