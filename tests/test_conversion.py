"""Conversion on disk: the same as patch_model and save_pretrained, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import FAMILIES, random_tokens, tiny_config, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)

import hf_asentmax
from hf_asentmax import conversion, patch_model
from hf_asentmax.conversion import convert_checkpoint

TOKENS = random_tokens(2, 12)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def assert_same_checkpoint(converted: Path, expected: Path) -> None:
    ours, theirs = read_tensors(converted), read_tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name
    assert read_json(converted / "config.json") == read_json(expected / "config.json")
    code = next(expected.glob("modeling_asentmax_*.py")).name
    assert (converted / code).read_bytes() == (expected / code).read_bytes()


@pytest.mark.parametrize("size", ["1GB", "20KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("family", FAMILIES)
def test_conversion_equals_patching(family: str, size: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "native", max_shard_size=size)
    convert_checkpoint(tmp_path / "native", tmp_path / "converted")
    patched = patch_model(AutoModelForCausalLM.from_pretrained(tmp_path / "native"))
    patched.save_pretrained(tmp_path / "patched")
    assert_same_checkpoint(tmp_path / "converted", tmp_path / "patched")
    names = {path.name for path in (tmp_path / "native").glob("*.safetensors*")}
    assert {path.name for path in (tmp_path / "converted").glob("*.safetensors*")} == names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").eval()
    assert type(loaded) is type(patched)
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, patched.eval()(TOKENS).logits, rtol=0, atol=0)


def test_conversion_starts_neutral(tmp_path: Path) -> None:
    native = tiny_model("llama")
    native.save_pretrained(tmp_path / "native")
    convert_checkpoint(tmp_path / "native", tmp_path / "converted", alpha=1.0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").eval()
    added = {name: p for name, p in loaded.named_parameters() if ".query_scale." in name}
    assert len(added) == 4 * native.config.num_hidden_layers
    assert not any(parameter.any() for parameter in added.values())
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, native(TOKENS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"query_scaling": "none", "alpha": 1.0},
        {"query_scaling": "log", "query_scale_length": 64},
        {"query_scaling": "static", "positions": "nape"},
        {"alpha": 1.3, "alpha_learned": True, "query_scale_delta": 1.0, "query_scale_gamma_range": 1.0},
    ],
    ids=str,
)
def test_conversion_honours_every_setting(settings: dict[str, Any], tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path / "native", max_shard_size="20KB")
    convert_checkpoint(tmp_path / "native", tmp_path / "converted", **settings)
    patched = patch_model(AutoModelForCausalLM.from_pretrained(tmp_path / "native"), **settings)
    patched.save_pretrained(tmp_path / "patched")
    assert_same_checkpoint(tmp_path / "converted", tmp_path / "patched")


@pytest.mark.parametrize(
    "auto",
    [AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification],
    ids=["base", "classifier", "tagger"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversion_keeps_class_and_dtype(auto: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    auto.from_config(tiny_config("mistral"), dtype=dtype).save_pretrained(tmp_path / "native")
    convert_checkpoint(tmp_path / "native", tmp_path / "converted")
    patched = patch_model(auto.from_pretrained(tmp_path / "native"))
    patched.save_pretrained(tmp_path / "patched")
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "converted").values()} == {dtype}
    assert_same_checkpoint(tmp_path / "converted", tmp_path / "patched")
    assert type(auto.from_pretrained(tmp_path / "converted")) is type(patched)


def test_conversion_takes_tied_weights_and_leaves_strangers_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    native = tmp_path / "native"
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(native)
    tensors = load_file(native / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)
    save_file(tensors, native / "model.safetensors")  # as old checkpoints are: without the format's mark, too
    convert_checkpoint(native, tmp_path / "converted")
    converted = read_tensors(tmp_path / "converted")
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in converted
    patched = patch_model(model).eval()
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").eval()
        torch.testing.assert_close(loaded(TOKENS).logits, patched(TOKENS).logits, rtol=0, atol=0)


def test_conversion_writes_aligned_files(tmp_path: Path) -> None:
    native = tmp_path / "native"
    tiny_model("llama").save_pretrained(native)
    tensors = {name: t.to(torch.bfloat16) for name, t in load_file(native / "model.safetensors").items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()  # a mixture, as some checkpoints are
    save_file(tensors, native / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(native, tmp_path / "converted")
    with safe_open(tmp_path / "converted" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
        assert (tmp_path / "converted" / "model.safetensors").read_bytes()[8] == ord("{")


def test_conversion_never_holds_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "native", max_shard_size="20KB")
    devices = set()
    patch = conversion.patch_model

    def watched(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
        devices.update(parameter.device.type for parameter in model.parameters())
        return patch(model, **settings)

    monkeypatch.setattr(conversion, "patch_model", watched)
    monkeypatch.setattr(conversion, "_COPY_BYTES", 1000)  # several pieces a tensor
    convert_checkpoint(tmp_path / "native", tmp_path / "converted")
    assert devices == {"meta"}
    native, converted = read_tensors(tmp_path / "native"), read_tensors(tmp_path / "converted")
    assert all(torch.equal(tensor, converted[name]) for name, tensor in native.items())


def test_conversion_takes_companions_and_not_the_card(tmp_path: Path) -> None:
    native = tmp_path / "native"
    tiny_model("llama").save_pretrained(native)
    companions = [
        "tokenizer.json",
        "tokenizer_config.json",
        "merges.txt",
        "spiece.model",
        "chat_template.jinja",
        "LICENSE",
    ]
    others = ["README.md", "pytorch_model.bin", "consolidated.00.pth", "model.gguf", ".gitattributes"]
    for name in [*companions, *others]:
        (native / name).write_bytes(name.encode())
    (native / "additional_chat_templates").mkdir()
    (native / "additional_chat_templates" / "tool.jinja").write_bytes(b"tool")
    convert_checkpoint(native, tmp_path / "converted")
    for name in companions:
        assert (tmp_path / "converted" / name).read_bytes() == name.encode()
    assert (tmp_path / "converted" / "additional_chat_templates" / "tool.jinja").read_bytes() == b"tool"
    assert (tmp_path / "converted" / "generation_config.json").is_file()
    assert not [name for name in others if (tmp_path / "converted" / name).exists()]


@pytest.mark.parametrize("when", ["first", "last"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError], ids=lambda error: error.__name__)
def test_an_interrupted_conversion_leaves_nothing(
    error: type[BaseException], when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "native", max_shard_size="20KB")
    write, calls = conversion._write_file, []
    files = len(list((tmp_path / "native").glob("*.safetensors")))

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == (1 if when == "first" else files):
            raise error("interrupted")
        return write(*args)

    monkeypatch.setattr(conversion, "_write_file", interrupted)
    with pytest.raises(error, match="interrupted"):
        convert_checkpoint(tmp_path / "native", tmp_path / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["native"]
    monkeypatch.setattr(conversion, "_write_file", write)
    convert_checkpoint(tmp_path / "native", tmp_path / "converted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "native"]


def test_conversion_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "native")
    left = tmp_path / ".converted.unfinished"
    left.mkdir()
    (left / "model-00009-of-00009.safetensors").write_bytes(b"half")
    (tmp_path / "converted").mkdir()  # an empty target is fine
    convert_checkpoint(tmp_path / "native", tmp_path / "converted")
    assert not left.exists()
    assert not (tmp_path / "converted" / "model-00009-of-00009.safetensors").exists()


def test_converted_checkpoint_is_of_the_package(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "native")
    path = convert_checkpoint(tmp_path / "native", tmp_path / "deep" / "converted")
    config = read_json(path / "config.json")
    assert config["attn_implementation"] == "asentmax"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_asentmax_llama.ASEntmaxLlamaForCausalLM"
    assert config["architectures"] == ["ASEntmaxLlamaForCausalLM"]
    assert isinstance(AutoModelForCausalLM.from_pretrained(path), hf_asentmax.ASEntmaxForCausalLM)


def test_converted_tokenizer_is_that_of_the_source(tmp_path: Path) -> None:
    """OLMo 2 loads its tokenizer.json as it is, whatever class tokenizer_config.json names."""
    source = tmp_path / "native"
    tiny_model("olmo2").save_pretrained(source)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the fox 1234567 jumps 1234567"] * 20, trainer)
    tokenizer.save(str(source / "tokenizer.json"))
    named = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (source / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    convert_checkpoint(source, tmp_path / "converted")
    assert (tmp_path / "converted" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    text = "the fox 1234567"
    expected = AutoTokenizer.from_pretrained(source).tokenize(text)
    assert expected[-7:] == list("1234567")
    assert AutoTokenizer.from_pretrained(tmp_path / "converted").tokenize(text) == expected


def test_tokenizer_that_does_not_load_is_copied_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "native")
    (tmp_path / "native" / "tokenizer_config.json").write_text('{"tokenizer_class": "Unheard"}', encoding="utf-8")
    transformers.utils.logging.enable_propagation()
    convert_checkpoint(tmp_path / "native", tmp_path / "converted")
    transformers.utils.logging.disable_propagation()
    assert "is copied unseen" in caplog.text
    assert read_json(tmp_path / "converted" / "tokenizer_config.json") == {"tokenizer_class": "Unheard"}
