"""Packed documents: each is computed as if it were alone, however its bounds are told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import TOLERANCE, WINDOWS, random_tokens
from test_patching import FOUND, entmax_model, native_model
from transformers import DataCollatorWithFlattening, DynamicCache, StaticCache

from hf_asentmax import patch_model

CLOSE = TOLERANCE[torch.float32]
LENGTHS = (7, 1, 12, 2)  # longer than the windows, and a document of one token
DOCUMENTS = [random_tokens(length, seed=length) for length in LENGTHS]
PACKED = torch.cat(DOCUMENTS)[None]
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
BOUNDS = torch.tensor([0, 7, 8, 20, 22], dtype=torch.int32)


def cu_seq_lens(bounds: torch.Tensor = BOUNDS) -> dict[str, Any]:
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 12, "max_length_k": 12}


def separately(model: Any) -> torch.Tensor:
    return torch.cat([model(document[None]).logits for document in DOCUMENTS], dim=1)


@pytest.fixture(params=FOUND)
def model(request: pytest.FixtureRequest) -> Any:
    return entmax_model(request.param, WINDOWS.get(request.param))


@pytest.mark.parametrize("use_cache", [False, True], ids=["no-cache", "cache"])
@torch.no_grad()
def test_packing_documents_equal_separate_ones(model: Any, use_cache: bool) -> None:
    expected = separately(model)
    collated = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(
        [{"input_ids": document.tolist()} for document in DOCUMENTS]
    )
    collated.pop("labels")
    for arguments in (
        {"input_ids": PACKED, "position_ids": POSITIONS},
        {"input_ids": PACKED, **cu_seq_lens(), "position_ids": POSITIONS},
        {"input_ids": PACKED, **cu_seq_lens(BOUNDS.long()), "position_ids": POSITIONS},
        dict(collated),
    ):
        torch.testing.assert_close(model(**arguments, use_cache=use_cache).logits, expected, **CLOSE)


@torch.no_grad()
def test_packing_without_positions_still_separates_by_bounds() -> None:
    """Rotary positions are relative: the bounds alone tell the documents apart."""
    model = entmax_model("llama")
    for use_cache in (False, True):
        logits = model(PACKED, **cu_seq_lens(), use_cache=use_cache).logits
        torch.testing.assert_close(logits, separately(model), **CLOSE)


@torch.no_grad()
def test_packing_weights_stay_within_documents(model: Any) -> None:
    weights = model(PACKED, position_ids=POSITIONS, output_attentions=True).attentions
    document = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    other = document[:, None] != document[None, :]
    for layer in weights:
        assert (layer[..., other] == 0).all()
        torch.testing.assert_close(layer.sum(-1), torch.ones(layer.shape[:-1]), **CLOSE)


@pytest.mark.parametrize("use_cache", [False, True], ids=["no-cache", "cache"])
def test_packing_gradients_equal_those_of_separate_documents(model: Any, use_cache: bool) -> None:
    weights = torch.randn(1, PACKED.shape[1], 64)
    (separately(model) * weights).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    (model(PACKED, position_ids=POSITIONS, use_cache=use_cache).logits * weights).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4, msg=name)


@torch.no_grad()
def test_packing_rows_of_a_batch_have_bounds_of_their_own(model: Any) -> None:
    second = torch.cat([torch.arange(15), torch.arange(7)])[None]
    tokens = torch.cat([PACKED, random_tokens(1, 22, seed=9)])
    expected = torch.cat([model(tokens[1:, :15]).logits, model(tokens[1:, 15:]).logits], dim=1)
    for use_cache in (False, True):
        logits = model(tokens, position_ids=torch.cat([POSITIONS, second]), use_cache=use_cache).logits
        torch.testing.assert_close(logits[:1], separately(model), **CLOSE)
        torch.testing.assert_close(logits[1:], expected, **CLOSE)


@torch.no_grad()
def test_packing_fills_static_and_used_caches(model: Any) -> None:
    expected = separately(model)
    static = StaticCache(config=model.config, max_cache_len=40)
    torch.testing.assert_close(model(PACKED, position_ids=POSITIONS, past_key_values=static).logits, expected, **CLOSE)
    used = DynamicCache(config=model.config)
    model(PACKED[:, :8], position_ids=POSITIONS[:, :8], past_key_values=used)
    logits = model(PACKED[:, 8:], position_ids=POSITIONS[:, 8:], past_key_values=used).logits
    torch.testing.assert_close(logits[:, 12:], expected[:, 20:], **CLOSE)  # the document that starts in this chunk


@torch.no_grad()
def test_packing_softmax_twin_equals_the_native_model() -> None:
    """With alpha 1 and no scale packing must agree with the family's own, which is right without a cache."""
    for family in FOUND:
        native = native_model(family)
        expected = native(PACKED, position_ids=POSITIONS, use_cache=False).logits
        model = patch_model(native, alpha=1.0, query_scaling="none")
        for use_cache in (False, True):
            logits = model(PACKED, position_ids=POSITIONS, use_cache=use_cache).logits
            torch.testing.assert_close(logits, expected, **CLOSE)


@torch.no_grad()
def test_packing_by_restarts_does_not_depend_on_mask_or_cache() -> None:
    model = entmax_model()
    tokens = random_tokens(1, 12)
    arguments = {"position_ids": POSITIONS[:, :12], "attention_mask": torch.ones_like(tokens)}
    expected = model(tokens, position_ids=POSITIONS[:, :12], use_cache=False).logits
    for use_cache in (False, True):
        found = model(tokens, use_cache=use_cache, **arguments).logits
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize(
    "bounds", [[0, 7, 9], [0, 9, 7, 22], [3, 9, 22], [0, 7, 30]], ids=["short", "falling", "late", "long"]
)
@torch.no_grad()
def test_packing_refuses_bounds_that_do_not_fit(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seq_?lens"):
        entmax_model()(PACKED, **cu_seq_lens(torch.tensor(bounds, dtype=torch.int32)))


@torch.no_grad()
def test_packing_refuses_bounds_over_several_rows() -> None:
    """Bounds run over one flattened row; read against each of two rows they would be wrong without a word."""
    bounds = torch.tensor([0, 5, 12, 19, 24], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_?lens"):
        entmax_model()(random_tokens(2, 12), **cu_seq_lens(bounds))


@torch.no_grad()
def test_packing_refuses_sequence_numbers_alone() -> None:
    with pytest.raises(NotImplementedError, match="seq_idx"):
        entmax_model()(PACKED, seq_idx=torch.zeros_like(PACKED, dtype=torch.int32))
