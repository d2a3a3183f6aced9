"""Generated queries and keys of a chosen block sparsity, and the exact measure of the sparsity that came out.

Each aligned block of 64 keys carries one of several topics, or none, and each block of 64 queries looks for a topic
that some visible block carries. One half of the head dimensions says which topic, the other half is noise, independent
for each pair, so that the keys of a topic compete as they do in trained models: some tens of them share the weight.
``sink_band`` adds what trained models show besides: four first keys that stand out for every query, and queries (every
second one) that attend to the tokens within 256 before them instead of a topic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import reference
from ..positions import alibi_slopes

BLOCK = 64  # tokens: the tile in which sparsity is counted
PATTERNS = ("topics", "sink_band")
BAND, SINKS = 256, 4  # tokens

NOISE = 0.65  # standard deviation of the scores within a topic
TOPIC_SCORE = {"topics": 8.0, "sink_band": 12.0}  # what a matching topic (or nearness) adds to a score
SINK_SCORE = 13.3
# Nearness falls off as exp(-distance^2 / (2 width^2)): at 256 tokens the score is 1.0 below its best. Measured, the
# blocks within 256 tokens all have support, and 0.8 of those 64 tokens further.
BAND_WIDTH = 600.0


@dataclass(frozen=True)
class Case:
    """One point of the benchmark: causal attention of ``tokens`` queries over as many keys.

    Attributes:
        name: how it is asked for.
        batch, heads, kv_heads, tokens, head_dim: sizes.
        block_sparsity: share of the visible 64 x 64 blocks that is to have no support, without slopes.
        pattern: "topics", or "sink_band" for topics, an attention sink and a band of 256 tokens.
        nape: ALiBi slopes on the first half of the heads.
    """

    name: str
    batch: int
    heads: int
    kv_heads: int
    tokens: int
    head_dim: int
    block_sparsity: float
    pattern: str = "topics"
    nape: bool = False

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, got {self.pattern!r}")
        for name in ("batch", "heads", "kv_heads", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads = {self.kv_heads}, got {self.heads!r}")
        if self.head_dim < 16 or self.head_dim % 8:
            raise ValueError(f"head_dim must be a multiple of 8 and at least 16, got {self.head_dim!r}")
        topic_share(self)

    def slopes(self, device: torch.device) -> Tensor | None:
        """Slopes of NAPE, (H,), or None."""
        return alibi_slopes("nape", self.heads, device) if self.nape else None


def topic_share(case: Case) -> float:
    """The share s of key blocks that carry a given topic, such that the expected block sparsity is as asked.

    Query block i sees i + 1 blocks. One of them is chosen and has support, each other one with probability s; with
    ``sink_band`` the first block and the last five have it anyway.
    """
    blocks = math.ceil(case.tokens / BLOCK)
    always = [0 if case.pattern == "topics" else min(i + 1, BAND // BLOCK + 2) for i in range(blocks)]
    chosen = sum((i + 1 - sure) / (i + 1) for i, sure in enumerate(always)) + sum(always)
    other = sum((i + 1 - sure) * i / (i + 1) for i, sure in enumerate(always))
    visible = blocks * (blocks + 1) / 2
    if not 0.0 <= case.block_sparsity <= 1.0 - chosen / visible + 1e-9:
        raise ValueError(
            f"block_sparsity must be between 0 and {1.0 - chosen / visible:.3f} for {case.tokens} tokens and "
            f"{case.pattern}, got {case.block_sparsity!r}; ask for less or for more tokens"
        )
    share = ((1.0 - case.block_sparsity) * visible - chosen) / other if other else 1.0
    return min(max(share, 1.0 / blocks**2), 1.0)


# The points that the kernels are measured by, and "huge", for the memory of a long context.
CASES = {
    case.name: case
    for case in (
        Case("long_sparse", 1, 8, 8, 32768, 64, 0.94),
        Case("long_medium", 1, 8, 8, 32768, 64, 0.75),
        Case("long_dense", 1, 8, 8, 32768, 64, 0.0),
        Case("long_sink_band", 1, 8, 8, 32768, 64, 0.9, "sink_band"),
        Case("mid_sparse", 4, 8, 8, 8192, 64, 0.91),
        Case("short", 16, 8, 8, 2048, 64, 0.7),
        Case("gqa", 1, 16, 4, 16384, 128, 0.93),
        Case("huge", 1, 32, 8, 131072, 128, 0.95),
    )
}


def make_inputs(
    case: Case, *, seed: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, queries: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query (B, H, T, D), key and value (B, H_kv, N, D) and a gradient of the output (B, H, T, D), all random.

    T is N, or ``queries``: those of the last tokens. The same seed gives the same tensors on the same kind of device.
    """
    generator = torch.Generator(device).manual_seed(seed)
    batch, heads, kv_heads, tokens, dim = case.batch, case.heads, case.kv_heads, case.tokens, case.head_dim
    blocks = math.ceil(tokens / BLOCK)
    first = 0 if queries is None else tokens - queries  # token that asks
    asking = range(first // BLOCK, blocks)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def gain(score: float) -> float:
        """Length of two parallel vectors whose product adds ``score`` to the scaled score."""
        return math.sqrt(score * math.sqrt(dim))

    share = topic_share(case)
    topics = int(1.0 / share + 1e-9)
    shape = (batch, kv_heads, blocks)
    key_topic = torch.randint(topics, shape, generator=generator, device=device)
    blank = torch.rand(shape, generator=generator, device=device) >= topics * share
    blank[..., 0] = False
    visible = (~blank[..., None, :] & blank.new_ones(len(asking), blocks).tril(asking.start)).float()
    picked = visible.repeat_interleave(heads // kv_heads, 1).flatten(0, 2).multinomial(1, generator=generator)
    wanted = key_topic.repeat_interleave(heads // kv_heads, 1).gather(-1, picked.view(batch, heads, len(asking)))

    noise_dims, pairs = dim // 2, dim // 8
    topic_dims = dim - noise_dims if case.pattern == "topics" else dim - noise_dims - 1 - 2 * pairs
    # Topics at right angles where there is room for it.
    codes = normal(topics, topic_dims)
    codes = torch.linalg.qr(codes.T)[0].T if topics <= topic_dims else codes / codes.norm(dim=-1, keepdim=True)
    codes = codes * gain(TOPIC_SCORE[case.pattern])

    def spread(x: Tensor, start: int = 0) -> Tensor:
        """From blocks to their tokens, from one of them on."""
        return x.repeat_interleave(BLOCK, 2)[:, :, start % BLOCK : tokens - start // BLOCK * BLOCK]

    spacing = gain(NOISE) / noise_dims**0.25
    query = [normal(batch, heads, tokens - first, noise_dims) * spacing, spread(codes[wanted], first)]
    key = [normal(batch, kv_heads, tokens, noise_dims) * spacing, spread(codes[key_topic] * ~blank[..., None])]
    if case.pattern == "sink_band":
        near = _nearness(tokens, pairs, device) * gain(TOPIC_SCORE[case.pattern])
        local = (torch.arange(tokens, device=device) % 2).float()[:, None]
        sink = (torch.arange(tokens, device=device) < SINKS).float()[:, None]
        query[1] = query[1] * (1 - local[first:])
        key[1] = key[1] * (1 - sink)
        constant = torch.full_like(sink, gain(SINK_SCORE))
        query += [x[first:].expand(batch, heads, -1, -1) for x in (near * local, constant)]
        key += [(near * (1 - sink)).expand(batch, kv_heads, -1, -1), (constant * sink).expand(batch, kv_heads, -1, -1)]
    value, grad = normal(batch, kv_heads, tokens, dim), normal(batch, heads, tokens - first, dim)
    return torch.cat(query, -1).to(dtype), torch.cat(key, -1).to(dtype), value.to(dtype), grad.to(dtype)


def _nearness(tokens: int, pairs: int, device: torch.device) -> Tensor:
    """Unit vectors (N, 2 pairs) whose product is about ``exp(-distance^2 / (2 width^2))``: that function's Fourier
    transform is Gaussian, so frequencies at the quantiles of a Gaussian sum up to it."""
    quantiles = (torch.arange(pairs, device=device, dtype=torch.float64) + 0.5) / pairs
    frequencies = math.sqrt(2.0) * torch.erfinv(quantiles) / BAND_WIDTH
    phase = torch.arange(tokens, device=device, dtype=torch.float64)[:, None] * frequencies
    return (torch.cat([phase.cos(), phase.sin()], -1) / math.sqrt(pairs)).float()


@dataclass(frozen=True)
class Support:
    """What alpha-entmax leaves of a causal attention map.

    Attributes:
        block_sparsity: share of the visible 64 x 64 blocks in which every weight is exactly zero.
        zero_share: share of the visible (query, key) pairs with a weight of exactly zero.
        mean_support: keys with a weight above zero per query.
        heads: heads of the batch that were measured, evenly spread.
    """

    block_sparsity: float
    zero_share: float
    mean_support: float
    heads: int


@torch.no_grad()
def measure_support(
    query: Tensor,
    key: Tensor,
    *,
    alpha: float | Sequence[float] = 1.5,
    scaling: float | None = None,
    query_scale: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    max_scores: int = 1 << 34,
) -> Support:
    """Count the support of causal alpha-entmax attention, from float32 scores and the exact threshold, in row chunks.

    Args:
        query: (B, H, N, D), any floating dtype.
        key: (B, H_kv, N, D).
        alpha: of all heads, or one for each.
        scaling, query_scale, alibi_slopes: as for :func:`hf_asentmax.entmax_attention`.
        max_scores: most scores to compute; beyond it fewer heads are measured, evenly spread.
    """
    batch, heads, tokens, dim = query.shape
    group = heads // key.shape[1]
    alphas = [alpha] * heads if isinstance(alpha, int | float) else alpha
    blocks = math.ceil(tokens / BLOCK)
    chunk = max(1, (1 << 26 if query.is_cuda else 1 << 20) // (BLOCK * tokens)) * BLOCK
    step = math.ceil(batch * heads * tokens**2 / max_scores)
    measured = range(0, batch * heads, step)
    position = torch.arange(blocks * BLOCK, device=query.device)
    pairs = torch.zeros((), dtype=torch.int64, device=query.device)
    filled = torch.zeros_like(pairs)
    for row, head in (divmod(index, heads) for index in measured):
        q = query[row, head].float() * (dim**-0.5 if scaling is None else scaling)
        if query_scale is not None:
            q = q * query_scale[row, head, :, None]
        for start in range(0, tokens, chunk):
            stop = min(start + chunk, tokens)
            scores = q[start:stop] @ key[row, head // group, :stop].float().T
            distance = position[start:stop, None] - position[:stop]
            if alibi_slopes is not None:
                scores -= alibi_slopes[head] * distance
            scores.masked_fill_(distance < 0, -torch.inf)
            support = reference.entmax_forward(scores, alphas[head]) > 0
            pairs += support.sum()
            support = torch.nn.functional.pad(support, (0, -stop % BLOCK, 0, (start - stop) % BLOCK))
            filled += support.unflatten(1, (-1, BLOCK)).any(-1).unflatten(0, (-1, BLOCK)).any(1).sum()
    count, rows = len(measured), len(measured) * tokens
    return Support(
        block_sparsity=1 - filled.item() / (count * blocks * (blocks + 1) / 2),
        zero_share=1 - pairs.item() / (rows * (tokens + 1) / 2),
        mean_support=pairs.item() / rows,
        heads=count,
    )
