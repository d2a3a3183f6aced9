"""Which heads are cut: those that a loss can do without, and no other."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_asentmax.methods import METHODS
from hf_asentmax.pruning import PruneHeads, prune_heads, zero_heads
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


def values(model: PreTrainedModel, head: int) -> torch.Tensor:
    """The weights of the values of a head of the first layer, a view."""
    weight: torch.Tensor = model.get_parameter(f"{FIRST}.v_proj.weight")
    return weight.detach()[8 * head : 8 * head + 8]


def changed(model: PreTrainedModel, heads: tuple[int, ...]) -> float:
    """How many of these heads are no longer what they were."""
    return float(sum(not torch.equal(output(model, head), output(build(), head)) for head in heads))


def test_heads_that_the_loss_needs_stay_as_they_were() -> None:
    model = build()
    cut = prune_heads(model, lambda: changed(model, (1, 3)), tolerance=0.5)
    assert cut == {FIRST: [0, 2], "model.layers.1.self_attn": [0, 1, 2, 3]}
    assert changed(model, (1, 3)) == 0
    assert zero_heads(model) == cut
    assert zero_heads(build()) == {}
    for head in range(4):
        assert bool(values(model, head).any()) == (head in (1, 3))


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
    assert zero_heads(model) == cut
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize("bias", [False, True])
def test_further_training_leaves_cut_heads_at_zero_and_moves_the_others(bias: bool, family: str) -> None:
    """After steps that give the optimizer momentum; in a fused projection the values come last."""
    model = build(family=family)
    if bias:
        for layer in model.model.layers:
            source = getattr(layer.self_attn, "v_proj", None) or layer.self_attn.qkv_proj
            source.bias = nn.Parameter(torch.randn(source.out_features))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)

    def step() -> None:
        optimizer.zero_grad()
        model(**BATCH, use_cache=False).loss.backward()
        optimizer.step()

    step()
    losses = iter([0.0, 0.0, *[1.0] * 7])
    cut = prune_heads(model, lambda: next(losses), tolerance=0.5, optimizer=optimizer)
    assert sum(map(len, cut.values())) == 1
    before = {name: x.detach().clone() for name, x in model.named_parameters() if ".self_attn." in name}
    for _ in range(3):
        step()
    assert zero_heads(model) == cut
    ((module, (head,)),) = cut.items()
    for name, x in before.items():
        after = model.get_parameter(name)
        of_values = name in (f"{module}.v_proj.weight", f"{module}.v_proj.bias", f"{module}.qkv_proj.bias")
        if of_values or name == f"{module}.qkv_proj.weight":
            rows = slice(len(x) - 32 + 8 * head, len(x) - 32 + 8 * head + 8)
            assert not after[rows].any()
            after, x = (torch.cat((y[: rows.start], y[rows.stop :])) for y in (after, x))
        assert not torch.equal(after, x), name


def test_values_that_other_heads_read_stay() -> None:
    config = build().config
    config.num_key_value_heads = 2
    model = type(build())(config)
    cut = prune_heads(model, lambda: 0.0, tolerance=0.0)
    assert sum(map(len, cut.values())) == 8
    assert model.get_parameter(f"{FIRST}.v_proj.weight").all()
    assert not model.get_parameter(f"{FIRST}.o_proj.weight").any()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tolerance": float("inf")}, "tolerance must be"), ({"tolerance": 0.0, "at": 1.1}, "at must be a share")],
)
def test_the_callback_names_what_is_wrong(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruneHeads(lambda model: 0.0, **options)


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
