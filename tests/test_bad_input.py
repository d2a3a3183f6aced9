"""Bad input: an error that names the rule and the remedy, and a model and files that are as they were."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers.modeling_utils
from helpers import TOLERANCE, random_tokens, tiny_config
from peft import LoraConfig
from test_patching import FOUND, attention_modules, entmax_model, native_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from hf_asentmax import (
    ASEntmaxConfig,
    ASEntmaxForCausalLM,
    QueryScale,
    entmax_attention,
    patch_model,
    set_alpha,
    unpatch_model,
)
from hf_asentmax.configuration_asentmax import CONFIG_CLASSES
from hf_asentmax.conversion import convert_checkpoint

TOKENS = random_tokens(2, 9)


def snapshot(model: Any) -> dict[str, Any]:
    """Everything of a model that a refused call must leave alone."""
    inner = getattr(model, "_orig_mod", model)
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "configs": {name: id(m.__dict__["config"]) for name, m in model.named_modules() if "config" in m.__dict__},
        "config": inner.config.to_dict() if hasattr(inner, "config") else None,
        "implementation": inner.config._attn_implementation if hasattr(inner, "config") else None,
        "name": getattr(inner, "name_or_path", None),
        "parameters": {name: (id(x), x.detach().clone().tolist()) for name, x in model.named_parameters()},
    }


@contextmanager
def refused(model: Any, error: Any, match: str) -> Iterator[None]:
    """The body raises, and the model is as it was."""
    before = snapshot(model)
    with pytest.raises(error, match=match):
        yield
    assert snapshot(model) == before


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# Settings


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"alpha": 0.99}, "alpha must be between 1 .* and 2 .*, got 0.99; try 1.5"),
        ({"alpha": 2.01}, "alpha must be between 1"),
        ({"alpha": -1}, "alpha must be between 1"),
        ({"alpha": float("nan")}, "alpha must be between 1"),
        ({"alpha": float("inf")}, "alpha must be between 1"),
        ({"alpha": "1.5"}, "alpha must be between 1"),
        ({"alpha": True}, "alpha must be between 1"),
        ({"alpha": torch.tensor(1.5)}, "alpha must be between 1"),
        ({"alpha": [1.5]}, "alpha must be between 1"),
        ({"alpha": 1.0, "alpha_learned": True}, "start between .* learned"),
        ({"alpha": 2.0, "alpha_learned": True}, "start between .* learned"),
        ({"alpha_learned": "yes"}, "alpha_learned"),
        ({"alpha_learned": 1}, "alpha_learned"),
        ({"query_scaling": "asentmax"}, "query_scaling must be one of none, log, static, adaptive, got 'asentmax'"),
        ({"query_scaling": ["log"]}, "query_scaling must be one of"),
        ({"positions": "rotary"}, "positions must be one of rope, nope, alibi, nape, got 'rotary'"),
        ({"positions": None}, "positions must be one of"),
        ({"query_scale_delta": "1"}, "query_scale_delta must be"),
        ({"query_scale_delta": float("nan")}, "query_scale_delta must be"),
        ({"query_scale_gamma_range": 0.0}, "query_scale_gamma_range must be"),
        ({"query_scale_gamma_range": "2"}, "query_scale_gamma_range must be"),
        ({"query_scale_gamma_range": float("nan")}, "query_scale_gamma_range must be"),
        ({"query_scale_gamma_range": float("inf")}, "query_scale_gamma_range must be"),
        ({"query_scale_gamma_center": float("nan")}, "query_scale_gamma_center must be"),
        ({"query_scale_length": 0}, "query_scale_length must be"),
        ({"query_scale_length": 4.5}, "query_scale_length must be"),
        ({"query_scale_length": True}, "query_scale_length must be"),
    ],
    ids=str,
)
def test_bad_setting_is_refused(settings: dict[str, Any], match: str) -> None:
    model = native_model("llama")
    with refused(model, (ValueError, TypeError), match):
        patch_model(model, **settings)
    names = {"alpha": "entmax_alpha", "alpha_learned": "entmax_alpha_learned"}
    sizes = {name: value for name, value in tiny_config("llama").to_dict().items() if name != "model_type"}
    fields = {names.get(name, name): value for name, value in settings.items()}
    with pytest.raises(Exception, match="|".join(fields)):  # Transformers' own type check comes first for some
        ASEntmaxConfig(**sizes, **fields)


def test_bad_setting_name_is_refused() -> None:
    model = native_model("llama")
    with refused(model, TypeError, "temperature"):
        patch_model(model, temperature=1.0)
    with refused(model, TypeError, "positional"):
        patch_model(model, 1.5)


@pytest.mark.parametrize("alpha", [0.5, 2.5, "1.5", None, True, float("nan")], ids=str)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
def test_bad_alpha_in_set_alpha_is_refused(alpha: Any, as_tensor: bool) -> None:
    model = entmax_model()
    with refused(model, (ValueError, TypeError), "alpha must be between 1"):
        set_alpha(model, alpha, as_tensor=as_tensor)


def test_bad_model_for_set_alpha_is_refused() -> None:
    learned = entmax_model(alpha_learned=True)
    with refused(learned, ValueError, "learned"):
        set_alpha(learned, 1.2)
    native = native_model("llama")
    with refused(native, ValueError, "call patch_model first"):
        set_alpha(native, 1.2)


# Models


SOFTCAPPED = "attn_logit_softcapping must be None for ASEntmax, got 50.0; entmax of capped .* fine-tune"
BIDIRECTIONAL = "use_bidirectional_attention must be False for ASEntmax, which is causal, got True"


@pytest.mark.parametrize(
    ("family", "config", "match"),
    [
        ("gemma2", {"attn_logit_softcapping": 50.0}, SOFTCAPPED),
        ("gemma2", {"use_bidirectional_attention": True}, BIDIRECTIONAL),
        ("gemma3_text", {"use_bidirectional_attention": True}, BIDIRECTIONAL),
    ],
)
def test_bad_attention_of_a_family_is_refused(family: str, config: dict[str, Any], match: str, tmp_path: Path) -> None:
    model = native_model(family, **config)
    with refused(model, ValueError, match):
        patch_model(model)
    with pytest.raises(ValueError, match=match):
        CONFIG_CLASSES[family](**config)
    model.save_pretrained(tmp_path / "native")
    with pytest.raises(ValueError, match=match):
        convert_checkpoint(tmp_path / "native", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
    assert CONFIG_CLASSES[family]().attn_logit_softcapping is None


def test_bad_cap_is_gone_where_the_model_is_loaded_without_it(tmp_path: Path) -> None:
    native_model("gemma2", attn_logit_softcapping=50.0).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_logit_softcapping=None)
    expected = model(TOKENS).logits
    patch_model(model, alpha=1.0)
    torch.testing.assert_close(model(TOKENS).logits, expected, **TOLERANCE[torch.float32])


def test_bad_cap_left_in_the_modules_is_refused() -> None:
    """Gemma 2's modules keep the cap that they were built with, whatever becomes of the config."""
    model = native_model("gemma2", attn_logit_softcapping=50.0)
    model.config.attn_logit_softcapping = None
    with pytest.raises(NotImplementedError, match="softcap"):
        patch_model(model)(TOKENS)


def test_bad_family_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=64))
    with refused(model, ValueError, "LlamaForCausalLM.*MistralForCausalLM.*got GPT2LMHeadModel"):
        patch_model(model)
    headed = AutoModelForQuestionAnswering.from_config(tiny_config("llama"))
    with refused(headed, ValueError, "got LlamaForQuestionAnswering"):
        patch_model(headed)

    class Own(LlamaForCausalLM):
        pass

    own = Own(tiny_config("llama"))
    with refused(own, ValueError, "got Own"):
        patch_model(own)


def test_bad_object_is_refused() -> None:
    for thing in (nn.Linear(2, 2), "a/model", None, {}):
        with pytest.raises(TypeError, match=f"Transformers model, got {type(thing).__name__}"):
            patch_model(thing)
        with pytest.raises(TypeError, match="ASEntmax model"):
            unpatch_model(thing)


@pytest.mark.parametrize("family", FOUND)
def test_bad_order_of_patching_is_refused(family: str) -> None:
    model = native_model(family)
    with refused(model, TypeError, "must be an ASEntmax model"):
        unpatch_model(model)
    patch_model(model)
    with refused(model, ValueError, r"call unpatch_model\(model\) first"):
        patch_model(model, alpha=2.0)
    with refused(model, ValueError, r"call unpatch_model\(model\) first"):
        patch_model(model.model)
    unpatch_model(model)
    with refused(model, TypeError, "must be an ASEntmax model"):
        unpatch_model(model)


@pytest.mark.parametrize("wrapper", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel, nn.Sequential])
def test_bad_wrapper_is_refused(wrapper: Any) -> None:
    model = wrapper(native_model("llama"))
    with refused(model, TypeError, "patch it before torch.compile, DDP"):
        patch_model(model)


def test_bad_forward_on_an_instance_is_refused() -> None:
    model = native_model("llama")
    module = attention_modules(model)[1]
    module.forward = MethodType(lambda self, **kwargs: (kwargs["hidden_states"], None), module)
    with refused(model, ValueError, r"layers.1.self_attn.forward must be the class's own.* undo"):
        patch_model(model)
    del module.forward
    patch_model(model)


def test_forward_left_bound_by_a_removed_hook_is_dropped() -> None:
    model = native_model("llama")
    module = attention_modules(model)[1]
    module.forward = MethodType(type(module).forward, module)
    patch_model(model)
    assert "forward" not in module.__dict__
    assert model(random_tokens(1, 5), output_attentions=True).attentions[1].shape == (1, 4, 5, 5)


def test_bad_forward_below_a_hook_is_refused_or_survives() -> None:
    """accelerate's hook hides a forward that was set on the instance before it."""
    import accelerate

    model = native_model("llama")
    module = attention_modules(model)[1]
    module.forward = lambda **kwargs: (torch.zeros_like(kwargs["hidden_states"]), None)
    accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    with refused(model, ValueError, r"layers.1.self_attn.forward must be the class's own"):
        patch_model(model)


def test_bad_number_of_attention_modules_is_refused() -> None:
    class Other(nn.Module):
        pass

    model = native_model("llama")
    model.model.layers[1].self_attn = Other()
    with refused(model, ValueError, "one attention module a layer .2., found 1"):
        patch_model(model)
    replaced = native_model("llama")

    class OtherAttention(type(attention_modules(replaced)[0])):  # type: ignore[misc]
        pass

    attention_modules(replaced)[0].__class__ = OtherAttention
    with refused(replaced, ValueError, "found 1 to replace; another package"):
        patch_model(replaced)


def test_bad_failure_within_patching_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory for the new parameters, say, at the second layer."""
    model, made = native_model("llama"), []
    original = QueryScale.__init__

    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        if len(made) == 2:
            raise RuntimeError("out of memory")
        original(self, *args, **kwargs)

    monkeypatch.setattr(QueryScale, "__init__", fail)
    with refused(model, RuntimeError, "out of memory"):
        patch_model(model)


def test_bad_head_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="divisor of 4"):
        entmax_attention(torch.randn(1, 4, 5, 8), torch.randn(1, 3, 5, 8), torch.randn(1, 3, 5, 8))
    with pytest.raises(ValueError, match="heads|divisor"):
        entmax_model(config={"num_key_value_heads": 3})(TOKENS)
    with pytest.raises(Exception, match="not a multiple of the number of attention heads"):  # Transformers' own
        entmax_model(config={"num_attention_heads": 5})


# Checkpoints


def test_bad_shapes_in_a_checkpoint_are_refused(tmp_path: Path) -> None:
    """Transformers tells which weights in its report, and refuses."""
    entmax_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 8}), encoding="utf-8")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: b"\xff" * 50 + data[50:],
        lambda data: data + b"more",
    ],
    ids=["half", "stump", "empty", "header", "longer"],
)
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_bad_weight_file_is_named(damage: Any, sharded: bool, tmp_path: Path) -> None:
    entmax_model().save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    file.write_bytes(damage(file.read_bytes()))
    before = files_of(tmp_path)
    with pytest.raises(Exception, match=file.name):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert files_of(tmp_path) == before


def test_bad_missing_files_are_named(tmp_path: Path) -> None:
    entmax_model().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(Exception, match=shard.name):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "asentmax', encoding="utf-8")
    with pytest.raises(OSError, match="config.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "edit",
    [
        {"entmax_alpha": 3},
        {"entmax_alpha": "1.5"},
        {"entmax_alpha_learned": "yes"},
        {"query_scaling": "fast"},
        {"positions": "xpos"},
        {"query_scale_delta": "1"},
        {"query_scale_gamma_range": -1},
        {"query_scale_length": "long"},
        {"model_type": "asentmax_gpt2", "auto_map": {}},
    ],
    ids=str,
)
def test_bad_config_file_is_refused(edit: dict[str, Any], tmp_path: Path) -> None:
    entmax_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | edit), encoding="utf-8")
    with pytest.raises(Exception, match=next(iter(edit)).replace("_", "[_ ]")):
        AutoConfig.from_pretrained(tmp_path)


# Interrupted saves


class Killed(BaseException):
    """Not an Exception, as an interrupt from the keyboard isn't."""


def writers() -> list[tuple[Any, str]]:
    """Where safetensors' writer can be reached under the names that Transformers uses."""
    places = [(safetensors.torch, "save_file")]
    places += [(transformers.modeling_utils, n) for n in ("safe_save_file",) if hasattr(transformers.modeling_utils, n)]
    return places


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_bad_interrupted_save_keeps_the_former_checkpoint(
    sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = entmax_model(alpha=1.2)
    size = "20KB" if sharded else "1GB"
    model.save_pretrained(tmp_path, max_shard_size=size)
    before = files_of(tmp_path)
    with torch.no_grad():
        expected = model(TOKENS).logits
        for parameter in model.parameters():
            parameter.add_(0.1)
    set_alpha(model, 1.8)

    def cut(tensors: Any, filename: Any, metadata: Any = None) -> None:
        Path(filename).write_bytes(b"half of it")
        raise Killed

    with monkeypatch.context() as patch:
        for module, name in writers():
            patch.setattr(module, name, cut)
        with pytest.raises(Killed):
            model.save_pretrained(tmp_path, max_shard_size=size)
    after = files_of(tmp_path)
    assert [name for name, content in before.items() if after.get(name) != content] == []
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(TOKENS).logits, expected)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.entmax_alpha == 1.8


def test_bad_interrupted_first_save_leaves_nothing_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(tensors: Any, filename: Any, metadata: Any = None) -> None:
        Path(filename).write_bytes(b"half of it")
        raise Killed

    model = entmax_model()
    model.config.architectures = [type(model).__name__]  # which every save notes first
    before = snapshot(model)
    with monkeypatch.context() as patch:
        for module, name in writers():
            patch.setattr(module, name, cut)
        with pytest.raises(Killed):
            model.save_pretrained(tmp_path / "model")
    assert snapshot(model) == before
    with pytest.raises(Exception, match="model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_bad_save_beside_a_checkpoint_keeps_its_weights(tmp_path: Path) -> None:
    """What a save doesn't write anew is not its own to remove: only shards that the new weights replace are."""
    model = entmax_model()
    model.save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    model.save_pretrained(tmp_path, is_main_process=False)
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    model.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "model.fp16.safetensors").is_file()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert (tmp_path / "model.safetensors").read_bytes() == weights


def test_bad_save_over_other_shards_leaves_one_checkpoint(tmp_path: Path) -> None:
    model = entmax_model()
    for size in ("20KB", "40KB", "1GB", "20KB"):
        model.save_pretrained(tmp_path, max_shard_size=size)
        names = {file.name for file in tmp_path.glob("*.safetensors*")}
        assert ("model.safetensors" in names) == (size == "1GB")
        assert len({name.split("-of-")[-1] for name in names if "-of-" in name}) == (size != "1GB")
        with torch.no_grad():
            again = AutoModelForCausalLM.from_pretrained(tmp_path)
            assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert not [file for file in tmp_path.parent.iterdir() if file.name.startswith(f".{tmp_path.name}")]
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_bad_save_works_where_the_folder_is_a_disk_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mounted volume: no file can be renamed into it from beside it."""
    target, rename = tmp_path / "volume", os.replace
    target.mkdir()

    def replace(source: Any, destination: Any, **kwargs: Any) -> None:
        if (target in Path(source).parents) != (target in Path(destination).parents):
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))
        rename(source, destination, **kwargs)

    model = entmax_model()
    with monkeypatch.context() as patch:
        for name in ("replace", "rename"):
            patch.setattr(os, name, replace)
        model.save_pretrained(target)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(target)
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_bad_save_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    model = entmax_model()
    with refused(model, (OSError, AssertionError, ValueError), "file"):
        model.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_bad_constructor_arguments_are_refused() -> None:
    sizes = {name: value for name, value in tiny_config("llama").to_dict().items() if name != "model_type"}
    with pytest.raises(ValueError, match="attention_dropout must be 0"):
        ASEntmaxConfig(**sizes | {"attention_dropout": 0.2})
    with pytest.raises(ValueError, match='attn_implementation must be "asentmax"'):
        ASEntmaxForCausalLM(ASEntmaxConfig(**sizes, attn_implementation="sdpa"))
