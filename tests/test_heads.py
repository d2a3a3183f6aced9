"""Token classification and embeddings, of padded batches: each row gets what it gets on its own, trained or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TOLERANCE, auto_classes, random_tokens, tiny_config
from test_patching import FOUND, randomize_scale
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForTokenClassification

from hf_asentmax import patch_model

CLOSE = TOLERANCE[torch.float32]
TAGGERS = [family for family in FOUND if AutoModelForTokenClassification in auto_classes(family)]
ROWS = [random_tokens(length, seed=length) for length in (13, 1, 6)]
SIDES = pytest.mark.parametrize("side", ["left", "right"])


def build(auto: Any, family: str, **overrides: Any) -> Any:
    """A tiny patched model of an Auto class, its query scale far from the neutral start, in eval mode."""
    torch.manual_seed(0)
    model = patch_model(auto.from_config(tiny_config(family, num_labels=3, **overrides), dtype=torch.float32))
    return randomize_scale(model).eval()


def pad(rows: list[Tensor], side: str, value: int) -> Tensor:
    """The rows as one batch (B, T), padded on a side."""
    length = max(map(len, rows))
    gaps = [(length - len(row), 0) if side == "left" else (0, length - len(row)) for row in rows]
    return torch.stack([nn.functional.pad(row, gap, value=value) for row, gap in zip(rows, gaps, strict=True)])


def batch(side: str) -> dict[str, Tensor]:
    return {"input_ids": pad(ROWS, side, 0), "attention_mask": pad([torch.ones_like(row) for row in ROWS], side, 0)}


def embed(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean of the real tokens' last hidden states, (B, hidden)."""
    hidden = model(input_ids, attention_mask=attention_mask).last_hidden_state
    mask = attention_mask[..., None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


def embed_alone(model: Any) -> Tensor:
    return torch.cat([embed(model, row[None], torch.ones_like(row)[None]) for row in ROWS])


def step(model: Any, loss: Tensor) -> None:
    """One step down the gradient, which must reach every parameter."""
    loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(parameter.grad.any() for name, parameter in model.named_parameters() if ".query_scale." in name)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()


@pytest.mark.parametrize("family", FOUND)
@SIDES
@torch.no_grad()
def test_embeddings_do_not_depend_on_the_batch(family: str, side: str) -> None:
    """No position_ids, as embedding libraries call it: rotary positions are relative."""
    model = build(AutoModel, family)
    torch.testing.assert_close(embed(model, **batch(side)), embed_alone(model), **CLOSE)


@pytest.mark.parametrize("family", FOUND)
def test_embeddings_train_and_reload(family: str, tmp_path: Path) -> None:
    """A contrastive step on a padded batch, then the model from its folder: its embeddings, of batches and of rows."""
    model = build(AutoModel, family)
    with torch.no_grad():
        before = embed(model, **batch("left"))
    model.train()
    anchors, others = (nn.functional.normalize(embed(model, **batch(side)), dim=-1) for side in ("left", "right"))
    loss = nn.functional.cross_entropy(anchors @ others.flip(0).T / 0.05, torch.arange(len(ROWS)))
    step(model, loss)
    model.eval().save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is type(model)
    with torch.no_grad():
        after = embed(model, **batch("left"))
        assert (after - before).abs().max() > 1e-3
        assert torch.equal(embed(again, **batch("left")), after)
        torch.testing.assert_close(embed_alone(again), after, **CLOSE)


@pytest.mark.parametrize("family", TAGGERS)
@SIDES
def test_token_classifier_tags_a_padded_row_as_it_does_alone(family: str, side: str, tmp_path: Path) -> None:
    """Logits and loss; padding (label -100) has no part in either. Then a step, and the same from its folder."""
    model = build(AutoModelForTokenClassification, family)
    tags = [random_tokens(len(row), seed=9) % 3 for row in ROWS]
    padded = batch(side) | {"labels": pad(tags, side, -100)}
    output = model(**padded)
    assert output.logits.shape == (3, 13, 3)
    alone = [model(row[None]).logits[0] for row in ROWS]
    torch.testing.assert_close(output.logits[padded["attention_mask"].bool()], torch.cat(alone), **CLOSE)
    expected = nn.functional.cross_entropy(torch.cat(alone), torch.cat(tags))
    torch.testing.assert_close(output.loss, expected, **CLOSE)
    step(model, output.loss)
    model.save_pretrained(tmp_path)
    again = AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert type(again) is type(model)
    with torch.no_grad():
        trained = again(**padded)
        assert torch.equal(trained.logits, model(**padded).logits)
    assert trained.loss < output.loss


def test_token_classifier_names_its_labels_and_drops_out_in_training_only(tmp_path: Path) -> None:
    names = {0: "O", 1: "B-PER", 2: "I-PER"}
    model = build(AutoModelForTokenClassification, "llama", id2label=names, classifier_dropout=0.5)
    model.save_pretrained(tmp_path)
    again = AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert again.config.id2label == names
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, again(tokens).logits)
        again.train()
        assert not torch.equal(again(tokens).logits, again(tokens).logits)
