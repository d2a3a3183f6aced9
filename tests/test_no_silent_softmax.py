"""No silent softmax: every way round the query scale either computes entmax or raises; and no false alarm.

The scales are random, so that a softmax in their place, or an entmax without them, shows in the logits.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from accelerate.hooks import remove_hook_from_module
from helpers import CLASSES, TOLERANCE, random_tokens
from peft import AutoPeftModelForCausalLM, LoraConfig, PromptTuningConfig, get_peft_model
from test_patching import FOUND, attention_modules, entmax_model, native_model, randomize_scale
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from hf_asentmax import patch_model, set_alpha, unpatch_model

CLOSE = TOLERANCE[torch.float32]
TOKENS = random_tokens(2, 13)
OTHERS = ("sdpa", "eager", "flash_attention_2", "flex_attention")
PLACES = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    entmax_model().save_pretrained(tmp_path / "entmax")
    return tmp_path / "entmax"


@pytest.fixture
def softmax_folder(tmp_path: Path) -> Path:
    native_model("llama").save_pretrained(tmp_path / "softmax")
    return tmp_path / "softmax"


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model.eval()(TOKENS).logits


@torch.no_grad()
def raises_or_equals(build: Callable[[], Any], expected: torch.Tensor, match: str = "asentmax|ASEntmax") -> None:
    """Building the model or running it raises an error that matches, or the logits are those of entmax."""
    try:
        found = logits_of(build())
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        refusal = str(error)
    else:
        torch.testing.assert_close(found, expected, **CLOSE)
        return
    assert re.search(match, refusal), refusal


def native_class(family: str, auto: Any) -> Any:
    config = AutoConfig.for_model(family)
    return auto._model_mapping[type(config)]


# Reloads and classes


@pytest.mark.parametrize("family", FOUND)
def test_softmax_plain_reload_computes_entmax(family: str, tmp_path: Path) -> None:
    model = entmax_model(family)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(model))


@pytest.mark.parametrize(("family", "auto"), CLASSES)
@torch.no_grad()
def test_softmax_native_class_on_our_folder_raises(family: str, auto: Any, tmp_path: Path) -> None:
    entmax_model(family).save_pretrained(tmp_path)
    model = native_class(family, auto).from_pretrained(tmp_path)
    for run in (lambda: model(TOKENS), lambda: model.train()(TOKENS, use_cache=False), lambda: model(TOKENS[:, :1])):
        with pytest.raises(RuntimeError, match="must be used by an ASEntmax model"):
            run()


@pytest.mark.parametrize("name", OTHERS)
def test_softmax_other_implementations_raise_at_load(name: str, saved: Path) -> None:
    config = AutoConfig.from_pretrained(saved)
    for load in (
        lambda: AutoModelForCausalLM.from_pretrained(saved, attn_implementation=name),
        lambda: AutoModelForCausalLM.from_pretrained(saved, attn_implementation={"": name}),
        lambda: AutoModel.from_pretrained(saved, attn_implementation=name),
        lambda: AutoModelForSequenceClassification.from_pretrained(saved, attn_implementation=name),
        lambda: AutoModelForTokenClassification.from_pretrained(saved, attn_implementation=name),
        lambda: AutoModelForCausalLM.from_config(config, attn_implementation=name),
        lambda: AutoModelForCausalLM.from_pretrained(
            saved, config=AutoConfig.from_pretrained(saved, attn_implementation=name)
        ),
    ):
        with pytest.raises(ValueError, match='attn_implementation must be "asentmax"'):
            load()


@pytest.mark.parametrize("name", OTHERS)
def test_softmax_set_attn_implementation_raises(name: str) -> None:
    model = entmax_model()
    expected = logits_of(model)
    for part in (model, model.model):
        for value in (name, {"": name}):
            with pytest.raises(ValueError, match='attn_implementation must be "asentmax"'):
                part.set_attn_implementation(value)
    assert model.config._attn_implementation == "asentmax"
    model.set_attn_implementation("asentmax")
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2", None])
@pytest.mark.parametrize("where", ["_attn_implementation", "_attn_implementation_internal"])
@torch.no_grad()
def test_softmax_implementation_edited_by_hand_raises(name: str | None, where: str) -> None:
    model = entmax_model()
    setattr(model.config, where, name)
    for run in (
        lambda: model(TOKENS),
        lambda: model(TOKENS[:, :1]),
        lambda: model.generate(TOKENS, max_new_tokens=2),
    ):
        with pytest.raises((RuntimeError, ValueError, ImportError), match="asentmax|flash"):
            run()


@torch.no_grad()
def test_softmax_implementation_edited_after_compiling_raises() -> None:
    model = entmax_model(config={"num_hidden_layers": 1})
    compiled = torch.compile(model, backend="eager")
    compiled(TOKENS)
    model.config._attn_implementation = "sdpa"
    with pytest.raises(RuntimeError, match='attn_implementation must be "asentmax"'):
        compiled(TOKENS)


@pytest.mark.parametrize(
    "edit",
    [
        {"attn_implementation": "sdpa"},
        {"_attn_implementation": "eager"},
        {"attn_implementation": None},
        {"attn_implementation": ""},
        {"_attn_implementation_internal": "sdpa"},
        {"model_type": "llama"},
        {"model_type": "mistral"},
        {"model_type": "llama", "auto_map": {}},
        {"is_causal": False},
        {"attention_dropout": 0.1},
    ],
    ids=str,
)
def test_softmax_edited_config_file(edit: dict[str, Any], saved: Path) -> None:
    expected = logits_of(AutoModelForCausalLM.from_pretrained(saved))
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    (saved / "config.json").write_text(json.dumps(config | edit), encoding="utf-8")
    raises_or_equals(lambda: AutoModelForCausalLM.from_pretrained(saved), expected, "asentmax|ASEntmax|causal")


@pytest.mark.parametrize("family", FOUND)
@torch.no_grad()
def test_softmax_model_told_to_use_our_name_raises(family: str) -> None:
    for model in (
        AutoModelForCausalLM.from_config(native_model(family).config, attn_implementation="asentmax"),
        GPT2LMHeadModel._from_config(
            GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=64), attn_implementation="asentmax"
        ),
    ):
        with pytest.raises(RuntimeError, match="convert a softmax model with patch_model"):
            model(TOKENS)
    switched = native_model(family)
    switched.set_attn_implementation("asentmax")
    with pytest.raises(RuntimeError, match="convert a softmax model with patch_model"):
        switched(TOKENS)


def test_softmax_models_in_the_same_process_stay_softmax() -> None:
    for family in FOUND:
        native, gpt = native_model(family), GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=64))
        before, other = logits_of(native), logits_of(gpt)
        implementation = native.config._attn_implementation
        patched = entmax_model(family)
        logits_of(patched)
        assert torch.equal(logits_of(native), before)
        assert torch.equal(logits_of(gpt), other)
        assert native.config._attn_implementation == implementation != "asentmax"
        assert torch.equal(logits_of(native_model(family)), before)


@torch.no_grad()
def test_softmax_class_forward_on_a_patched_module_raises() -> None:
    model = entmax_model()
    module = attention_modules(model)[0]
    module.forward = type(module).__bases__[-1].forward.__get__(module)
    with pytest.raises(RuntimeError, match="must be called through its own forward"):
        model(TOKENS)


# Arguments of the call


@pytest.mark.parametrize("family", FOUND)
@torch.no_grad()
def test_softmax_custom_masks_raise(family: str) -> None:
    model = entmax_model(family)
    causal = torch.ones(2, 1, 13, 13, dtype=torch.bool).tril()
    for mask in (causal, causal.float().log(), causal.long(), causal.int(), causal.expand(2, 4, 13, 13)):
        with pytest.raises(ValueError, match="4-D masks of your own are not supported"):
            model(TOKENS, attention_mask=mask)
    hole = torch.ones_like(TOKENS)
    hole[0, 4] = 0
    with pytest.raises(ValueError, match="hole"):
        model(TOKENS, attention_mask=hole)


@torch.no_grad()
def test_softmax_mask_with_a_hole_raises_while_decoding() -> None:
    model = entmax_model()
    cache = model(TOKENS[:, :12]).past_key_values
    hole = torch.ones_like(TOKENS)
    hole[0, 4] = 0
    with pytest.raises(ValueError, match="hole"):
        model(TOKENS[:, 12:], attention_mask=hole, past_key_values=cache)


def test_softmax_dropout_raises() -> None:
    with pytest.raises(ValueError, match="attention_dropout must be 0"):
        patch_model(native_model("llama", attention_dropout=0.1))
    model = entmax_model().train()
    for module in attention_modules(model):
        module.attention_dropout = 0.1
    with pytest.raises(NotImplementedError, match="attention dropout"):
        model(TOKENS)


@pytest.mark.parametrize(
    "argument",
    [
        {"softcap": 30.0},
        {"s_aux": torch.zeros(4)},
        {"head_mask": torch.zeros(2, 4)},
        {"position_bias": torch.zeros(1)},
        {"made_up": 0},
        {"is_causal": False},
        {"sliding_window": 2},
    ],
    ids=lambda argument: next(iter(argument)),
)
@torch.no_grad()
def test_softmax_arguments_that_mean_something_raise(argument: dict[str, Any]) -> None:
    with pytest.raises((NotImplementedError, TypeError, ValueError), match=f"{next(iter(argument))}|causal"):
        entmax_model()(TOKENS, **argument)


@torch.no_grad()
def test_softmax_harmless_arguments_change_nothing() -> None:
    for family in FOUND:
        model = entmax_model(family)
        expected = logits_of(model)
        for argument in (
            {"labels": TOKENS},
            {"attention_mask": torch.ones_like(TOKENS)},
            {"attention_mask": torch.ones_like(TOKENS).float()},
            {"attention_mask": torch.ones_like(TOKENS).bool()},
            {"position_ids": torch.arange(13)[None]},
            {"cache_position": torch.arange(13)},
            {"num_items_in_batch": torch.tensor(26), "labels": TOKENS},
            {"output_hidden_states": True},
            {"output_attentions": True},
            {"return_dict": True},
            {"use_cache": False},
            {"logits_to_keep": 0},
            {"made_up": None},
        ):
            torch.testing.assert_close(model(TOKENS, **argument).logits, expected, **CLOSE)


# Accelerate: hooks hold on to the forward of the class that a module had


def dispatched(model: Any, folder: Path) -> Any:
    return accelerate.dispatch_model(model, PLACES, main_device="cpu", offload_dir=str(folder), force_hooks=True)


HOOKS: dict[str, Callable[[Any, Path], Any]] = {
    "dispatch-disk": dispatched,
    "dispatch-cpu": lambda model, _: accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True),
    "cpu-offload": lambda model, _: accelerate.cpu_offload(model, torch.device("cpu")) or model,
    "cpu-offload-buffers": lambda model, _: (
        accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True) or model
    ),
    "disk-offload": lambda model, folder: accelerate.disk_offload(model, str(folder), torch.device("cpu")) or model,
}


@pytest.fixture(params=HOOKS)
def add_hooks(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Any], Any]:
    return lambda model: HOOKS[request.param](model, tmp_path / "offload")


def test_softmax_hooks_on_a_patched_model_change_nothing(add_hooks: Callable[[Any], Any]) -> None:
    torch.testing.assert_close(logits_of(add_hooks(entmax_model())), logits_of(entmax_model()), **CLOSE)


def test_softmax_hooked_model_can_be_patched(add_hooks: Callable[[Any], Any]) -> None:
    model = randomize_scale(patch_model(add_hooks(native_model("llama"))))
    torch.testing.assert_close(logits_of(model), logits_of(entmax_model()), **CLOSE)
    assert all(hasattr(part, "_hf_hook") for part in (model.model.layers[0].mlp.up_proj,))


def test_softmax_hooked_model_can_be_unpatched(add_hooks: Callable[[Any], Any]) -> None:
    expected = logits_of(native_model("llama"))
    model = unpatch_model(add_hooks(patch_model(native_model("llama"))))
    torch.testing.assert_close(logits_of(model), expected, **CLOSE)


def test_softmax_patch_and_unpatch_keep_hooks_working(add_hooks: Callable[[Any], Any]) -> None:
    model = add_hooks(native_model("llama"))
    expected = logits_of(model)
    unpatch_model(patch_model(model))
    torch.testing.assert_close(logits_of(model), expected, **CLOSE)


def test_softmax_patched_model_outlives_its_hooks() -> None:
    model = accelerate.dispatch_model(native_model("llama"), {"": "cpu"}, main_device="cpu", force_hooks=True)
    randomize_scale(patch_model(model))
    remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(logits_of(model), logits_of(entmax_model()), **CLOSE)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, PLACES], ids=["auto", "cpu", "whole", "disk"])
def test_softmax_device_map_computes_entmax(device_map: Any, saved: Path, softmax_folder: Path, tmp_path: Path) -> None:
    expected = logits_of(entmax_model())
    options = {"device_map": device_map, "offload_folder": str(tmp_path / "offload")}
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(saved, **options)), expected)
    softmax = AutoModelForCausalLM.from_pretrained(softmax_folder, **options)
    torch.testing.assert_close(logits_of(randomize_scale(patch_model(softmax))), expected, **CLOSE)


def test_softmax_low_memory_loads_compute_entmax(saved: Path, tmp_path: Path) -> None:
    expected = logits_of(entmax_model())
    for device_map in ({"": "cpu"}, PLACES):
        with accelerate.init_empty_weights():
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(saved))
        model = accelerate.load_checkpoint_and_dispatch(
            empty, str(saved), device_map=device_map, offload_folder=str(tmp_path / "offload")
        )
        assert torch.equal(logits_of(model), expected)
    with torch.device("meta"):
        native = AutoModelForCausalLM.from_config(native_model("llama").config)
    patch_model(native)
    assert {parameter.device.type for parameter in native.parameters()} == {"meta"}
    native.load_state_dict(entmax_model().state_dict(), assign=True)
    native.model.rotary_emb = copy.deepcopy(entmax_model().model.rotary_emb)
    assert torch.equal(logits_of(native), expected)


# Adapters


def lora(**settings: Any) -> LoraConfig:
    options = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return LoraConfig(**(options | settings))


def base_named_in(folder: Path) -> Any:
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]


@pytest.mark.parametrize("through", ["get_peft_model", "add_adapter"])
def test_softmax_adapter_of_a_base_never_saved_raises(through: str, softmax_folder: Path, tmp_path: Path) -> None:
    """Saved, it would name no base, or the softmax one."""
    model = patch_model(AutoModelForCausalLM.from_pretrained(softmax_folder))
    if through == "add_adapter":
        model.add_adapter(lora())
    else:
        model = get_peft_model(model, lora())
    with pytest.raises(RuntimeError, match="save_pretrained"):
        model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("adapter_*"))
    assert not getattr(model, "name_or_path", "")


@pytest.mark.parametrize("family", FOUND)
def test_softmax_adapter_names_the_converted_base(family: str, tmp_path: Path) -> None:
    native_model(family).save_pretrained(tmp_path / "softmax")
    base = randomize_scale(patch_model(AutoModelForCausalLM.from_pretrained(tmp_path / "softmax")))
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, lora(target_modules="all-linear", modules_to_save=["query_scale"]))
    scales = [x for name, x in model.named_parameters() if "modules_to_save" in name]
    assert scales
    assert all(x.requires_grad for x in scales)
    optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=1.0)
    before = [x.clone() for x in scales]
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    assert not any(map(torch.equal, before, scales))
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "adapter")
    assert base_named_in(tmp_path / "adapter") == str(tmp_path / "base")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(again.get_base_model()) is type(base)
    assert torch.equal(logits_of(again), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), expected, **CLOSE)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits_of(merged))


@pytest.mark.parametrize("modules_to_save", [None, ["query_scale"]], ids=["scale-kept", "scale-trained"])
def test_softmax_adapter_on_all_linear_layers_reloads(modules_to_save: list[str] | None, tmp_path: Path) -> None:
    base = entmax_model(alpha_learned=True)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, lora(target_modules="all-linear", modules_to_save=modules_to_save))
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(x.grad is not None for x in model.parameters() if x.requires_grad)
    trained = any(".query_scale." in name for name, x in model.named_parameters() if x.requires_grad)
    assert trained == (modules_to_save is not None)
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    torch.testing.assert_close(logits_of(model.merge_and_unload()), expected, **CLOSE)


def test_softmax_adapter_saved_after_alpha_moved_loads_what_was_trained(tmp_path: Path) -> None:
    """An alpha schedule from softmax on: the base was saved at 1, the adapter was trained at 1.7."""
    base = entmax_model(alpha=1.0)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, lora())
    set_alpha(model, 1.7)
    expected = logits_of(model)

    def build() -> Any:
        model.save_pretrained(tmp_path / "adapter")
        return AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")

    raises_or_equals(build, expected, "alpha")


def test_softmax_adapter_names_the_base_that_was_saved_last(tmp_path: Path) -> None:
    base = entmax_model(alpha=1.0)
    base.save_pretrained(tmp_path / "softmax-start")
    set_alpha(base, 1.7)
    base.save_pretrained(tmp_path / "trained")
    get_peft_model(base, lora()).save_pretrained(tmp_path / "adapter")
    assert base_named_in(tmp_path / "adapter") == str(tmp_path / "trained")


def test_softmax_patch_of_an_adapted_model_raises() -> None:
    wrapped = get_peft_model(native_model("llama"), lora())
    adapted = native_model("llama")
    adapted.add_adapter(lora())
    for model in (wrapped, wrapped.get_base_model(), adapted):
        expected = logits_of(model)
        with pytest.raises(TypeError, match="must be patched before PEFT wraps it"):
            patch_model(model)
        assert torch.equal(logits_of(model), expected)
        with pytest.raises(TypeError, match="without adapters"):
            unpatch_model(model)


def test_softmax_patch_inside_an_adapted_model_raises_or_saves_no_softmax(softmax_folder: Path, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(softmax_folder), lora())

    def build() -> Any:
        randomize_scale(patch_model(model.get_base_model().model))
        model.save_pretrained(tmp_path / "adapter")
        return AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")

    try:
        again = build()
    except (TypeError, ValueError, RuntimeError):
        return
    torch.testing.assert_close(logits_of(again), logits_of(model), **CLOSE)


def test_softmax_prompt_tuning_computes_entmax() -> None:
    model = get_peft_model(entmax_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    base = model.get_base_model()
    prompt = model.get_prompt(batch_size=2)
    with torch.no_grad():
        expected = base(inputs_embeds=torch.cat([prompt, base.get_input_embeddings()(TOKENS)], 1)).logits
        torch.testing.assert_close(model(TOKENS).logits, expected, **CLOSE)


# What engines read


def test_softmax_wrappers_of_torch_compute_entmax() -> None:
    expected = logits_of(entmax_model())
    assert torch.equal(nn.DataParallel(entmax_model())(TOKENS).logits.detach(), expected)
    transformers.set_seed(0)
    model = entmax_model()
    with torch.inference_mode():
        assert torch.equal(model(TOKENS).logits, expected)
    assert torch.equal(torch.func.functional_call(model, dict(model.named_parameters()), (TOKENS,)).logits, expected)
