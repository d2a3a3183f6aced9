"""Reading in blocks: the cache against each block by itself, what comes after it, and what can't be read so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TOLERANCE, random_tokens, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval_setup import VOCABULARY, byte_tokenizer
from transformers import DynamicCache

from hf_asentmax import blocks as module
from hf_asentmax import patch_model, read_in_blocks
from hf_asentmax.perplexity import PerplexityArguments, perplexity_by_length, run_perplexity, token_losses
from hf_asentmax.retrieval import RetrievalArguments, retrieve, run_retrieval

BLOCK = 16


def model(positions: str = "nape", **overrides: Any) -> Any:
    return patch_model(tiny_model("llama", **overrides), positions=positions).eval()


def windows(length: int, block: int) -> list[tuple[int, int, int]]:
    """Of a text of so many tokens: where each window begins and ends, and how many of its first tokens don't count."""
    overlap, end, found = block // 8, length, []
    while end > block:
        found.append((end - block, end, overlap))
        end -= block - overlap
    return [(0, end, 0), *reversed(found)] if end else found


def before(place: int, tokens: int) -> torch.Tensor:
    return torch.arange(place - tokens, place)[None]


@given(length=st.integers(0, 60), block=st.integers(1, 20), rows=st.integers(1, 3))
@settings(max_examples=40)
@pytest.mark.parametrize("positions", ["nape", "nope", "alibi", "rope"])
def test_cache_holds_what_each_window_gives_by_itself(positions: str, length: int, block: int, rows: int) -> None:
    network, ids = model(positions), random_tokens(rows, length + block)
    cache = read_in_blocks(network, ids, block=block)
    assert cache.get_seq_length() == length
    with torch.no_grad():
        own = [
            [
                (layer.keys[:, :, skipped:], layer.values[:, :, skipped:])
                for layer in network(ids[:, start:end], position_ids=before(length, end - start)).past_key_values.layers
            ]
            for start, end, skipped in windows(length, block)
        ]
    for index, layer in enumerate(cache.layers if length else []):
        for place, found in enumerate((layer.keys, layer.values)):
            torch.testing.assert_close(found, torch.cat([each[index][place] for each in own], dim=2))


def test_windows_cover_the_text_once() -> None:
    for length in range(60):
        kept = [list(range(start + skipped, end)) for start, end, skipped in windows(length, BLOCK)]
        assert [place for part in kept for place in part] == list(range(length))


def test_windows_do_not_depend_on_how_many_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network, ids = model(), random_tokens(2, 60)
    whole = read_in_blocks(network, ids, block=BLOCK)
    monkeypatch.setattr(module, "READ_AT_ONCE", 2 * 2 * BLOCK)  # two windows of both rows
    for one, other in zip(whole.layers, read_in_blocks(network, ids, block=BLOCK).layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys)


def test_a_single_layer_reads_in_blocks_as_it_reads_the_whole() -> None:
    """Keys of the first layer depend on their own token alone: a model of one layer sees the same in any blocks."""
    network, ids = model(num_hidden_layers=1), random_tokens(2, 50)
    with torch.no_grad():
        whole = network(ids).logits[:, -BLOCK:]
        cache = read_in_blocks(network, ids, block=BLOCK)
        torch.testing.assert_close(network(ids[:, -BLOCK:], past_key_values=cache).logits, whole)


@pytest.mark.parametrize("patched", [True, False])
@torch.no_grad()
def test_rope_has_all_blocks_just_before_the_last(patched: bool) -> None:
    """What the last block gets is what it gets at another place that is as far from the others; of a text of two blocks
    what it gets of the whole."""
    network, ids = model("rope") if patched else tiny_model("llama"), random_tokens(2, 60)
    cache, parts = read_in_blocks(network, ids, block=BLOCK), []
    for start, end, skipped in windows(60 - BLOCK, BLOCK):
        own = network(ids[:, start:end], position_ids=before(BLOCK, end - start)).past_key_values
        parts.append([(layer.keys[:, :, skipped:], layer.values[:, :, skipped:]) for layer in own.layers])
    expected = DynamicCache(config=network.config)
    for index in range(len(parts[0])):
        expected.update(*(torch.cat([part[index][i] for part in parts], dim=2) for i in (0, 1)), index)
    last = network(ids[:, -BLOCK:], past_key_values=expected, position_ids=before(2 * BLOCK, BLOCK)).logits
    torch.testing.assert_close(network(ids[:, -BLOCK:], past_key_values=cache).logits, last, **TOLERANCE[torch.float32])
    two = ids[:, -2 * BLOCK :]
    cache = read_in_blocks(network, two, block=BLOCK)
    logits = network(two[:, -BLOCK:], past_key_values=cache).logits
    torch.testing.assert_close(logits, network(two).logits[:, -BLOCK:], **TOLERANCE[torch.float32])


@pytest.mark.parametrize("positions", ["nape", "rope"])
def test_generate_goes_on_behind_the_blocks(positions: str) -> None:
    network, ids = model(positions), random_tokens(2, 50)
    cache = read_in_blocks(network, ids, block=BLOCK)
    written = network.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert written.shape == (2, 54)
    torch.testing.assert_close(written[:, :50], ids)
    expected, rest = read_in_blocks(network, ids, block=BLOCK), ids[:, -BLOCK:]
    with torch.no_grad():
        for _ in range(4):
            new = network(rest, past_key_values=expected, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
            ids, rest = torch.cat([ids, new], dim=1), new
    torch.testing.assert_close(written, ids)


def test_block_is_the_trained_length_by_default_and_the_model_is_left_as_it_was() -> None:
    network = model(max_position_embeddings=16).train()
    cache = read_in_blocks(network, random_tokens(1, 40))
    assert cache.get_seq_length() == 24
    assert read_in_blocks(model("rope", max_position_embeddings=16), random_tokens(1, 40)).get_seq_length() == 32
    assert network.training
    assert not cache.layers[0].keys.requires_grad


@pytest.mark.parametrize(("scored", "more"), [(4, 0), (BLOCK, 1)])
def test_losses_of_the_last_tokens_behind_blocks(scored: int, more: int) -> None:
    network, documents = model(), [random_tokens(40 + seed, seed=seed).tolist() for seed in range(3)]
    rows = perplexity_by_length(network, documents, [BLOCK + 1, 40], scored=scored, block=BLOCK)
    for row in rows:
        for loss, ids in zip(row["losses"], documents, strict=True):
            part = torch.tensor([ids[-row["length"] :]])
            with torch.no_grad():
                cache = read_in_blocks(network, part[:, : row["length"] - more], block=BLOCK)
                logits = network(part[:, -BLOCK - more :], past_key_values=cache).logits[0, -scored - 1 : -1]
            expected = torch.nn.functional.cross_entropy(logits, part[0, -scored:])
            assert loss == pytest.approx(expected.item(), rel=1e-5)
    whole = token_losses(network, torch.tensor([documents[0][-40:]]), 4)
    assert (whole - token_losses(network, torch.tensor([documents[0][-40:]]), 4, block=BLOCK)).abs().max() > 1e-4


def test_what_cannot_be_read_in_blocks_is_refused(tmp_path: Path) -> None:
    ids = random_tokens(1, 40)
    for kind, network in {"dynamic": model("rope"), "None": tiny_model("llama")}.items():
        network.config.rope_parameters = {"rope_type": kind, "factor": 2.0} if kind == "dynamic" else None
        with pytest.raises(ValueError, match=f"needs RoPE of one of the types default, .*, got {kind}; read it whole"):
            read_in_blocks(network, ids, block=BLOCK)
    with pytest.raises(ValueError, match="block must be at most 15 tokens with RoPE, half of .*, got 16; lower it"):
        read_in_blocks(model("rope", max_position_embeddings=31), ids, block=BLOCK)
    with pytest.raises(ValueError, match="got sliding windows"):
        read_in_blocks(patch_model(tiny_model("mistral", sliding_window=4), positions="nape"), ids, block=BLOCK)
    with pytest.raises(ValueError, match="block must be at least 1 token, got 0"):
        read_in_blocks(model(), ids, block=0)
    with pytest.raises(ValueError, match="block must be at least the 8 scored tokens, got 7"):
        perplexity_by_length(model(), [ids[0].tolist()], [40], scored=8, block=7)
    with pytest.raises(ValueError, match="batch_size must be 1 where prompts are read in blocks, got 2"):
        retrieve(model(), byte_tokenizer(), "needle", [600], batch_size=2, block=BLOCK)
    model().save_pretrained(tmp_path / "nape")
    patch_model(tiny_model("llama")).save_pretrained(tmp_path / "rope")
    models = [str(tmp_path / "nape"), str(tmp_path / "rope")]
    stretched = PerplexityArguments(model=models, data="none.jsonl", rope=["none", "dynamic:2"], block=[BLOCK])
    with pytest.raises(ValueError, match="got dynamic; read it whole"):
        next(run_perplexity(stretched))
    with pytest.raises(ValueError, match="block must be given once or for each of the 2 models"):
        next(run_retrieval(RetrievalArguments(model=models, block=[0, BLOCK, 0])))


def test_the_commands_read_in_blocks(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    model(vocab_size=VOCABULARY, max_position_embeddings=256).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    models = [str(tmp_path / "model")] * 2
    text = next(
        run_retrieval(
            RetrievalArguments(model=models, block=[0, 256], lengths=[600], depths=[50.0], samples=1, batch_size=2)
        )
    )
    assert "| asentmax, blocks:256 |" in text.replace("  ", "")
    (tmp_path / "text.jsonl").write_text('{"text": "' + "some words " * 60 + '"}\n', encoding="utf-8")
    settings = {"lengths": [300, 600], "scored_tokens": 100, "output_dir": str(tmp_path / "out")}
    arguments = PerplexityArguments(model=models, data=str(tmp_path / "text.jsonl"), block=[0, 256], **settings)
    found = "\n".join(run_perplexity(arguments))
    assert "asentmax, blocks:256" in found
    assert "positions" in found  # of what is read whole
