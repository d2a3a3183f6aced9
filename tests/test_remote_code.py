"""The generated modeling files: what is in them, and that a checkpoint loads by them alone."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from clean_environment import run_clean
from helpers import CLASSES, FAMILIES, auto_classes, random_tokens, tiny_config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import hf_asentmax
from hf_asentmax import patch_model
from hf_asentmax.hub import generate_modeling


@pytest.mark.parametrize("family", FAMILIES)
def test_modeling_is_the_same_each_time_and_compiles(family: str) -> None:
    text = generate_modeling(family)
    assert generate_modeling.__wrapped__(family) == text  # not from the cache
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    names = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    others = [other for other in FAMILIES if other != family]
    assert not [name for name in names if any(other.replace("_", "") in name.lower() for other in others)]
    assert text.startswith("# Copyright")
    assert f"Generated from hf_asentmax {hf_asentmax.__version__}, do not edit" in text


def test_modeling_namespaces_differ() -> None:
    namespaces = {
        name for family in FAMILIES for name in re.findall(r'OP_NAMESPACE = "(.*)"', generate_modeling(family))
    }
    assert len(namespaces) == len(FAMILIES)
    assert all(re.fullmatch(r"hf_asentmax_[0-9a-f]{8}", namespace) for namespace in namespaces)


def test_modeling_of_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="family must be one of llama.*got 'gpt2'"):
        generate_modeling("gpt2")


TOKENS = random_tokens(2, 12)
Loaded = tuple[Path, dict[str, dict[str, Any]]]


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """The model as ASEntmax, with scale parameters that change what it computes."""
    patch_model(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".query_scale." in name:
                parameter.normal_(std=0.3)
    return model.eval()


def save_tokenizer(folder: Path) -> None:
    vocabulary = {"<pad>": 0, "</s>": 1, "<s>": 2} | {f"w{number}": number for number in range(3, 64)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>")
    fast.save_pretrained(folder)


CLEAN_LOAD = """
from pathlib import Path
import torch
import transformers
from transformers import AutoModelForCausalLM, pipeline

folder = Path(sys.argv[1])
tokens = torch.load(folder / "tokens.pt")
out = {}
with torch.no_grad():
    for family in sys.argv[2:]:
        causal, again = folder / family / "AutoModelForCausalLM", folder / family / "again"
        generate = pipeline("text-generation", model=str(causal), trust_remote_code=True)
        model = generate.model.eval()
        assert model.config.model_type == f"asentmax_{family}", model.config.model_type
        assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
        text = generate("w5 w6 w7", max_new_tokens=4, do_sample=False)[0]["generated_text"]
        models = {
            auto.name: getattr(transformers, auto.name).from_pretrained(auto, trust_remote_code=True).eval()
            for auto in (folder / family).glob("Auto*") if auto != causal
        }
        models[causal.name] = model
        out[family] = {name: model(tokens)[0] for name, model in models.items()} | {"text": text}
        model.save_pretrained(again)
        generate.tokenizer.save_pretrained(again)
        out[family]["again"] = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()(tokens).logits
torch.save(out, folder / "out.pt")
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The folder of saved checkpoints, and what a clean environment computed with them, in one process for all."""
    folder = tmp_path_factory.mktemp("clean")
    torch.save(TOKENS, folder / "tokens.pt")
    for family, auto in CLASSES:
        torch.manual_seed(1)
        model = auto.from_config(tiny_config(family, num_labels=3))
        randomised(model).save_pretrained(folder / family / auto.__name__)
    for family in FAMILIES:
        save_tokenizer(folder / family / "AutoModelForCausalLM")
    run_clean(CLEAN_LOAD, folder, *FAMILIES, folder=folder / "environment")
    return folder, torch.load(folder / "out.pt")


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_computes_the_same_without_the_package(loaded: Loaded, family: str) -> None:
    folder, outputs = loaded[0] / family, loaded[1][family]
    with torch.no_grad():
        for auto in auto_classes(family):
            model = auto.from_pretrained(folder / auto.__name__).eval()
            assert type(model) is getattr(hf_asentmax, type(model).__name__)
            torch.testing.assert_close(outputs[auto.__name__], model(TOKENS)[0], rtol=0, atol=0)
        torch.testing.assert_close(outputs["again"], outputs["AutoModelForCausalLM"], rtol=0, atol=0)
        model = AutoModelForCausalLM.from_pretrained(folder / "AutoModelForCausalLM").eval()
        generated = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    words = [f"w{token}" for token in generated[0].tolist() if token > 2]
    assert re.findall(r"w\d+", outputs["text"]) == words


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_saved_again_without_the_package_is_the_same(loaded: Loaded, family: str) -> None:
    folder = loaded[0] / family
    for file in (f"modeling_asentmax_{family}.py", "config.json", "model.safetensors"):
        assert (folder / "again" / file).read_bytes() == (folder / "AutoModelForCausalLM" / file).read_bytes()


def test_package_and_remote_code_work_in_one_process(tmp_path: Path) -> None:
    model = randomised(tiny_model("llama"))
    with torch.no_grad():
        expected = model(TOKENS).logits
    for number in (1, 2):  # two versions of the code, each with operators of its own
        folder = tmp_path / f"version{number}"
        model.save_pretrained(folder)
        code = folder / "modeling_asentmax_llama.py"
        code.write_text(
            code.read_text().replace('OP_NAMESPACE = "hf_asentmax_', f'OP_NAMESPACE = "hf_asentmax_{number}')
        )
        for _ in range(2):
            theirs = get_class_from_dynamic_module(
                "modeling_asentmax_llama.ASEntmaxLlamaForCausalLM", str(folder), force_download=True
            )
            assert theirs is not type(model)
            loaded = theirs.from_pretrained(folder).eval()
            loaded.train()
            loss = loaded(TOKENS, labels=TOKENS).loss
            loss.backward()
            assert all(parameter.grad.isfinite().all() for parameter in loaded.parameters())
            with torch.no_grad():
                torch.testing.assert_close(loaded.eval()(TOKENS).logits, expected, rtol=0, atol=0)
                torch.testing.assert_close(model(TOKENS).logits, expected, rtol=0, atol=0)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "version1")
    assert type(again) is hf_asentmax.ASEntmaxLlamaForCausalLM
