"""Reading a long text in blocks: no token is computed with more context than in training, the last ones see all.

A head without positions can tell where a token stands by how many keys it sees (arXiv 2305.19466), and has learned that
for the trained length only: what a model makes of token 8,000 is unlike anything it was trained on, and every later
query reads it. RoPE beyond its length turns by angles that it never saw. So the text is cut into blocks that don't see
each other (parallel context windows, arXiv 2212.10947); their keys and values lie in one cache, which the last block
and what is generated see whole. ALiBi's distances stay right, since keys hold no position and their order in the cache
is that of the text. With RoPE all blocks get the positions just before the last one, so that no distance exceeds two
blocks; how far apart the blocks are the model can't tell then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .evaluation import evaluating

OVERLAP = 8  # a block begins the so manyth part of it early
RELATIVE_ROPE = ("default", "linear", "llama3", "yarn")
READ_AT_ONCE = 1 << 14  # tokens in a forward pass, one block at least


def check_block(config: Any, block: int) -> None:
    """Raise ValueError unless such a model can read in blocks of so many tokens."""
    windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if windows or getattr(config, "sliding_window", None) is not None:
        raise ValueError("reading in blocks needs full attention in every layer, got sliding windows; read it whole")
    if block < 1:
        raise ValueError(f"block must be at least 1 token, got {block}; try {default_block(config)}")
    if getattr(config, "positions", "rope") != "rope":
        return
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if kind not in RELATIVE_ROPE:
        raise ValueError(
            f"reading in blocks needs RoPE of one of the types {', '.join(RELATIVE_ROPE)}, whose angles don't depend "
            f"on the text's length, or positions nape, nope or alibi, got {kind}; read it whole"
        )
    if block > default_block(config):
        raise ValueError(
            f"block must be at most {default_block(config)} tokens with RoPE, half of the model's context "
            f"(max_position_embeddings), which two blocks must fit in, got {block}; lower it"
        )


def default_block(config: Any) -> int:
    """The model's context, which is what it was trained on; with RoPE half of it."""
    context: int = config.max_position_embeddings
    return context // 2 if getattr(config, "positions", "rope") == "rope" else context


def read_in_blocks(model: PreTrainedModel, input_ids: Tensor, *, block: int | None = None) -> DynamicCache:
    """Keys and values of all but the last block of a text, each block computed without those before it.

    ``model.generate(input_ids, past_key_values=read_in_blocks(model, input_ids))`` goes on with the text, and computes
    the last block itself, with all keys in sight; so does a forward pass over ``input_ids[:, -block:]``. The time taken
    grows with the length of the text, not with its square.

    Each block but the first begins an eighth of a block early, with tokens whose keys are then left out: what stands at
    a boundary is read together; without that it is seldom found again.

    Args:
        model: a causal language model, ASEntmax or softmax, with full attention in every layer.
        input_ids: (B, L), int64, without padding.
        block: tokens that see each other; by default the context of the model's config, what it was trained on, with
            RoPE half of it. To have room for what is generated, give RoPE less.

    Returns:
        A cache of L - block tokens; an empty one of a text that is one block or less.

    Raises:
        ValueError: a layer has a sliding window, the angles of RoPE depend on the text's length, or the block is below
            1 or, with RoPE, more than half of the model's context.
    """
    block = default_block(model.config) if block is None else block
    check_block(model.config, block)
    cache = DynamicCache(config=model.config)
    ids = input_ids[:, :-block]
    rows, length = ids.shape
    overlap = block // OVERLAP
    stride = block - overlap
    first = length if length <= block else overlap + ((length - overlap) % stride or stride)
    places = torch.arange(max(length - block, 0), length, device=ids.device)[None]  # those before the last block

    def append(part: Tensor, skipped: int) -> None:
        """Blocks (B, blocks, tokens), without the keys of their first tokens, behind what the cache holds."""
        flat = part.flatten(0, 1)
        read = model(flat, position_ids=places[:, -flat.shape[1] :], use_cache=True, logits_to_keep=1).past_key_values
        for index, layer in enumerate(read.layers):
            kept = (x[:, :, skipped:].unflatten(0, (rows, -1)).transpose(1, 2) for x in (layer.keys, layer.values))
            cache.update(*(x.flatten(2, 3) for x in kept), index)

    with evaluating(model):
        if length:
            append(ids[:, None, :first], 0)
        if length > first:
            blocks = ids[:, first - overlap :].unfold(1, block, stride)
            for some in blocks.split(max(1, READ_AT_ONCE // (rows * block)), dim=1):
                append(some, overlap)
    return cache
