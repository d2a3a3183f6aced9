"""Engines that bring their own attention: an ASEntmax model refuses them by name, and is as it was afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_tokens
from test_patching import FOUND, entmax_model
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

TOKENS = random_tokens(1, 6)
GREEDY = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=1, pad_token_id=0)


def assert_untouched(model: Any) -> None:
    assert model.config._attn_implementation == "asentmax"
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, entmax_model(model.config.family)(TOKENS).logits)


@pytest.mark.parametrize("family", FOUND)
def test_engine_continuous_batching_is_refused_with_the_way_out(family: str) -> None:
    model = entmax_model(family)
    for start in (
        lambda: model.generate_batch(inputs=[TOKENS[0].tolist()], generation_config=GREEDY),
        lambda: model.init_continuous_batching(generation_config=GREEDY),
    ):
        with pytest.raises(NotImplementedError, match=rf"got {type(model).__name__}.*; call model\.generate"):
            start()
        assert_untouched(model)


def test_engine_paged_cache_built_by_hand_is_refused() -> None:
    """Past our own refusal: Transformers knows no paged attention of our name, or asks the model for one."""
    model = entmax_model()
    with pytest.raises(ValueError, match="asentmax"):
        model_manager(model)
    assert_untouched(model)


def model_manager(model: Any) -> Any:
    from inspect import signature

    given = {"model": model, "generation_config": GREEDY}
    if "continuous_batching_config" in signature(ContinuousBatchingManager.__init__).parameters:
        from transformers import ContinuousBatchingConfig

        given["continuous_batching_config"] = ContinuousBatchingConfig()
    return ContinuousBatchingManager(**given)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("family", FOUND)
def test_engine_that_registers_its_attention_is_refused(engine: str, family: str) -> None:
    """What vLLM's and SGLang's Transformers backends do: ask the class, name their attention in the config, build."""
    model = entmax_model(family)
    for part in (model, model.model):
        assert not type(part).is_backend_compatible()
    config = type(model.config).from_dict(model.config.to_dict())
    config._attn_implementation = engine
    for auto in (AutoModel, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=f'attn_implementation must be "asentmax" for .*, got {engine!r}; '):
            auto.from_config(config)
    model.config._attn_implementation = engine  # on a model that is built already
    with pytest.raises(RuntimeError, match=f'attn_implementation must be "asentmax" .*, got "{engine}"; '):
        model(TOKENS)
    model.config._attn_implementation = "asentmax"
    assert_untouched(model)
