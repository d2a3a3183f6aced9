"""Which heads are cut: those that a loss can do without, and no other."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_asentmax.methods import METHODS
from hf_asentmax.pruning import prune_heads
from hf_asentmax.synthetic import build_synthetic_model
from hf_asentmax.tasks import build_task, sample_batch

TASK = build_task("copy", symbols=8)
BATCH = sample_batch(TASK, 16, 10)
FIRST = "model.layers.0.self_attn"


def build(method: str = "asentmax", **options: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return build_synthetic_model(TASK, method, length=10, sizes=(2, 32, 4, 64), **options).eval()


def output(model: PreTrainedModel, head: int) -> torch.Tensor:
    """The output weights of a head of the first layer, a view."""
    weight: torch.Tensor = model.get_parameter(f"{FIRST}.o_proj.weight")
    return weight.detach()[:, 8 * head : 8 * head + 8]


def changed(model: PreTrainedModel, heads: tuple[int, ...]) -> float:
    """How many of these heads are no longer what they were."""
    return float(sum(not torch.equal(output(model, head), output(build(), head)) for head in heads))


def test_heads_that_the_loss_needs_stay_as_they_were() -> None:
    model = build()
    cut = prune_heads(model, lambda: changed(model, (1, 3)), tolerance=0.5)
    assert cut == {FIRST: [0, 2], "model.layers.1.self_attn": [0, 1, 2, 3]}
    assert changed(model, (1, 3)) == 0
    assert not output(model, 0).any()
    assert not output(model, 2).any()


def test_the_smallest_go_first_and_the_tolerance_is_for_all_together() -> None:
    model = build()
    output(model, 2).mul_(0.1)
    before = [output(model, head).clone() for head in range(4)]

    def loss() -> float:
        return float(sum(not torch.equal(output(model, head), x) for head, x in enumerate(before)))

    assert prune_heads(model, loss, tolerance=1.0)[FIRST] == [2]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_s_own_loss_bounds_what_is_cut(method: str, family: str) -> None:
    model = build(method, family=family)

    def loss() -> float:
        value: float = model(**BATCH, use_cache=False).loss.item()
        return value

    with torch.no_grad():
        before = loss()
        cut = prune_heads(model, loss, tolerance=1e-3)
        assert loss() <= before + 1e-3
    weights = {name: x for name, x in model.named_parameters() if name.endswith(".o_proj.weight")}
    assert len(weights) == 2
    for name, weight in weights.items():
        zero = [head for head, x in enumerate(weight.split(8, 1)) if not x.any()]
        assert zero == cut.get(name.removesuffix(".o_proj.weight"), [])
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("tolerance", [-1e-9, float("nan")])
def test_a_wrong_tolerance_changes_nothing(tolerance: float) -> None:
    model = build()
    with pytest.raises(ValueError, match="tolerance must be at least 0, got"):
        prune_heads(model, lambda: 0.0, tolerance=tolerance)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), build().parameters(), strict=True))


@pytest.mark.parametrize("losses", [[float("nan")], [float("inf")], [0.0, 0.0, 0.0, KeyboardInterrupt()]])
def test_an_error_leaves_the_model_as_it_was(losses: list[float | BaseException]) -> None:
    model, left = build(), iter(losses)

    def loss() -> float:
        value = next(left)
        if isinstance(value, BaseException):
            raise value
        return value

    with pytest.raises((ValueError, KeyboardInterrupt)):
        prune_heads(model, loss, tolerance=1.0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), build().parameters(), strict=True))


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="model must have attention modules.*got Linear"):
        prune_heads(nn.Linear(2, 2), lambda: 0.0, tolerance=0.0)
