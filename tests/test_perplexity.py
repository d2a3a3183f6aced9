"""Perplexity against a direct computation, and that every length scores the same tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import FAMILIES, random_tokens, tiny_model
from torch.nn import functional as F

from hf_asentmax import patch_model
from hf_asentmax import perplexity as module
from hf_asentmax.perplexity import compared, perplexity_by_length, perplexity_by_position, token_losses

DOCUMENTS = [random_tokens(40 + 3 * seed, seed=seed).tolist() for seed in range(4)]


def model() -> Any:
    return patch_model(tiny_model("llama"))


def direct_losses(network: Any, ids: list[int]) -> torch.Tensor:
    """Loss of every token but the first, from the logits of the whole model."""
    tokens = torch.tensor(ids)
    with torch.no_grad():
        logits = network(tokens[None]).logits[0, :-1]
    return F.cross_entropy(logits.double(), tokens[1:], reduction="none")


@pytest.mark.parametrize("scored", [1, 39])
@pytest.mark.parametrize("family", FAMILIES)
def test_token_losses_equal_cross_entropy(family: str, scored: int) -> None:
    network, ids = patch_model(tiny_model(family)), DOCUMENTS[0]
    network.get_output_embeddings().weight.data.mul_(30)  # so that Gemma's cap cuts, and Granite's scaling counts
    losses = token_losses(network, torch.tensor([ids]), scored)
    assert losses.shape == (1, scored)
    torch.testing.assert_close(losses[0].double(), direct_losses(network, ids)[-scored:], rtol=1e-5, atol=1e-5)


def test_token_losses_do_not_depend_on_how_the_logits_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    network, ids = model(), random_tokens(2, 30)
    whole = token_losses(network, ids, 20)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 3 * 64 * 2)  # three positions of two rows, 64 tokens in all
    torch.testing.assert_close(token_losses(network, ids, 20), whole)


def test_perplexity_keeps_the_token_that_begins_a_sequence() -> None:
    network = patch_model(tiny_model("llama", bos_token_id=1))
    documents = [[1, *ids] for ids in DOCUMENTS]
    for row in perplexity_by_length(network, documents, [12, 40], scored=8):
        used = [[1, *ids[-row["length"] + 1 :]] for ids in documents]
        means = [direct_losses(network, ids)[-8:].mean() for ids in used]
        assert row["perplexity"] == pytest.approx(math.exp(torch.stack(means).mean()), rel=1e-5)


def test_perplexity_by_length_equals_a_direct_computation() -> None:
    network = model()
    rows = perplexity_by_length(network, DOCUMENTS, [12, 24, 40], scored=8)
    assert [row["length"] for row in rows] == [12, 24, 40]
    for row in rows:
        means = [direct_losses(network, ids[-row["length"] :])[-8:].mean() for ids in DOCUMENTS]
        assert row["perplexity"] == pytest.approx(math.exp(torch.stack(means).mean()), rel=1e-5)
        assert row["low"] <= row["perplexity"] <= row["high"]
        assert (row["documents"], row["tokens"]) == (4, 32)
        assert row["losses"] == pytest.approx([mean.item() for mean in means], rel=1e-5)


def test_perplexity_does_not_depend_on_how_documents_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    together = perplexity_by_length(model(), DOCUMENTS, [40], scored=8)
    monkeypatch.setattr(module, "BATCH_TOKENS", 3 * 40)  # three documents, then one
    for row, own in zip(perplexity_by_length(model(), DOCUMENTS, [40], scored=8), together, strict=True):
        assert row["losses"] == pytest.approx(own["losses"], rel=1e-5)


def test_compared_models_differ_by_document() -> None:
    """What all documents share is sure, however far the documents lie apart; the first model is its own measure,
    and each model at its shortest length."""
    losses = [1.0, 2.0, 4.0, 8.0]
    rows = [{"model": "a", "length": n, "losses": losses} for n in (8, 16)]
    rows += [{"model": "b", "length": n, "losses": [loss + math.log(n / 4) for loss in losses]} for n in (8, 16)]
    for row, ratio in zip(compared(rows), [1, 1, 2, 4], strict=True):
        assert [row[name] for name in ("ratio", "ratio_low", "ratio_high")] == pytest.approx([ratio] * 3)
    for row, growth in zip(compared(rows), [1, 1, 1, 2], strict=True):
        assert [row[name] for name in ("growth", "growth_low", "growth_high")] == pytest.approx([growth] * 3)
    uneven = [{"model": "a", "length": 8, "losses": losses}, {"model": "b", "length": 8, "losses": losses[::-1]}]
    row = compared(uneven)[1]
    assert row["ratio"] == pytest.approx(1)
    assert row["ratio_low"] < 0.5 < 2 < row["ratio_high"]


def test_perplexity_by_length_scores_the_same_tokens_at_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, list[list[int]]] = {}

    def record(network: Any, input_ids: torch.Tensor, scored: int, **reading: Any) -> torch.Tensor:
        seen.setdefault(input_ids.shape[1], []).extend(input_ids[:, -scored:].tolist())
        return token_losses(network, input_ids, scored, **reading)

    monkeypatch.setattr(module, "token_losses", record)
    perplexity_by_length(model(), DOCUMENTS, [12, 40], scored=8)
    assert seen == dict.fromkeys((12, 40), [ids[-8:] for ids in DOCUMENTS])


def test_perplexity_by_length_leaves_out_short_documents_at_every_length() -> None:
    network = model()
    rows = perplexity_by_length(network, [[5, 6, 7], *DOCUMENTS], [12, 44], scored=8)
    assert [row["documents"] for row in rows] == [2, 2]
    assert rows == perplexity_by_length(network, DOCUMENTS[2:], [12, 44], scored=8)


def test_perplexity_by_position_covers_every_scored_token_once() -> None:
    network = model()
    rows = perplexity_by_position(network, DOCUMENTS, 40, buckets=4)
    positions = [place for row in rows for place in range(row["first"], row["last"] + 1)]
    assert positions == list(range(1, 40))
    losses = torch.stack([direct_losses(network, ids[:40]) for ids in DOCUMENTS])
    for row in rows:
        bucket = losses[:, row["first"] - 1 : row["last"]]
        assert row["perplexity"] == pytest.approx(math.exp(bucket.mean()), rel=1e-5)
        assert row["documents"] == 4


def test_perplexity_of_equal_documents_has_an_interval_of_no_width() -> None:
    (row,) = perplexity_by_length(model(), [DOCUMENTS[0]] * 3, [40], scored=8)
    assert row["low"] == pytest.approx(row["perplexity"])
    assert row["high"] == pytest.approx(row["perplexity"])


@pytest.mark.parametrize(
    ("lengths", "scored", "message"),
    [([8, 40], 8, "lengths must exceed the 8 scored tokens, got 8"), ([41, 200], 8, "at least 200 tokens.*has 49")],
)
def test_perplexity_by_length_refuses_what_it_cannot_score(lengths: list[int], scored: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity_by_length(model(), DOCUMENTS, lengths, scored=scored)


@pytest.mark.parametrize(("length", "buckets"), [(200, 4), (40, 0), (40, 40)])
def test_perplexity_by_position_refuses_what_it_cannot_score(length: int, buckets: int) -> None:
    with pytest.raises(ValueError, match=f"got {buckets} buckets and at most 49 tokens"):
        perplexity_by_position(model(), DOCUMENTS, length, buckets=buckets)
