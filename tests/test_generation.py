"""Caches and generation: batched, padded, chunked or static, the model computes what one plain forward does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import TOLERANCE, WINDOWS, random_tokens
from test_patching import FOUND, entmax_model, native_model
from torch._dynamo import lookup_backend
from transformers import CompileConfig, DynamicCache, StaticCache

CLOSE = TOLERANCE[torch.float32]
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}

# What moves n, the positions or the cache: windows of 4 on some layers, positions of our own, a learned alpha.
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{family: (family, {}, {}) for family in FOUND},
    **{f"{family}-window": (family, window, {}) for family, window in WINDOWS.items()},
    "llama-alibi": ("llama", {}, {"positions": "alibi", "query_scaling": "log"}),
    "llama-nape": ("llama", {}, {"positions": "nape", "alpha_learned": True}),
    "llama-nope": ("llama", {}, {"positions": "nope", "query_scaling": "static", "alpha": 2.0}),
}


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> Any:
    family, config, settings = VARIANTS[request.param]
    return entmax_model(family, config, **settings)


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as one batch, with its mask."""
    length = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_zeros(length - len(row)), row]) for row in rows])
    mask = torch.stack([torch.arange(length) >= length - len(row) for row in rows]).long()
    return ids, mask


@torch.no_grad()
def test_generation_left_padded_batch_equals_one_by_one(model: Any) -> None:
    rows = [random_tokens(n, seed=n) for n in (11, 1, 6)]
    ids, mask = left_padded(rows)
    together = model.generate(ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] :]
    static = model.generate(ids, attention_mask=mask, cache_implementation="static", disable_compile=True, **GREEDY)[
        :, ids.shape[1] :
    ]
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)[:, ids.shape[1] :]
    for i, row in enumerate(rows):
        alone = model.generate(row[None], **GREEDY)[0, len(row) :]
        assert torch.equal(together[i], alone)
        assert torch.equal(static[i], alone)
        assert torch.equal(uncached[i], alone)


@torch.no_grad()
def test_generation_cached_decode_equals_the_full_forward(model: Any) -> None:
    tokens = random_tokens(2, 23)
    expected = model(tokens, use_cache=False).logits
    for sizes in ([23], [1] * 23, [7] + [1] * 16, [5, 9, 1, 8]):
        cache, parts, start = DynamicCache(config=model.config), [], 0
        for size in sizes:
            parts.append(model(tokens[:, start : start + size], past_key_values=cache, use_cache=True).logits)
            start += size
        torch.testing.assert_close(torch.cat(parts, 1), expected, **CLOSE)


@torch.no_grad()
def test_generation_static_cache_equals_the_full_forward(model: Any) -> None:
    tokens = random_tokens(2, 15)
    expected = model(tokens, use_cache=False).logits
    cache, parts, start = StaticCache(config=model.config, max_cache_len=31), [], 0
    for size in [6, 1, 1, 5, 1, 1]:
        parts.append(model(tokens[:, start : start + size], past_key_values=cache, use_cache=True).logits)
        start += size
    torch.testing.assert_close(torch.cat(parts, 1), expected, **CLOSE)


@torch.no_grad()
def test_generation_left_padded_chunks_equal_the_unpadded_forward(model: Any) -> None:
    rows = [random_tokens(n, seed=n) for n in (17, 4, 9)]
    ids, mask = left_padded(rows)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, parts = DynamicCache(config=model.config), []
    for start, stop in [(0, 5), (5, 12), (12, 13), (13, 17)]:  # the first chunk of two rows is nothing but padding
        parts.append(
            model(
                ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            ).logits
        )
    logits = torch.cat(parts, 1)
    assert torch.isfinite(logits).all()
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i, 17 - len(row) :], model(row[None]).logits[0], **CLOSE)


@pytest.mark.parametrize("family", FOUND)
@torch.no_grad()
def test_generation_right_padding_equals_the_unpadded_forward(family: str) -> None:
    model = entmax_model(family)
    tokens = random_tokens(2, 14)
    mask = torch.ones_like(tokens)
    mask[0, 6:] = 0
    for use_cache in (False, True):
        logits = model(tokens, attention_mask=mask, use_cache=use_cache).logits
        torch.testing.assert_close(logits[0, :6], model(tokens[:1, :6]).logits[0], **CLOSE)
        torch.testing.assert_close(logits[1], model(tokens[1:]).logits[0], **CLOSE)
        assert torch.isfinite(logits).all()


@torch.no_grad()
def test_generation_after_right_padding_raises_or_equals_one_by_one() -> None:
    """The mask of the first decoded token has a hole, [1 1 0 0 1]: the one new key must not be lost for it."""
    model = entmax_model()
    tokens = random_tokens(2, 12)
    mask = torch.ones_like(tokens)
    mask[0, 9:] = 0
    try:
        together = model.generate(tokens, attention_mask=mask, **GREEDY)
    except ValueError as error:
        refusal = str(error)
    else:
        assert torch.equal(together[0, 12:], model.generate(tokens[:1, :9], **GREEDY)[0, 9:])
        return
    assert "hole" in refusal


@torch.no_grad()
def test_generation_other_strategies_agree_with_greedy(model: Any) -> None:
    tokens = random_tokens(1, 9)
    expected = model.generate(tokens, **GREEDY)
    assert torch.equal(model.generate(tokens, prompt_lookup_num_tokens=3, **GREEDY), expected)
    assert torch.equal(model.generate(tokens, prefill_chunk_size=4, **GREEDY), expected)
    best = model.generate(tokens.expand(2, -1), num_beams=3, **GREEDY)
    assert torch.equal(best[0], best[1])
    log_probabilities = [
        model(row[:, :-1]).logits.log_softmax(-1).gather(2, row[:, 1:, None])[0, 8:, 0].sum()
        for row in (best[:1], expected)
    ]
    assert log_probabilities[0] >= log_probabilities[1] - 1e-4


@torch.no_grad()
def test_generation_assisted_by_or_assisting_another_model_agrees_with_greedy() -> None:
    model, other, tokens = entmax_model(), native_model("llama", num_hidden_layers=1), random_tokens(1, 9)
    for main, assistant in ((model, other), (other, model)):
        expected = main.generate(tokens, **GREEDY)
        assert torch.equal(main.generate(tokens, assistant_model=assistant, **GREEDY), expected)


@torch.no_grad()
def test_generation_beams_and_samples_are_the_same_with_every_cache(model: Any) -> None:
    """Beams reorder the cache, draws repeat with their seed: both as if each step computed the whole row anew."""
    ids, mask = left_padded([random_tokens(n, seed=n) for n in (9, 3)])
    for strategy in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 20}):
        rows = []
        for cache in (
            {"use_cache": False},
            {"cache_implementation": "dynamic"},
            {"cache_implementation": "static", "disable_compile": True},
        ):
            torch.manual_seed(3)
            rows.append(model.generate(ids, attention_mask=mask, max_new_tokens=8, **strategy, **cache))
        assert torch.equal(rows[1], rows[0]), strategy
        assert torch.equal(rows[2], rows[0]), strategy


@pytest.mark.parametrize(
    ("name", "compiler"),
    [
        ("llama-nape", "aot_eager"),
        ("mistral-window", "aot_eager"),
        ("smollm3-window", "aot_eager"),
        pytest.param("qwen3-window", "inductor", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_generation_compiled_static_decode_is_one_graph_and_agrees_with_greedy(name: str, compiler: str) -> None:
    """One graph for all lengths, a second where a window has filled; fullgraph raises at a graph break."""
    family, config, settings = VARIANTS[name]
    model = entmax_model(family, config, **settings)
    ids, mask = left_padded([random_tokens(n, seed=n) for n in (9, 3)])
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    torch.compiler.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return lookup_backend(compiler)(graph, inputs)

    compiling = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compiling._compile_all_devices = True  # Transformers compiles on accelerators only, unless told
    found = model.generate(ids, attention_mask=mask, cache_implementation="static", compile_config=compiling, **GREEDY)
    assert torch.equal(found, expected)
    assert len(graphs) == (2 if "window" in name else 1)


@pytest.mark.parametrize("family", FOUND)
@torch.no_grad()
def test_generation_gives_attention_weights_of_every_step(family: str) -> None:
    model, tokens = entmax_model(family), random_tokens(2, 5)
    output = model.generate(
        tokens, max_new_tokens=3, do_sample=False, output_attentions=True, return_dict_in_generate=True
    )
    assert [step[0].shape for step in output.attentions] == [(2, 4, 5, 5), (2, 4, 1, 6), (2, 4, 1, 7)]
    full = model(output.sequences[:, :-1], output_attentions=True).attentions
    for layer, weights in enumerate(full):
        torch.testing.assert_close(output.attentions[-1][layer], weights[:, :, -1:], **CLOSE)
