"""Every method of the papers is a setting: from scratch, from a checkpoint, in generate() and by its own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_tokens, tiny_config, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hf_asentmax import METHODS, ASEntmaxConfig, ASEntmaxForCausalLM, patch_model, set_alpha
from hf_asentmax.methods import method_name
from hf_asentmax.positions import POSITIONS
from hf_asentmax.runs import RunArguments, load_for_finetuning

LENGTH = 40


def from_scratch(method: str, positions: str = "nape", **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {key: getattr(tiny_config("llama"), key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    config = ASEntmaxConfig(**sizes, **METHODS[method] | settings, positions=positions)
    model = ASEntmaxForCausalLM(config).eval()
    for name, x in model.named_parameters():  # weights that spread the scores, and a query scale that isn't neutral
        if "norm" not in name:
            torch.nn.init.normal_(x, std=0.3)
    return model


def weights_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The first layer's weights (B, H, T, T)."""
    with torch.no_grad():
        attentions: tuple[Tensor, ...] = model(tokens, output_attentions=True).attentions
    return attentions[0]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("method", METHODS)
def test_methods_weigh_as_they_say(method: str, positions: str) -> None:
    model = from_scratch(method, positions, **({"attention_top_k": 5} if method == "top_k" else {}))
    tokens = random_tokens(2, LENGTH)
    weights = weights_of(model, tokens)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=0, atol=1e-5)
    visible = torch.ones(LENGTH, LENGTH).tril().bool()
    assert (weights[..., ~visible] == 0).all()
    zeros = float((weights[..., visible] == 0).float().mean())
    if method == "top_k":
        assert ((weights > 0).sum(-1) == torch.arange(1, LENGTH + 1).clamp(max=5)).all()
    elif method in ("softmax", "ssmax", "adaptive_temperature"):
        assert zeros == 0
    else:
        assert zeros > 0.2


@pytest.mark.parametrize("method", METHODS)
def test_methods_save_load_train_and_generate(method: str, tmp_path: Path) -> None:
    model = from_scratch(method)
    tokens = random_tokens(2, LENGTH)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert method_name(loaded.config) == method
    with torch.no_grad():
        logits = model(tokens).logits
        assert torch.equal(loaded(tokens).logits, logits)
    generated = [
        loaded.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=0)
        for cached in (True, False)
    ]
    assert torch.equal(*generated)
    loaded.train()
    loaded(tokens, labels=tokens).loss.backward()
    gradients = {name: x.grad for name, x in loaded.named_parameters()}
    assert all(g is not None and g.isfinite().all() and g.abs().max() > 0 for g in gradients.values()), gradients.keys()


@pytest.mark.parametrize(
    ("method", "settings"), [("top_k", {"attention_top_k": 5}), ("adaptive_temperature", {}), ("learned_alpha", {})]
)
def test_methods_are_served_by_a_checkpoint_s_own_code(method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = from_scratch(method, **settings)
    model.save_pretrained(tmp_path / "checkpoint")
    name = "modeling_asentmax_llama.ASEntmaxLlamaForCausalLM"
    theirs = get_class_from_dynamic_module(name, str(tmp_path / "checkpoint"))
    loaded = theirs.from_pretrained(tmp_path / "checkpoint").eval()
    tokens = random_tokens(2, LENGTH)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("method", METHODS)
def test_methods_patch_a_checkpoint(method: str) -> None:
    native, patched = tiny_model("llama"), patch_model(tiny_model("llama"), method=method)
    assert method_name(patched.config) == method
    tokens = random_tokens(2, LENGTH)
    with torch.no_grad():
        same = torch.allclose(patched.eval()(tokens).logits, native.eval()(tokens).logits, atol=1e-5)
    assert same == (method in ("softmax", "top_k"))  # 64 keys are all there are


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_the_training_scripts_attention(method: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    model, schedule = load_for_finetuning(str(tmp_path), RunArguments(attention=method))
    wanted = METHODS[method]
    if schedule is None:
        assert wanted["entmax_alpha_learned"]
    else:
        assert (schedule.start, model.config.entmax_alpha) == (1.0, 1.0)
        set_alpha(model, schedule.target)
    assert method_name(model.config) == method


def test_methods_can_be_changed_by_the_other_arguments() -> None:
    config = patch_model(tiny_model("llama"), method="asentmax", alpha=1.2, query_scaling="static").config
    assert (config.entmax_alpha, config.query_scaling) == (1.2, "static")
    config = patch_model(tiny_model("llama"), method="learned_alpha", alpha_learned=False).config
    assert not config.entmax_alpha_learned
    assert patch_model(tiny_model("llama"), method="top_k", attention_top_k=3).config.attention_top_k == 3


def test_adaptive_temperature_trains_as_softmax_and_sharpens_what_it_evaluates() -> None:
    model, softmax = from_scratch("adaptive_temperature", "rope"), from_scratch("softmax", "rope")
    softmax.load_state_dict(model.state_dict())
    tokens = random_tokens(2, LENGTH)
    assert torch.equal(model.train()(tokens).logits, softmax.train()(tokens).logits)
    sharp, plain = weights_of(model.eval(), tokens), weights_of(softmax.eval(), tokens)
    entropy = torch.special.entr(plain).sum(-1)
    largest, before = sharp.amax(-1), plain.amax(-1)
    assert (largest[entropy > 1.0] > before[entropy > 1.0]).all()
    torch.testing.assert_close(largest[entropy < 0.5], before[entropy < 0.5])
    with pytest.raises(RuntimeError, match="without a gradient.*torch.no_grad"):
        model(tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "entmaxx"}, "method must be one of softmax, .*, got 'entmaxx'"),
        ({"method": "asentmax", "attention_top_k": 5}, "entmax_alpha must be 1, .*attention_top_k.*1.5"),
        ({"method": "top_k", "attention_top_k": 0}, "attention_top_k must be a positive number of keys.*got 0"),
        ({"method": "adaptive_temperature", "attention_top_k": 5}, "attention_top_k must be None.*got 5"),
        ({"method": "adaptive_temperature", "alpha": 1.5}, "entmax_alpha must be 1, .*adaptive_temperature.*1.5"),
    ],
)
def test_methods_refuse_what_they_cannot_be(settings: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        patch_model(model, **settings)
    assert not hasattr(model.config, "entmax_alpha")


def test_set_alpha_refuses_to_make_top_k_entmax() -> None:
    model = patch_model(tiny_model("llama"), method="top_k")
    with pytest.raises(ValueError, match="entmax_alpha must be 1"):
        set_alpha(model, 1.5)
    assert model.config.entmax_alpha == 1.0


@pytest.mark.parametrize(
    ("alpha", "scaling", "name"),
    [
        (1.0, "none", "softmax"),
        (1.0, "log", "ssmax"),
        (1.0, "adaptive", "softmax-adaptive"),
        (1.5, "none", "entmax"),
        (1.5, "static", "asentmax_static"),
        (1.3, "none", "entmax1.3"),
        (2.0, "none", "sparsemax"),
        (1.5, "adaptive", "asentmax"),
        (2.0, "adaptive", "asentmax"),
    ],
)
def test_method_name_follows_the_config(alpha: float, scaling: str, name: str) -> None:
    assert method_name(patch_model(tiny_model("llama"), alpha=alpha, query_scaling=scaling).config) == name


def test_method_name_of_a_native_model_is_softmax() -> None:
    assert method_name(tiny_model("llama").config) == "softmax"
