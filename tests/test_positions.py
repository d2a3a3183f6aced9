"""Slopes of the position schemes, and which heads they and the query scale reach."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import random_tokens, tiny_model
from torch import Tensor

import hf_asentmax.attention
from hf_asentmax import entmax, patch_model
from hf_asentmax.positions import alibi_slopes

CPU = torch.device("cpu")


def published_slopes(heads: int) -> list[float]:
    """The rule of arXiv 2108.12409: a geometric sequence, with every other slope of twice the heads filling up."""
    if math.log2(heads).is_integer():
        start = 2 ** (-8 / heads)
        return [start ** (h + 1) for h in range(heads)]
    power = 2 ** math.floor(math.log2(heads))
    return published_slopes(power) + published_slopes(2 * power)[::2][: heads - power]


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 20, 24, 31, 32, 40, 48, 64])
def test_alibi_slopes_are_the_published_ones(heads: int) -> None:
    slopes = alibi_slopes("alibi", heads, CPU)
    assert slopes is not None
    assert slopes.dtype == torch.float32
    torch.testing.assert_close(slopes, torch.tensor(published_slopes(heads)), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        (1, [0.0]),
        (2, [1.0, 0.0]),
        (3, [1.0, 0.0, 0.0]),
        (5, [1.0, 1 / 2, 0.0, 0.0, 0.0]),
        (8, [1.0, 1 / 2, 1 / 3, 1 / 4, 0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_nape_slopes_are_1_over_h_on_the_first_half(heads: int, expected: list[float]) -> None:
    slopes = alibi_slopes("nape", heads, CPU)
    torch.testing.assert_close(slopes, torch.tensor(expected), rtol=1e-7, atol=0)


@pytest.mark.parametrize("slope", [1 / 4, 1 / 8, 1 / 128])
def test_entmax_sees_as_many_tokens_as_the_slope_says(slope: float) -> None:
    seen = (entmax(-slope * torch.arange(200.0, dtype=torch.float64), alpha=1.5) > 0).sum().item()
    assert abs(seen - (12 / slope**2) ** (1 / 3)) <= 1


@pytest.mark.parametrize("positions", ["rope", "nope"])
def test_positions_without_a_bias_have_no_slopes(positions: str) -> None:
    assert alibi_slopes(positions, 4, CPU) is None


@pytest.mark.parametrize("positions", ["alibi", "nape"])
def test_slopes_are_made_on_the_device_asked_for(positions: str) -> None:
    slopes = alibi_slopes(positions, 6, torch.device("meta"))
    assert slopes is not None
    assert slopes.device.type == "meta"
    assert slopes.shape == (6,)


def attention_calls(positions: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, dict]]:
    """Query, key and options of every attention of a patched model, on the same token at every position."""
    model = patch_model(tiny_model("llama"), positions=positions)
    for name, parameter in model.named_parameters():
        if ".query_scale." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    calls = []
    compute = hf_asentmax.attention.attention_from_intervals

    def spy(query: Tensor, key: Tensor, *arguments: Tensor, **options: object) -> Tensor:
        calls.append((query, key, options))
        return compute(query, key, *arguments, **options)

    monkeypatch.setattr(hf_asentmax.attention, "attention_from_intervals", spy)
    model(random_tokens(1, 1).expand(1, 12))
    assert len(calls) == model.config.num_hidden_layers
    return calls


@pytest.mark.parametrize(
    ("positions", "slopes", "scaled_heads"),
    [
        ("rope", None, [True] * 4),
        ("nope", None, [True] * 4),
        ("alibi", [1 / 4, 1 / 16, 1 / 64, 1 / 256], [True] * 4),
        ("nape", [1.0, 1 / 2, 0.0, 0.0], [False, False, True, True]),
    ],
)
def test_positions_reach_the_heads_that_they_name(
    positions: str, slopes: list[float] | None, scaled_heads: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, options = attention_calls(positions, monkeypatch)[0]
    if slopes is None:
        assert options["alibi_slopes"] is None
    else:
        torch.testing.assert_close(options["alibi_slopes"], torch.tensor(slopes))
    assert [bool((r != 1).any()) for r in options["query_scale"][0]] == scaled_heads
    # The first layer's input is the same at every position, so its queries and keys differ by rotation only.
    rotated = positions == "rope"
    for x in (query, key):
        assert torch.allclose(x, x[:, :, :1].expand_as(x), atol=1e-6) != rotated
