"""The query scale ``r`` and the learned alpha: everything learnable that ASEntmax adds to an attention layer."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .masks import once

QUERY_SCALINGS = ("none", "log", "static", "adaptive")
LEARNED_ALPHA_RANGE = (1.01, 2.0)
NEUTRAL_DELTA = 1.0 - math.log(2.0)  # with zero weights r = delta + softplus(0) = 1: the start of a converted model


def tensor_parallel_plan(config: Any) -> dict[str, str]:
    """How tensor parallelism splits what a :class:`QueryScale` learns: by heads, where the family's plan splits queries
    so. Where it gathers them before attention (fused projections, norms over all heads) each process has all of it."""
    if (config.base_model_tp_plan or {}).get("layers.*.self_attn.q_proj") != "colwise":
        return {}
    parts = {"none": (), "log": ("log_scale",)}.get(config.query_scaling, ("beta", "gamma"))
    alpha = ("alpha_logit",) if config.entmax_alpha_learned else ()
    return {f"layers.*.self_attn.query_scale.{name}": "colwise" for name in (*parts, *alpha)}


def own_part(parameter: Tensor) -> Tensor:
    """This process's heads of a parameter that tensor parallelism has split, in float32; else all of it."""
    # By what it can do: torch is also built without distributed tensors.
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).float()


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of x, and so for what is computed from it."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast gives to the attention of x; its own in float64 and where autocast is off."""
    if x.dtype == torch.float64 or not is_autocast(x):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


class QueryScaleLinear(nn.Module):
    """One number per head from the layer's input, in float32 whatever the dtype of the weights.

    No `nn.Linear`, so that what is done to every linear layer of a model leaves it alone: Transformers' weight
    initialisation, quantization, PEFT's "all-linear" (DoRA divides by the norms of the weights, zero at the start).
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]  # takes from the seed what nn.Linear would

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False) if is_autocast(input) else nullcontext():
            return F.linear(input.float(), self.weight.float(), self.bias.float())


class QueryScale(nn.Module):
    """The factor ``r`` of each query's scores, and alpha where it is learned.

    With ``n`` the number of keys that a query may see and x the layer's input:

    - ``log`` (SSMax, arXiv 2501.19399): ``r = s_h log(1 + n)``, s_h starting so that r = 1 at ``query_scale_length``
    - ``static``: ``r = delta + softplus(b_h) (log(1 + n))^(m + c tanh(d_h))``
    - ``adaptive`` (ASEntmax, arXiv 2506.16640, eq. 8): as static, with ``b_h`` and ``d_h`` replaced by ``w_h x + b_h``
      and ``u_h x + d_h``

    where c is ``query_scale_gamma_range`` and m ``query_scale_gamma_center``, 0 in the papers. Weights start at zero,
    and r at delta + ln 2: everywhere for m = 0, else at n = ``query_scale_length``. Where all training sequences are
    short, log n hardly varies and the exponent is one more way to set r; it may end where r falls with n, or stays.
    With delta = 0, m = 1 and c = 0.5 it grows in every head, between (log n)^0.5 and (log n)^1.5.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        heads = config.num_attention_heads
        self.query_scaling = config.query_scaling
        self.delta = config.query_scale_delta
        self.gamma_range = config.query_scale_gamma_range
        self.gamma_center = config.query_scale_gamma_center
        self.start_length = config.query_scale_length
        self.start_alpha = config.entmax_alpha
        if self.query_scaling == "log":
            self.log_scale = nn.Parameter(torch.empty(heads))
        elif self.query_scaling == "static":
            self.beta: Any = nn.Parameter(torch.empty(heads))
            self.gamma: Any = nn.Parameter(torch.empty(heads))
        elif self.query_scaling == "adaptive":
            self.beta = QueryScaleLinear(config.hidden_size, heads)
            self.gamma = QueryScaleLinear(config.hidden_size, heads)
        self.alpha_logit = nn.Parameter(torch.empty(heads)) if config.entmax_alpha_learned else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, init: ModuleType = nn.init) -> None:
        """The neutral start. ``init`` is ``torch.nn.init`` or Transformers' own version of it."""
        if self.query_scaling == "log":
            init.constant_(self.log_scale, 1.0 / math.log1p(self.start_length))
        elif self.query_scaling != "none":
            projections = (self.beta, self.gamma)
            if self.query_scaling == "adaptive":
                for projection in projections:
                    init.zeros_(projection.weight)
                projections = (self.beta.bias, self.gamma.bias)
            start = math.log(2.0) / math.log1p(self.start_length) ** self.gamma_center  # softplus(b)
            init.constant_(projections[0], math.log(math.expm1(start)) if self.gamma_center else 0.0)
            init.zeros_(projections[1])
        if self.alpha_logit is not None:
            low, high = LEARNED_ALPHA_RANGE
            share = (self.start_alpha - low) / (high - low)
            init.constant_(self.alpha_logit, math.log(share / (1.0 - share)))

    def alpha(self, *, whole: bool = False) -> Tensor | None:
        """Each head's alpha, float32 (H,), where it is learned, else None. ``whole``: gathered from all processes that
        share it out, every one of which must ask."""
        if self.alpha_logit is None:
            return None
        logit: Any = self.alpha_logit
        low, high = LEARNED_ALPHA_RANGE
        own = logit.full_tensor().float() if whole and hasattr(logit, "full_tensor") else own_part(logit)
        return low + (high - low) * own.sigmoid()

    def forward(self, hidden_states: Tensor, n: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """``r`` and alpha.

        Args:
            hidden_states: (B, T, hidden), the input of the attention module.
            n: integer (B or 1, T), how many keys each query may see. A query that sees none counts as one key, so that
                nothing is infinite where its output is zero anyway.

        Returns:
            r, float32 (B, H, T), or None for ``query_scaling="none"``; alpha (H,) where it is learned, else None.
        """
        alpha = self.alpha()
        if self.query_scaling == "none":
            return None, alpha
        log_n = once(n, "log", lambda: n.clamp(min=1).float().log1p()[..., None])
        if self.query_scaling == "log":
            r = own_part(self.log_scale) * log_n
        else:
            if self.query_scaling == "static":
                beta, gamma = own_part(self.beta), own_part(self.gamma)
            else:
                hidden_states = hidden_states.float()
                beta, gamma = self.beta(hidden_states), self.gamma(hidden_states)
            exponent = self.gamma_range * gamma.tanh()
            if self.gamma_center:
                exponent = exponent + self.gamma_center
            r = F.softplus(beta) * log_n.pow(exponent)
            if self.delta:
                r = r + self.delta
        return r.transpose(1, 2).expand(hidden_states.shape[0], -1, -1), alpha
