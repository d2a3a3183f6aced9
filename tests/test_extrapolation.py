"""YaRN and dynamic NTK at inference: the frequencies of their papers, whatever was computed before, or a refusal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_tokens, tiny_config, tiny_model
from retrieval_setup import VOCABULARY, byte_tokenizer

from hf_asentmax import patch_model
from hf_asentmax.extrapolation import extend_rope, load_extended, rope_choices, set_context
from hf_asentmax.perplexity import perplexity_by_length
from hf_asentmax.retrieval import retrieve

LENGTH = 32  # the trained one
LONGER = [48, 24, 96, 64, 32]  # in an order in which frequencies that are kept from before would be wrong


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama", max_position_embeddings=LENGTH, head_dim=16).save_pretrained(tmp_path)
    return tmp_path


def frequencies(model: Any) -> tuple[torch.Tensor, float]:
    return model.model.rotary_emb.inv_freq.double(), model.model.rotary_emb.attention_scaling


def plain(dims: int = 16, base: float = 1e4) -> torch.Tensor:
    return base ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)


def test_yarn_frequencies_are_the_papers(folder: Path) -> None:
    """Equations 17 to 22 of arXiv 2309.00071, alpha 1 and beta 32, the ends of the ramp at whole dims."""
    model = load_extended(str(folder), "yarn:4")
    found, scaling = frequencies(model)

    def dim(rotations: float) -> float:
        return 8 * math.log(LENGTH / (rotations * 2 * math.pi)) / math.log(1e4)

    low, high = max(math.floor(dim(32)), 0), min(math.ceil(dim(1)), 15)
    ramp = ((torch.arange(8, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    torch.testing.assert_close(found, plain() * (1 - ramp + ramp / 4), rtol=1e-6, atol=0)
    assert scaling == pytest.approx(0.1 * math.log(4) + 1)
    assert model.config.max_position_embeddings == LENGTH
    assert 0 < ramp.sum() < 8  # of both kinds
    same, scaling = frequencies(load_extended(str(folder), "yarn:4:1.5"))
    assert torch.equal(same, found)
    assert scaling == 1.5


@pytest.mark.parametrize("factor", [1, 2])
def test_dynamic_frequencies_follow_the_length_whatever_came_before(folder: Path, factor: int) -> None:
    model = load_extended(str(folder), f"dynamic:{factor}")
    for length in LONGER:
        set_context(model, length)
        model(random_tokens(1, min(length, 40)))  # shorter than what it is prepared for: changes nothing
        base = 1e4 * max(1.0, factor * length / LENGTH - (factor - 1)) ** (16 / 14)
        torch.testing.assert_close(frequencies(model)[0], plain(base=base), rtol=1e-6, atol=0)


def test_bare_rope_is_left_alone(folder: Path) -> None:
    model = load_extended(str(folder))
    set_context(model, 100)
    torch.testing.assert_close(frequencies(model)[0], plain(), rtol=1e-6, atol=0)


def test_dynamic_perplexity_does_not_depend_on_the_order_of_the_lengths(folder: Path) -> None:
    model = load_extended(str(folder), "dynamic:4")
    documents = [random_tokens(100, seed=seed).tolist() for seed in range(2)]
    rows = {row["length"]: row for row in perplexity_by_length(model, documents, LONGER + [100], scored=8)}
    for length in LONGER:
        fresh = load_extended(str(folder), "dynamic:4")
        (row,) = perplexity_by_length(fresh, [ids[-length:] for ids in documents], [length], scored=8)
        assert row == rows[length]


def test_dynamic_generation_decodes_with_the_frequencies_of_its_cache(folder: Path) -> None:
    model = load_extended(str(folder), "dynamic:4")
    ids = random_tokens(1, 60)
    set_context(model, 80)
    written = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
    set_context(model, 80)
    for length in range(60, 80):
        assert model(written[:, :length], use_cache=False).logits[0, -1].argmax() == written[0, length]


def test_dynamic_retrieval_does_not_depend_on_the_order_of_the_lengths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", vocab_size=VOCABULARY, max_position_embeddings=256)
    for layer in model.model.layers:  # scores that positions decide
        layer.self_attn.q_proj.weight.data.mul_(100)
    model.save_pretrained(tmp_path)
    written: list[str] = []
    monkeypatch.setattr("hf_asentmax.retrieval._share", lambda text, answers: written.append(text) or 0.0)
    for lengths in ([900, 400], [400]):
        extended = load_extended(str(tmp_path), "dynamic:4")
        retrieve(extended, byte_tokenizer(), "needle", lengths, samples=3)
    assert written[3:6] == written[6:]


def test_asentmax_with_rope_is_extended_and_computes_something_else(tmp_path: Path) -> None:
    patch_model(tiny_model("llama", max_position_embeddings=LENGTH)).save_pretrained(tmp_path)
    ids = random_tokens(1, 90)
    logits = [load_extended(str(tmp_path), rope)(ids).logits for rope in ("none", "yarn:4", "dynamic:2")]
    assert [type(load_extended(str(tmp_path), "yarn:2")).__name__] == ["ASEntmaxLlamaForCausalLM"]
    assert not torch.allclose(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])


@pytest.mark.parametrize("rope", ["yarn:2", "dynamic:2"])
@pytest.mark.parametrize("family", ["mistral", "qwen3", "smollm3", "granite", "olmo2", "phi3", "gemma2"])
def test_extended_families_keep_the_rest_of_their_parameters(family: str, rope: str) -> None:
    config: Any = tiny_config(family)
    old = dict(config.rope_parameters)
    extend_rope(config, rope)
    assert {name: config.rope_parameters[name] for name in old if name != "rope_type"} == {
        name: value for name, value in old.items() if name != "rope_type"
    }
    assert (config.rope_parameters["rope_type"], config.rope_parameters["factor"]) == (rope[:-2], 2.0)
    original = config.rope_parameters.get("original_max_position_embeddings")
    assert original == (512 if rope == "yarn:2" else None)


WRONG = ["yarn", "yarn:", "yarn:0.5", "yarn:nan", "yarn:inf", "yarn:2:0", "yarn:2:nan", "yarn:2:inf", "yarn:2:1:1"]


@pytest.mark.parametrize("choice", [*WRONG, "dynamic:2:1", "ntk:2", "linear:2", "4"])
def test_a_wrong_choice_is_refused(choice: str) -> None:
    with pytest.raises(ValueError, match="rope must be none, yarn:FACTOR.* or dynamic:FACTOR.*try yarn:8"):
        extend_rope(tiny_config("llama"), choice)


def test_models_without_plain_rope_are_refused() -> None:
    nape = patch_model(tiny_model("llama"), positions="nape").config
    with pytest.raises(
        ValueError, match="rope must be none for a model without RoPE, got 'yarn:2' and positions 'nape'"
    ):
        extend_rope(nape, "yarn:2")
    with pytest.raises(ValueError, match="without RoPE, got 'yarn:2' and no rope_parameters"):
        extend_rope(tiny_config("gpt2", num_hidden_layers=1), "yarn:2")
    scaled = tiny_config("llama")
    extend_rope(scaled, "yarn:2")
    for config in (scaled, tiny_config("gemma3_text")):
        with pytest.raises(ValueError, match="rope must be none for a model whose RoPE is not plain"):
            extend_rope(config, "dynamic:2")
    extend_rope(nape, "none")


def test_one_choice_is_for_all_models() -> None:
    assert rope_choices(None, ["a", "b"]) == ["none", "none"]
    assert rope_choices(["yarn:2"], ["a", "b"]) == ["yarn:2", "yarn:2"]
    assert rope_choices(["none", "yarn:2"], ["a", "b"]) == ["none", "yarn:2"]
    with pytest.raises(ValueError, match="rope must be given once or for each of the 3 models"):
        rope_choices(["none", "yarn:2"], ["a", "b", "c"])
