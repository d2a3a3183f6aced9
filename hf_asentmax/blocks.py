"""Reading a long text in blocks: no token is computed with more context than in training, the last ones see all.

A head without positions can tell where a token stands by how many keys it sees (arXiv 2305.19466), and has learned that
for the trained length only: what a model makes of token 8,000 is unlike anything it was trained on, and every later
query reads it. So the text is cut into blocks of the trained length that don't see each other (parallel context
windows, arXiv 2212.10947); their keys and values lie in one cache, which the last block and what is generated see
whole. ALiBi's distances stay right, since keys hold no position and their order in the cache is that of the text.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .evaluation import evaluating

OVERLAP = 8  # a block begins the so manyth part of it early
READ_AT_ONCE = 1 << 14  # tokens in a forward pass, one block at least


def check_block(config: Any, block: int) -> None:
    """Raise ValueError unless such a model can read in blocks of so many tokens."""
    positions = getattr(config, "positions", "rope")
    if positions == "rope":
        raise ValueError(
            "reading in blocks needs keys without positions in them: positions must be nape, nope or alibi, got rope; "
            "stretch RoPE instead (yarn)"
        )
    windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if windows or getattr(config, "sliding_window", None) is not None:
        raise ValueError("reading in blocks needs full attention in every layer, got sliding windows; read it whole")
    if block < 1:
        raise ValueError(f"block must be at least 1 token, got {block}; give the length that was trained on")


def read_in_blocks(model: PreTrainedModel, input_ids: Tensor, *, block: int | None = None) -> DynamicCache:
    """Keys and values of all but the last block of a text, each block computed without those before it.

    ``model.generate(input_ids, past_key_values=read_in_blocks(model, input_ids))`` goes on with the text, and computes
    the last block itself, with all keys in sight; so does a forward pass over ``input_ids[:, -block:]``. The time taken
    grows with the length of the text, not with its square.

    Each block but the first begins an eighth of a block early, with tokens whose keys are then left out: what stands at
    a boundary is read together; without that it is seldom found again.

    Args:
        model: an ASEntmax model with positions "nape", "nope" or "alibi" (any alpha), and full attention.
        input_ids: (B, L), int64, without padding.
        block: tokens that see each other; by default the context of the model's config, what it was trained on.

    Returns:
        A cache of L - block tokens; an empty one of a text that is one block or less.

    Raises:
        ValueError: the model's keys hold positions (RoPE), a layer has a sliding window, or the block is below 1.
    """
    block = model.config.max_position_embeddings if block is None else block
    check_block(model.config, block)
    cache = DynamicCache(config=model.config)
    ids = input_ids[:, :-block]
    rows, length = ids.shape
    overlap = block // OVERLAP
    stride = block - overlap
    first = length if length <= block else overlap + ((length - overlap) % stride or stride)
    with evaluating(model):
        if length:
            _append(cache, model(ids[:, :first], use_cache=True, logits_to_keep=1).past_key_values, rows, 0)
        if length > first:
            blocks = ids[:, first - overlap :].unfold(1, block, stride)  # (B, blocks, block)
            for some in blocks.split(max(1, READ_AT_ONCE // (rows * block)), dim=1):
                read = model(some.reshape(-1, block), use_cache=True, logits_to_keep=1).past_key_values
                _append(cache, read, rows, overlap)
    return cache


def _append(cache: DynamicCache, read: Any, rows: int, overlap: int) -> None:
    """Blocks (B blocks, heads, block, d) behind what is there, as (B, heads, tokens, d), without their first tokens."""

    def laid_out(x: Tensor) -> Tensor:
        kept = x[:, :, overlap:]
        return kept.unflatten(0, (rows, -1)).transpose(1, 2).flatten(2, 3)

    for index, layer in enumerate(read.layers):
        cache.update(laid_out(layer.keys), laid_out(layer.values), index)
