"""PEFT on ASEntmax models: its defaults, its kinds of LoRA, and that none of them touches the query scale unasked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TOLERANCE, random_tokens, tiny_model
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PeftModel, get_peft_model
from processes import run_python
from test_patching import FOUND, entmax_model, native_model
from torch import nn
from transformers import AutoModelForCausalLM

from hf_asentmax import patch_model, set_alpha
from hf_asentmax.adapters import add_lora
from hf_asentmax.modeling_asentmax import ASEntmaxModelMixin

CLOSE = TOLERANCE[torch.float32]
MERGED = {"rtol": 1e-4, "atol": 1e-4}  # random adapters are larger than the weights they are added to: 2e-5 measured
TOKENS = random_tokens(2, 13)
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_alpha": 4},
}


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model.eval()(TOKENS).logits


def lora(**settings: Any) -> LoraConfig:
    """Random where LoRA starts at zero, so that an adapter that is not applied shows."""
    return LoraConfig(**({"task_type": "CAUSAL_LM", "r": 2, "init_lora_weights": False} | settings))


def chosen_targets(model: Any, config: Any) -> set[str] | str:
    """The target modules that PEFT takes by itself, or the error that it raises where it has none."""
    try:
        return get_peft_model(model, config).peft_config["default"].target_modules
    except ValueError as error:
        return str(error)


# Default target modules

WITHOUT_DEFAULT = ("granite", "olmo2", "phi3", "smollm3")  # in PEFT's own tables


@pytest.mark.parametrize("kind", [LoraConfig, IA3Config], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("family", FOUND)
def test_peft_default_targets_are_those_of_the_softmax_family(family: str, kind: Any, tmp_path: Path) -> None:
    entmax_model(family).save_pretrained(tmp_path)
    expected = chosen_targets(native_model(family), kind(task_type="CAUSAL_LM"))
    if family in WITHOUT_DEFAULT:
        assert "Please specify `target_modules`" in expected
    else:
        assert {"q_proj", "v_proj"} & set(expected)
    for model in (entmax_model(family), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert isinstance(model, ASEntmaxModelMixin)
        assert chosen_targets(model, kind(task_type="CAUSAL_LM")) == expected


@pytest.mark.parametrize("family", FOUND)
def test_peft_targets_of_our_own_are_all_projections_of_a_layer(family: str, tmp_path: Path) -> None:
    base = entmax_model(family)
    projections = {name for name, module in base.model.named_modules() if isinstance(module, nn.Linear)}
    assert len(projections) in (4 * 2, 7 * 2)  # where q, k and v are one, gate and up are too
    model = add_lora(base, str(tmp_path), r=2)
    adapted = {name for name, module in model.get_base_model().model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == projections


def test_peft_default_targets_hold_for_add_adapter() -> None:
    model = entmax_model()
    model.add_adapter(LoraConfig())
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "v_proj"}


ORDERS = {
    "model first": "{build}; assert 'peft' not in sys.modules, 'peft was imported'; {imports}",
    "peft first": "{imports}; assert 'hf_asentmax' not in sys.modules; {build}",
}


@pytest.mark.parametrize("order", ORDERS)
def test_peft_default_targets_hold_whichever_is_imported_first(order: str) -> None:
    build = "from hf_asentmax import ASEntmaxConfig, ASEntmaxForCausalLM; model = ASEntmaxForCausalLM(ASEntmaxConfig("
    build += "vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))"
    code = "import sys; " + ORDERS[order].format(build=build, imports="from peft import LoraConfig, get_peft_model")
    code += "; print(sorted(get_peft_model(model, LoraConfig()).peft_config['default'].target_modules))"
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['q_proj', 'v_proj']"


# Kinds of LoRA


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("targets", [None, "all-linear"], ids=["default", "all-linear"])
def test_peft_adapter_trains_reloads_and_merges(variant: str, targets: str | None, tmp_path: Path) -> None:
    """On a base just converted, whose query scale has zero weights."""
    base = patch_model(tiny_model("llama"))
    base.save_pretrained(tmp_path / "base")
    before = logits_of(base)
    config = lora(target_modules=targets, modules_to_save=["query_scale"], **VARIANTS[variant])
    model = get_peft_model(base, config).train()
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    assert all("lora_" in name or ".query_scale.modules_to_save." in name for name in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    starts = {name: x.detach().clone() for name, x in trained.items()}
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    assert [name for name, x in trained.items() if torch.equal(x, starts[name])] == []
    expected = logits_of(model)
    assert (expected - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(again.get_base_model()) is type(base)
    assert torch.equal(logits_of(again), expected)
    set_alpha(again, 1.0)
    assert not torch.allclose(logits_of(again), expected, **MERGED)  # at 1.5 it was not softmax
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), expected, **MERGED)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits_of(merged))


@pytest.mark.parametrize("family", FOUND)
def test_peft_adapter_on_every_family_merges(family: str) -> None:
    model = get_peft_model(entmax_model(family), lora(target_modules="all-linear", modules_to_save=["query_scale"]))
    expected = logits_of(model)
    torch.testing.assert_close(logits_of(model.merge_and_unload()), expected, **MERGED)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peft_all_linear_leaves_the_query_scale_alone(variant: str, dtype: torch.dtype) -> None:
    """DoRA divides by the norms of the weights it adapts: those of a scale at its start are zero."""
    base = patch_model(tiny_model("llama")).to(dtype)
    before = logits_of(base)
    model = get_peft_model(base, lora(target_modules="all-linear", init_lora_weights=True, **VARIANTS[variant]))
    assert [name for name, _ in model.named_parameters() if "query_scale" in name and "lora" in name] == []
    torch.testing.assert_close(logits_of(model), before, **TOLERANCE[dtype])
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(torch.isfinite(x.grad).all() for x in model.parameters() if x.requires_grad)


def test_peft_target_inside_the_query_scale_raises() -> None:
    with pytest.raises(ValueError, match="QueryScaleLinear"):
        get_peft_model(entmax_model(), lora(target_modules=["q_proj", "beta"]))


@pytest.mark.parametrize("query_scaling", ["log", "static", "adaptive"])
def test_peft_saves_every_parameter_of_the_query_scale(query_scaling: str, tmp_path: Path) -> None:
    base = entmax_model(query_scaling=query_scaling, alpha_learned=True)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, lora(modules_to_save=["query_scale"]))
    saved = [x for name, x in model.named_parameters() if ".query_scale.modules_to_save." in name]
    assert len(saved) == {"log": 2, "static": 3, "adaptive": 5}[query_scaling] * base.config.num_hidden_layers
    with torch.no_grad():
        for x in saved:
            x.add_(0.3)
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits_of(loaded), expected)
    loaded.disable_adapter_layers()
    assert torch.equal(logits_of(loaded), logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "base")))


def test_peft_adapters_keep_their_own_query_scale() -> None:
    base = entmax_model()
    plain = logits_of(base)
    model = get_peft_model(base, lora(modules_to_save=["query_scale"], init_lora_weights=True), adapter_name="first")
    model.add_adapter("second", lora(modules_to_save=["query_scale"], init_lora_weights=True))
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "query_scale.modules_to_save.second" in name:
                x.neg_()
    assert torch.equal(logits_of(model), plain)
    model.set_adapter("second")
    assert not torch.allclose(logits_of(model), plain, **CLOSE)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), plain)
    model.set_adapter("first")
    assert torch.equal(logits_of(model), plain)
