"""What Transformers calls: the attention function, and the mixin of the attention modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from .masks import ATTENTION_NAME, asentmax_mask, check_intervals, once, separate_documents
from .ops import reference
from .ops.attention import attention_from_intervals
from .ops.baselines import adaptive_temperature_from_intervals, tempered_softmax, topk_from_intervals, topk_softmax
from .positions import alibi_slopes
from .scaling import QueryScale, autocast_dtype

# Softmax class -> ours, for attention modules and models: what patch_model and the constructors of our models swap.
REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {}

# Dense weights on request (output_attentions=True): 512 MiB in float32 a layer. Beyond, the memory is the message.
MAX_DENSE_WEIGHTS = 1 << 27

# Arguments that Transformers hands to every attention function and that change nothing here: the mask already says
# what windows and positions allow, and the rest concerns other kernels or other parts of the model.
_IGNORED = {
    "cache_position",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "ignore_index",
    "is_causal",
    "labels",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "output_hidden_states",
    "position_ids",
    "return_dict",
    "shift_labels",
    "sliding_window",
    "token_type_ids",
    "use_cache",
}


def asentmax_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The function registered under the name ``asentmax``: hands over to the module, which must be one of ours."""
    compute = getattr(module, "_entmax_attention", None)
    if compute is None:
        raise RuntimeError(
            f'attn_implementation="{ATTENTION_NAME}" must be used by an ASEntmax model, got {type(module).__name__}, '
            "which would drop the query scale; load the checkpoint with AutoModelForCausalLM.from_pretrained after "
            "`import hf_asentmax` (or with trust_remote_code=True), or convert a softmax model with patch_model"
        )
    return compute(query, key, value, attention_mask, **kwargs)


class ASEntmaxMixin(nn.Module):
    """Turns a family's attention class into ASEntmax: mixed in before it, with nothing of it copied.

    The family's forward projects, rotates and caches as ever, and calls the attention function; this class only adds
    the query scale, computed from the layer's input, to the arguments of that call.
    """

    config: Any
    query_scale: QueryScale
    scheduled_alpha: Tensor | None = None  # set by set_alpha while a schedule moves alpha
    observer: Callable[..., None] | None = None  # set while hf_asentmax.analysis.observed looks on

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        REPLACEMENTS[cls.__bases__[-1]] = cls

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # families annotate it differently
        if args:
            raise TypeError(f"{type(self).__name__} must be called with keyword arguments, got {len(args)} positional")
        if self.config._attn_implementation != ATTENTION_NAME:
            raise RuntimeError(
                f'attn_implementation must be "{ATTENTION_NAME}" in an ASEntmax model, got '
                f'"{self.config._attn_implementation}"; call unpatch_model(model) to return to softmax'
            )
        intervals = check_intervals(kwargs.get("attention_mask"), hidden_states)
        check = not torch.compiler.is_compiling() and getattr(self, "layer_idx", 0) == 0  # no guard on it
        intervals = kwargs["attention_mask"] = separate_documents(intervals, kwargs, check)
        n = once(intervals, "n", lambda: (intervals[..., 1] - intervals[..., 0])[:, 0])
        scale, alpha = self.query_scale(hidden_states, n)
        if self.config.positions != "rope":  # the identity rotation, which leaves keys and cache in autocast's dtype
            cos, dtype = kwargs["position_embeddings"][0], autocast_dtype(hidden_states)
            ones = once(cos, "ones", lambda: torch.ones_like(cos, dtype=dtype))
            kwargs["position_embeddings"] = ones, once(cos, "zeros", lambda: torch.zeros_like(cos, dtype=dtype))
        if alpha is None and self.scheduled_alpha is not None:
            alpha = self.scheduled_alpha.to(hidden_states.device)
        if alpha is None:
            alpha = float(self.config.entmax_alpha)
        return super().forward(hidden_states, entmax_parameters=(alpha, scale), **kwargs)

    def _entmax_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        *,
        scaling: float,
        dropout: float = 0.0,
        entmax_parameters: tuple[float | Tensor, Tensor | None] | None = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if entmax_parameters is None:
            raise RuntimeError(
                f"{type(self).__name__} must be called through its own forward, which computes the query scale; "
                "something holds on to the forward of the softmax class. Remove hooks and wrappers (accelerate's "
                "remove_hook_from_module), call patch_model, then add them again"
            )
        unknown = {name for name, x in kwargs.items() if name not in _IGNORED and x is not None and x is not False}
        window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
        if kwargs.get("sliding_window") not in (None, window):  # the mask holds the module's own window
            unknown.add("sliding_window")
        if dropout or unknown:
            what, remedy = f"the arguments {sorted(unknown)}", "leave out arguments of other attention implementations"
            if dropout:
                what, remedy = "attention dropout", "set config.attention_dropout = 0"
            raise NotImplementedError(f"the {ATTENTION_NAME} attention does not handle {what}; {remedy}")
        alpha, scale = entmax_parameters
        slopes = self._own_slopes(query, attention_mask)
        if slopes is not None and scale is not None and self.config.positions == "nape":
            scale = torch.where(once(slopes, "biased", lambda: slopes[:, None] > 0), 1.0, scale)
        # As autocast does for SDPA: rotary makes q and k float32, and a cache that begins with such a k makes v so.
        query, key, value = (x.to(autocast_dtype(x)) for x in (query, key, value))
        first, last = once(attention_mask, "ends", lambda: _ends(attention_mask))
        tensors = (query, key, value, first, last)
        settings: dict[str, Any] = {"scaling": scaling, "query_scale": scale, "alibi_slopes": slopes}
        top_k = self.config.attention_top_k
        weights: float | Tensor | Callable[[Tensor], Tensor] = alpha
        if top_k is not None:
            out = topk_from_intervals(*tensors, k=top_k, **settings)
            weights = partial(topk_softmax, k=top_k)
        elif self.config.adaptive_temperature and not self.training:
            out = adaptive_temperature_from_intervals(*tensors, **settings)
            weights = tempered_softmax
        else:
            out = attention_from_intervals(*tensors, alpha=alpha, **settings)
        out = out.transpose(1, 2).contiguous()
        if isinstance(weights, Tensor):
            weights = weights.reshape(-1, 1, 1)
        if self.observer is not None:
            self.observer(query, key, first, last, scale, slopes, weights, scaling)
        if not output_attentions:
            return out, None
        return out, _dense_weights(query, key, first, last, scale, slopes, weights, scaling)

    def _own_slopes(self, query: Tensor, attention_mask: Tensor) -> Tensor | None:
        """The slopes of the heads that are here: all, or this process's share of them under tensor parallelism."""
        positions, heads, here = self.config.positions, self.config.num_attention_heads, query.shape[1]
        slopes = once(attention_mask, f"{positions} {heads}", lambda: alibi_slopes(positions, heads, query.device))
        if slopes is None or here == heads:
            return slopes
        weight: Any = self.q_proj.weight  # type: ignore[union-attr]
        split = [i for i, place in enumerate(getattr(weight, "placements", ())) if place.is_shard(0)]
        if len(split) != 1 or weight.device_mesh.size(split[0]) * here != heads:
            raise ValueError(
                f"the {heads} heads must be shared evenly by the processes of tensor parallelism, got {here} here; "
                "use a tp_size that divides the number of heads"
            )
        rank = weight.device_mesh.get_local_rank(split[0])
        return slopes[rank * here : (rank + 1) * here]


def _ends(intervals: Tensor) -> tuple[Tensor, Tensor]:
    first, last = (intervals[:, 0, :, i].clone(memory_format=torch.contiguous_format) for i in range(2))
    return first, last


def _dense_weights(
    query: Tensor,
    key: Tensor,
    first: Tensor,
    last: Tensor,
    scale: Tensor | None,
    slopes: Tensor | None,
    weights: float | Tensor | Callable[[Tensor], Tensor],
    scaling: float,
) -> Tensor:
    """The map (B, H, T, N), of entmax by its alpha, of others by what turns scores into weights."""
    elements = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    if elements > MAX_DENSE_WEIGHTS:
        raise ValueError(
            f"output_attentions must ask for at most {MAX_DENSE_WEIGHTS} weights a layer "
            f"(batch x heads x queries x keys), got {elements}; use shorter inputs or a smaller batch"
        )
    with torch.no_grad():
        dense = reference.attention_weights(query, key, first, last, scale, slopes, weights, scaling)
    return dense.to(query.dtype)


AttentionInterface.register(ATTENTION_NAME, asentmax_attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, asentmax_mask)
