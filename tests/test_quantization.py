"""Weights of torchao and bitsandbytes in ASEntmax models: all linear layers but the query scale, which stays as is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from helpers import TOLERANCE, random_tokens
from peft import LoraConfig, get_peft_model
from test_patching import FOUND, attention_modules, entmax_model, native_model, randomize_scale
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao.utils import TorchAOBaseTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from hf_asentmax import patch_model

CLOSE = TOLERANCE[torch.float32]
TOKENS = random_tokens(2, 13)


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model.eval()(TOKENS).logits


def quantized_names(model: nn.Module) -> set[str]:
    return {name for name, x in model.named_parameters() if isinstance(x.data, TorchAOBaseTensor)}


def linear_names(model: nn.Module) -> set[str]:
    return {f"{name}.weight" for name, module in model.named_modules() if name.endswith(("_proj", "lm_head"))}


def dequantized(model: Any) -> Any:
    """A copy with the same values in ordinary weights."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(getattr(module, "weight", None), TorchAOBaseTensor):
            module.weight = nn.Parameter(module.weight.dequantize())
    return plain


@pytest.mark.parametrize("family", FOUND)
def test_quantization_leaves_the_query_scale_alone(family: str) -> None:
    model = entmax_model(family)
    before, scales = logits_of(model), {n: x.clone() for n, x in model.named_parameters() if ".query_scale." in n}
    quantize_(model, Int8WeightOnlyConfig())
    assert quantized_names(model) == linear_names(model)
    assert scales
    assert all(torch.equal(x, scales[name]) for name, x in model.named_parameters() if ".query_scale." in name)
    found = logits_of(model)
    torch.testing.assert_close(found, logits_of(dequantized(model)), **CLOSE)
    assert 0 < (found - before).abs().max() < 0.05 * before.abs().max()


def test_quantized_softmax_model_can_be_converted() -> None:
    model, plain = native_model("llama"), native_model("llama")
    quantize_(model, Int8WeightOnlyConfig())
    plain.load_state_dict(dequantized(model).state_dict())
    expected = logits_of(randomize_scale(patch_model(plain)))
    randomize_scale(patch_model(model))
    assert quantized_names(model) == linear_names(model)
    torch.testing.assert_close(logits_of(model), expected, **CLOSE)


def test_quantization_at_load_saves_and_generates(tmp_path: Path) -> None:
    model = entmax_model()
    model.save_pretrained(tmp_path / "model")
    config = TorchAoConfig(Int8WeightOnlyConfig())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config)
    assert type(loaded) is type(model)
    assert quantized_names(loaded) == linear_names(loaded) - {"lm_head.weight"}  # Transformers' own exception
    expected = logits_of(loaded)
    torch.testing.assert_close(expected, logits_of(dequantized(loaded)), **CLOSE)
    generated = loaded.generate(TOKENS, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, dequantized(loaded).generate(TOKENS, max_new_tokens=4, do_sample=False))
    loaded.save_pretrained(tmp_path / "int8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert quantized_names(again) == quantized_names(loaded)
    assert torch.equal(logits_of(again), expected)


def test_quantized_model_trains_an_adapter_and_its_query_scale(tmp_path: Path) -> None:
    entmax_model().save_pretrained(tmp_path)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    before = logits_of(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", modules_to_save=["query_scale"]))
    assert torch.equal(logits_of(model), before)
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    assert all("lora_" in name or ".query_scale.modules_to_save." in name for name in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    assert not torch.allclose(logits_of(model), before, **CLOSE)


@pytest.mark.parametrize("family", FOUND)
@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_leaves_the_query_scale_alone(bits: int, family: str, tmp_path: Path) -> None:
    """Against the same model with each linear layer's weight as bitsandbytes gives it back."""
    model = entmax_model(family, {"hidden_size": 64, "head_dim": 16}, alpha_learned=True)  # 4 bits: blocks of 64
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    )
    assert type(loaded) is type(model)
    kind = bnb.nn.Linear8bitLt if bits == 8 else bnb.nn.Linear4bit
    quantized = {f"{name}.weight" for name, module in loaded.named_modules() if isinstance(module, kind)}
    assert quantized == linear_names(model) - {"lm_head.weight"}  # Transformers' own exception
    scales = {name: x for name, x in model.named_parameters() if ".query_scale." in name}
    found = {name: x for name, x in loaded.named_parameters() if ".query_scale." in name}
    assert scales.keys() == found.keys()
    assert all(torch.equal(found[name], x) for name, x in scales.items())
    plain = copy.deepcopy(model)
    for name, module in plain.named_modules():
        if f"{name}.weight" in quantized:
            module.weight = nn.Parameter(given_back(loaded.get_submodule(name)))
    # bitsandbytes rounds the inputs too, to 8 or 16 bits: near is what is far nearer than the same without its scale.
    expected = logits_of(plain)
    for module in attention_modules(plain):
        module.query_scale.reset_parameters()
    assert (logits_of(loaded) - expected).abs().max() < 0.2 * (logits_of(plain) - expected).abs().max()
    assert torch.equal(
        loaded.generate(TOKENS, max_new_tokens=3, do_sample=False),
        loaded.generate(TOKENS, max_new_tokens=3, do_sample=False, use_cache=False),
    )


def given_back(layer: Any) -> torch.Tensor:
    """The weight that a layer of bitsandbytes computes with, in ordinary numbers."""
    weight = layer.weight
    if isinstance(weight, bnb.nn.Params4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.CB.float() * weight.SCB[:, None] / 127.0
