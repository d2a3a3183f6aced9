"""patch_model, unpatch_model and set_alpha: what a patched model computes, and that the way back is exact."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLASSES, FAMILIES, TOLERANCE, random_tokens, tiny_config, tiny_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

import hf_asentmax
from hf_asentmax import ASEntmaxForCausalLM, patch_model, set_alpha, unpatch_model

FOUND = sorted(file.stem for file in (Path(__file__).parent.parent / "patches").glob("[!_]*.py"))
CLOSE = TOLERANCE[torch.float32]
# Layers that differ: SmolLM3 has one with rotary positions and one without.
LAYERS: dict[str, dict[str, Any]] = {"smollm3": {"no_rope_layers": [1, 0]}}


def native_model(family: str, **overrides: Any) -> PreTrainedModel:
    """A tiny softmax model, the family's special layers among its own."""
    return tiny_model(family, **{**LAYERS.get(family, {}), **overrides})


def entmax_model(family: str = "llama", config: dict[str, Any] | None = None, **settings: Any) -> PreTrainedModel:
    """A tiny patched model whose query scale is far from its neutral start."""
    return randomize_scale(patch_model(native_model(family, **(config or {})), **settings))


def randomize_scale(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".query_scale." in name:
            nn.init.normal_(parameter, std=0.5, generator=generator)
    return model


def attention_modules(model: nn.Module) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith("self_attn")]


@pytest.fixture
def tokens() -> torch.Tensor:
    return random_tokens(2, 21)


def test_patching_families_are_those_of_the_patches_folder() -> None:
    assert sorted(FAMILIES) == FOUND


@pytest.mark.parametrize("family", FOUND)
def test_patch_alpha_one_gives_the_original_logits(family: str, tokens: torch.Tensor) -> None:
    model = native_model(family)
    expected = model(tokens).logits
    patch_model(model, alpha=1.0, query_scaling="none")
    torch.testing.assert_close(model(tokens).logits, expected, **CLOSE)


@pytest.mark.parametrize("family", FOUND)
def test_unpatch_restores_everything(family: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    native_model(family).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    logits, config, settings = model(tokens).logits, model.config, model.config.to_dict()
    weights = {name: (id(x), x.clone()) for name, x in model.named_parameters()}
    state = {name: type(m) for name, m in model.named_modules()}
    contents = {name: sorted(m.__dict__) for name, m in model.named_modules()}
    name_or_path = model.name_or_path
    assert patch_model(model, alpha=1.7, alpha_learned=True) is model
    assert not torch.equal(model(tokens).logits, logits)
    assert unpatch_model(model) is model
    assert torch.equal(model(tokens).logits, logits)
    assert model.config is config
    assert all(m.config is config for m in model.modules() if hasattr(m, "config"))
    assert config.to_dict() == settings
    assert config._attn_implementation == "eager"
    assert model.name_or_path == name_or_path == str(tmp_path)
    assert {name: type(m) for name, m in model.named_modules()} == state
    assert {name: sorted(m.__dict__) for name, m in model.named_modules()} == contents
    assert [name for name, _ in model.named_parameters()] == list(weights)
    assert all(id(x) == weights[name][0] and torch.equal(x, weights[name][1]) for name, x in model.named_parameters())


@pytest.mark.parametrize("family", FOUND)
def test_unpatch_turns_a_loaded_checkpoint_into_the_native_model(
    family: str, tokens: torch.Tensor, tmp_path: Path
) -> None:
    native = native_model(family)
    expected = native(tokens).logits
    patch_model(copy.deepcopy(native)).save_pretrained(tmp_path / "entmax")
    model = unpatch_model(AutoModelForCausalLM.from_pretrained(tmp_path / "entmax"))
    assert type(model) is type(native)
    assert type(model.config) is type(native.config)
    torch.testing.assert_close(model(tokens).logits, expected, **CLOSE)
    model.save_pretrained(tmp_path / "softmax")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "softmax", output_loading_info=True)
    assert type(again) is type(native)
    assert not any(report.values())
    torch.testing.assert_close(again(tokens).logits, expected, **CLOSE)
    assert "entmax" not in (tmp_path / "softmax" / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(("family", "auto"), CLASSES)
def test_patch_takes_base_models_and_classifiers(auto: Any, family: str, tokens: torch.Tensor) -> None:
    model = auto.from_config(tiny_config(family)).eval()
    expected = model(tokens)[0]
    patch_model(model, alpha=1.0, query_scaling="none")
    assert type(model) is type(auto.from_config(model.config))
    torch.testing.assert_close(model(tokens)[0], expected, **CLOSE)
    assert type(unpatch_model(model)) is type(auto.from_config(tiny_config(family)))
    assert torch.equal(model(tokens)[0], expected)


@pytest.mark.parametrize("family", FOUND)
def test_patch_gives_the_public_class(family: str) -> None:
    model = patch_model(native_model(family))
    assert type(model) is getattr(hf_asentmax, type(model).__name__)
    assert type(model.config) is getattr(hf_asentmax, type(model.config).__name__)
    assert model.config.model_type == f"asentmax_{family}"
    assert model.get_decoder().config is model.config


def test_patch_starts_neutral(tokens: torch.Tensor) -> None:
    bare = patch_model(native_model("llama"), query_scaling="none")(tokens).logits
    for settings in ({}, {"query_scaling": "static"}, {"alpha_learned": True}):
        torch.testing.assert_close(patch_model(native_model("llama"), **settings)(tokens).logits, bare, **CLOSE)
    log = patch_model(native_model("llama"), query_scaling="log", query_scale_length=21)
    scale, _ = attention_modules(log)[0].query_scale(torch.zeros(1, 1, 32), torch.tensor([[21]]))
    torch.testing.assert_close(scale, torch.ones(1, 4, 1))


def test_patch_again_after_unpatch_computes_the_new_alpha(tokens: torch.Tensor) -> None:
    expected = patch_model(native_model("llama"), alpha=2.0, query_scaling="none")(tokens).logits
    model = patch_model(native_model("llama"), alpha=1.1)
    set_alpha(model, 1.2, as_tensor=True)
    patch_model(unpatch_model(model), alpha=2.0, query_scaling="none")
    assert model.config.entmax_alpha == 2.0
    torch.testing.assert_close(model(tokens).logits, expected)


def test_patch_keeps_hooks_of_users_and_gradient_checkpointing(tokens: torch.Tensor) -> None:
    model, seen = native_model("llama"), []
    attention_modules(model)[0].register_forward_hook(lambda module, args, output: seen.append(type(module)))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    patch_model(model).train()(tokens, labels=tokens).loss.backward()
    assert seen
    assert set(seen) == {type(attention_modules(model)[0])}
    assert model.is_gradient_checkpointing
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_patch_of_a_model_compiled_in_place_computes_entmax(tokens: torch.Tensor) -> None:
    model = native_model("llama", num_hidden_layers=1)
    expected = patch_model(copy.deepcopy(model), alpha=2.0)(tokens).logits
    model.compile(backend="eager")
    model(tokens)
    patch_model(model, alpha=2.0)
    torch.testing.assert_close(model(tokens).logits, expected, **CLOSE)


def test_patch_uses_the_dtype_of_the_model() -> None:
    model = patch_model(native_model("llama").bfloat16(), alpha_learned=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_patch_leaves_other_models_and_a_shared_config_alone(tokens: torch.Tensor) -> None:
    config = tiny_config("llama")
    first, second = AutoModelForCausalLM.from_config(config), AutoModelForCausalLM.from_config(config)
    before, settings = second(tokens).logits, second.config.to_dict()
    patch_model(first)(tokens)
    assert torch.equal(second(tokens).logits, before)
    assert second.config.to_dict() == settings
    assert "asentmax" not in config.model_type


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0])
def test_set_alpha_computes_what_it_says(alpha: float, tokens: torch.Tensor) -> None:
    expected = entmax_model(alpha=alpha)(tokens).logits
    model = entmax_model(alpha=1.7)
    for as_tensor in (False, True, False):
        set_alpha(model, 1.6, as_tensor=not as_tensor)
        set_alpha(model, alpha, as_tensor=as_tensor)
        assert model.config.entmax_alpha == alpha
        assert model.model.config.entmax_alpha == alpha
        torch.testing.assert_close(model(tokens).logits, expected, **CLOSE)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
def test_set_alpha_in_mid_schedule_saves_what_is_computed(
    as_tensor: bool, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = entmax_model(alpha=1.0)
    set_alpha(model, 1.3, as_tensor=as_tensor)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.entmax_alpha == 1.3
    torch.testing.assert_close(again(tokens).logits, expected, **CLOSE)
    torch.testing.assert_close(copy.deepcopy(model)(tokens).logits, expected)


def test_set_alpha_reaches_a_wrapped_model(tokens: torch.Tensor) -> None:
    model = entmax_model(config={"num_hidden_layers": 1}, alpha=1.1)
    wrapped = torch.compile(model, backend="eager")
    wrapped(tokens)
    set_alpha(wrapped, 2.0)
    expected = entmax_model(config={"num_hidden_layers": 1}, alpha=2.0)(tokens).logits
    torch.testing.assert_close(wrapped(tokens).logits, expected)


def test_set_alpha_leaves_another_model_of_the_same_config_alone(tokens: torch.Tensor) -> None:
    config = patch_model(native_model("llama"), alpha=1.5).config
    first, second = ASEntmaxForCausalLM(config), ASEntmaxForCausalLM(config)
    expected = second(tokens).logits
    set_alpha(first, 1.1)
    assert torch.equal(second(tokens).logits, expected)


def test_set_alpha_follows_the_model_to_its_device() -> None:
    model = entmax_model()
    set_alpha(model, 1.2, as_tensor=True)
    model.to("meta")
    assert model(torch.zeros(1, 3, dtype=torch.long, device="meta")).logits.shape == (1, 3, 64)


@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_set_alpha_reaches_what_a_loaded_classifier_saves(kind: Any, tokens: torch.Tensor, tmp_path: Path) -> None:
    patch_model(kind.from_config(tiny_config("llama", pad_token_id=0))).save_pretrained(tmp_path / "first")
    model = kind.from_pretrained(tmp_path / "first")
    assert {id(module.config) for module in model.modules() if hasattr(module, "config")} == {id(model.config)}
    set_alpha(model, 2.0)
    model.resize_token_embeddings(70)
    assert model.model.config.vocab_size == 70
    model.save_pretrained(tmp_path / "second")
    again = kind.from_pretrained(tmp_path / "second")
    assert again.config.entmax_alpha == 2.0
    assert torch.equal(again(tokens).logits, model.eval()(tokens).logits)


def test_set_alpha_reaches_the_config_of_a_model_around() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = entmax_model()
            self.config = copy.deepcopy(self.inner.config)

    model = Around()
    set_alpha(model, 1.25)
    assert model.config.entmax_alpha == model.inner.config.entmax_alpha == 1.25


def test_unpatch_keeps_what_was_changed_since(tokens: torch.Tensor, tmp_path: Path) -> None:
    native = native_model("llama")
    before = native.config
    model = patch_model(native)
    model.resize_token_embeddings(70)
    model.config.pad_token_id = 5
    unpatch_model(model)
    assert model.config is before
    assert (before.vocab_size, before.pad_token_id) == (70, 5)
    assert not hasattr(before, "entmax_alpha")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    assert torch.equal(again(tokens, labels=tokens).loss, model.eval()(tokens, labels=tokens).loss)
