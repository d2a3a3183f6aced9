"""What the attention of a model does: how many keys its queries use, and how many it leaves out exactly."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AttentionSupport:
    """Support statistics of one forward pass, one number a layer, averaged over heads and queries.

    Attributes:
        support_size: keys with a weight above zero per query, in tokens.
        zero_share: share of the (query, key) pairs, among the keys that a query may see, whose weight is exactly zero.
    """

    support_size: tuple[float, ...]
    zero_share: tuple[float, ...]

    def means(self) -> dict[str, float]:
        """Both numbers averaged over the layers, as a Trainer logs them."""
        return {"support_size": fmean(self.support_size), "zero_share": fmean(self.zero_share)}


@torch.no_grad()
def attention_support(
    model: nn.Module,
    input_ids: Tensor,
    *,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> AttentionSupport:
    """Count the keys that the queries of each layer attend to, from the exact attention weights.

    The weights of all layers are held at once (layers x B x heads x T x T), so give it few tokens. The model is run in
    eval mode and left as it was; softmax has a support of all visible keys, but for weights too small for its dtype.

    Args:
        model: a model that gives attention weights on request.
        input_ids: tokens, shape (B, T), int64.
        position_ids: positions, shape (B, T), int64; where they restart (and there is no mask) a document begins.
        attention_mask: 1 for tokens and 0 for padding, shape (B, T).

    Raises:
        RuntimeError: the model gives no attention weights.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        inputs = {"position_ids": position_ids, "attention_mask": attention_mask}
        given = {name: value for name, value in inputs.items() if value is not None}
        attentions = model(input_ids=input_ids, use_cache=False, output_attentions=True, **given).attentions
    finally:
        for module in training:
            module.training = True
    if not attentions or attentions[0] is None:
        raise RuntimeError(
            f"{type(model).__name__} must give attention weights, got none; use an ASEntmax model, or load a "
            'softmax one with attn_implementation="eager"'
        )
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
    visible = _visible_keys(real, position_ids if attention_mask is None else None)
    sizes, shares = [], []
    for weights, window in zip(attentions, _windows(model.config, len(attentions)), strict=True):
        n = (visible if window is None else visible.clamp(max=window))[:, None].expand(weights.shape[:3])
        used = (weights > 0).sum(-1) * real[:, None]
        sizes.append(used.sum().item() / (real.sum().item() * weights.shape[1]))
        shares.append(1 - used.sum().item() / (n * real[:, None]).sum().item())
    return AttentionSupport(tuple(sizes), tuple(shares))


def _visible_keys(real: Tensor, position_ids: Tensor | None) -> Tensor:
    """How many keys each query may see without a window, (B, T): the real tokens from its document's start to it."""
    count = real.cumsum(-1)
    if position_ids is None:
        return count
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=-1) <= 0
    before = count - real  # real tokens ahead of each token
    return count - torch.where(begins, before, 0).cummax(-1).values


def _windows(config: object, layers: int) -> list[int | None]:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return [window if kind == "sliding_attention" else None for kind in kinds[:layers]]
