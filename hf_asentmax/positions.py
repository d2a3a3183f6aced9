"""Position schemes: what each head knows of distance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

POSITIONS = ("rope", "nope", "alibi", "nape")


def alibi_slopes(positions: str, heads: int, device: torch.device) -> Tensor | None:
    """Slopes m_h, float32 (H,), of the bias ``-m_h (i - j)``; 0 for a head without one, None if no head has one.

    - ``alibi``: the slopes of arXiv 2108.12409, ``2^(-8 h / H)`` for a power of two H
    - ``nape`` (arXiv 2506.16640): ``1 / h`` on the first half of the heads; the others, ceil(H / 2) of them, have no
      positions at all (NoPE)

    With entmax a head of slope m sees, at equal scores, ``(12 / m^2)^(1/3)`` tokens (alpha 1.5): 9 at 1/8.
    """
    if positions not in POSITIONS:
        raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, got {positions!r}")
    if positions in ("rope", "nope"):
        return None
    if positions == "nape":
        slopes = torch.arange(1, heads // 2 + 1, device=device, dtype=torch.float32).reciprocal()
        return torch.cat([slopes, slopes.new_zeros(heads - heads // 2)])
    power = 2 ** int(math.log2(heads))
    exponents = torch.arange(1, power + 1, device=device, dtype=torch.float32) * (8.0 / power)
    between = (torch.arange(heads - power, device=device, dtype=torch.float32) * 2 + 1) * (4.0 / power)
    return torch.exp2(-torch.cat([exponents, between]))
