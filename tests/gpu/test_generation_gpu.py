"""On a GPU: generation with every cache, compiled and offloaded too, writes what a forward without a cache does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_tokens
from test_generation import left_padded
from test_patching import entmax_model

from hf_asentmax.ops import triton_decode

pytestmark = pytest.mark.gpu

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
# Transformers compiles a static one's decoding; torch 2.11 dies of that with "offloaded_static", softmax's too.
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {},
    "offloaded": {},
    "offloaded_static": {"disable_compile": True},
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("settings", [{"positions": "nape"}, {"alpha": 1.3, "query_scaling": "log"}], ids=str)
@torch.no_grad()
def test_generation_on_a_gpu_with_every_cache(
    cache: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    decode = triton_decode.kernel_decode
    monkeypatch.setattr(triton_decode, "kernel_decode", lambda problem: calls.append(1) or decode(problem))
    torch.manual_seed(0)
    model = entmax_model("llama", SIZES, **settings).cuda()
    ids, mask = (x.cuda() for x in left_padded([random_tokens(n, seed=n) for n in (200, 70)]))
    options = {"attention_mask": mask, "max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    expected = model.generate(ids, use_cache=False, **options)
    assert not calls
    found = model.generate(ids, cache_implementation=cache, **CACHES[cache], **options)
    assert calls  # the kernels, not the reference
    assert torch.equal(found, expected)
