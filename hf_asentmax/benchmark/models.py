"""Training speed of whole models: a Llama of 120 million parameters, softmax with SDPA against ASEntmax; checkpoints.

Fresh weights attend almost evenly, so that hardly a block is without support; trained models aren't like that. The
setting ``topics`` comes nearer to them: each aligned run of 64 tokens is drawn from one cluster of the vocabulary, the
embeddings of a cluster share a direction, and queries are projected as keys are, so that a token looks for its own
cluster. What block sparsity that gives is measured and reported, for both. Of trained checkpoints it is that of text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ..adapters import load_causal_model
from ..configuration_asentmax import ASEntmaxLlamaConfig
from ..data import long_documents
from ..modeling_asentmax import ASEntmaxLlamaForCausalLM
from ..ops.operators import OP_NAMESPACE
from ..training import is_asentmax
from .inputs import BLOCK, Case, Support, measure_support, topic_share
from .timing import MIB, summary

ATTENTIONS = {"softmax_sdpa": None, "asentmax_nape": "nape", "asentmax_rope": "rope"}
SETTINGS = ("fresh", "topics")
SIZES = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2432,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "tie_word_embeddings": True,
}  # 120 million parameters
WARMUP_STEPS, TIMED_STEPS = 3, 8
LEARNING_RATE = 1e-5  # small: the weights, and so the sparsity, stay what they are
SHARED = 3.0  # size of a cluster's direction beside the rest of an embedding; some tens of keys then share the weight


@dataclass(frozen=True)
class ModelCase:
    """One whole-model measurement.

    Attributes:
        attention: a key of ATTENTIONS.
        context: tokens of a sequence.
        setting: "fresh" (random tokens) or "topics".
        block_sparsity: with "topics", what heads without positions are to have.
        step_tokens: tokens of a training step, in ``step_tokens // context`` sequences.
    """

    attention: str
    context: int
    setting: str = "fresh"
    block_sparsity: float = 0.9
    step_tokens: int = 32768

    def __post_init__(self) -> None:
        check_choices(self, attention=ATTENTIONS, setting=SETTINGS)
        check_context(self)

    @property
    def name(self) -> str:
        return f"{self.setting}_{self.context}"


@dataclass(frozen=True)
class CheckpointCase:
    """One measurement of a trained model on text.

    Attributes:
        checkpoint: folder or Hub id, also of an adapter; softmax or ASEntmax.
        context: tokens of a sequence, each from one document.
        data: the documents, as :func:`hf_asentmax.data.load_documents` takes them.
        step_tokens: tokens of a training step, in ``step_tokens // context`` sequences.
    """

    checkpoint: str
    context: int
    data: str
    setting: str = "text"
    step_tokens: int = 32768

    def __post_init__(self) -> None:
        check_context(self)

    @property
    def name(self) -> str:
        return f"{self.setting}_{self.context}"


def check_context(case: ModelCase | CheckpointCase) -> None:
    """Raise ValueError unless a step holds a sequence."""
    if not 1 <= case.context <= case.step_tokens:
        raise ValueError(f"context must be between 1 and step_tokens = {case.step_tokens}, got {case.context!r}")


def check_choices(case: Any, **allowed: Iterable[str]) -> None:
    """Raise ValueError unless each of these attributes is one of those allowed."""
    for name, values in allowed.items():
        if getattr(case, name) not in values:
            raise ValueError(f"{name} must be one of {', '.join(values)}, got {getattr(case, name)!r}")


def benchmark_model(
    case: ModelCase, *, seed: int, device: torch.device, sizes: dict[str, Any] = SIZES
) -> dict[str, Any]:
    """Train for some steps (bfloat16 weights, AdamW, no gradient checkpointing, no compilation) and time them.

    Args:
        case: what to train, and on what.
        seed: of the weights and tokens.
        device: where.
        sizes: arguments of the Llama configuration.

    Returns:
        A row: tokens_per_s (median, 10 and 90 %), parameters, peak_mib, and support (means over the layers; None for
        softmax), measured before the first step.
    """
    model, input_ids = build_model(case, seed=seed, device=device, sizes=sizes)
    return _row(case, case.attention) | _train(model, input_ids)


def benchmark_checkpoint(case: CheckpointCase, *, device: torch.device) -> dict[str, Any]:
    """Train a checkpoint on its documents for some steps, and time them; otherwise as :func:`benchmark_model`.

    Raises:
        ValueError: there are too few documents of so many tokens.
        OSError: the checkpoint or the documents are missing.
    """
    model = load_causal_model(case.checkpoint, dtype="bfloat16").to(device).train()
    sequences = case.step_tokens // case.context
    _, documents = long_documents(case.data, [case.checkpoint], case.context, most=sequences)
    parts = [ids[start : start + case.context] for ids in documents for start in range(0, len(ids), case.context)]
    whole = [part for part in parts if len(part) == case.context][:sequences]
    if len(whole) < sequences:
        raise ValueError(
            f"data must hold {sequences} parts of {case.context:,} tokens, none of two documents, got {len(whole)} in "
            f"{case.data}; give more documents"
        )
    return _row(case, case.checkpoint) | _train(model, torch.tensor(whole, device=device))


def _row(case: ModelCase | CheckpointCase, implementation: str) -> dict[str, Any]:
    return {"case": case.name, "implementation": implementation, "settings": asdict(case)}


def _train(model: Any, input_ids: Tensor) -> dict[str, Any]:
    """The measured part of a row; the model trains on these tokens, the same in each step."""
    device = input_ids.device
    row: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "support": asdict(model_support(model, input_ids[:1])) if is_asentmax(model) else None,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=device.type == "cuda")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(WARMUP_STEPS + TIMED_STEPS):
        start = time.perf_counter()
        model(input_ids, labels=input_ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    row["tokens_per_s"] = summary([input_ids.numel() / seconds for seconds in times[WARMUP_STEPS:]])
    row["first_step_s"] = times[0]
    row["peak_mib"] = torch.cuda.max_memory_allocated() / MIB if device.type == "cuda" else None
    return row


@torch.no_grad()
def build_model(
    case: ModelCase, *, seed: int, device: torch.device, sizes: dict[str, Any] = SIZES
) -> tuple[PreTrainedModel, Tensor]:
    """The model in bfloat16 and one step's tokens (sequences, context)."""
    torch.manual_seed(seed)
    positions = ATTENTIONS[case.attention]
    model: Any
    with device:  # a billion weights take the host many seconds
        if positions is None:
            config = LlamaConfig(**sizes, max_position_embeddings=case.context)
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        else:
            own = ASEntmaxLlamaConfig(**sizes, max_position_embeddings=case.context, positions=positions)
            model = ASEntmaxLlamaForCausalLM(own)
    model.to(torch.bfloat16)
    vocabulary, sequences = sizes["vocab_size"], case.step_tokens // case.context
    input_ids = torch.randint(vocabulary, (sequences, case.context))
    if case.setting == "topics":
        share = topic_share(Case("model", 1, 1, 1, case.context, 64, case.block_sparsity))
        clusters = int(1 / share + 1e-9)
        blocks = math.ceil(case.context / BLOCK)
        cluster = torch.randint(clusters, (sequences, blocks)).repeat_interleave(BLOCK, 1)[:, : case.context]
        # Token t belongs to cluster t % clusters.
        input_ids = torch.randint(vocabulary // clusters, input_ids.shape) * clusters + cluster
        embeddings = model.get_input_embeddings().weight
        direction = torch.randn(clusters, sizes["hidden_size"]).to(embeddings) * embeddings.std() * SHARED
        embeddings += direction[torch.arange(vocabulary, device=device) % clusters]
        for layer in model.model.layers:
            heads = layer.self_attn.k_proj.weight.unflatten(0, (-1, layer.self_attn.head_dim))
            each = heads.repeat_interleave(layer.self_attn.num_key_value_groups, 0)  # a query head as its keys' head
            layer.self_attn.q_proj.weight.copy_(each.flatten(0, 1))
    return model, input_ids.to(device)


@torch.no_grad()
def model_support(model: PreTrainedModel, input_ids: Tensor) -> Support:
    """What the attention of a model leaves, as means over its layers.

    Raises:
        RuntimeError: no ASEntmax attention was run.
    """
    with _SupportOfCalls() as calls:
        model.base_model(input_ids, use_cache=False)
    if not calls.found:
        raise RuntimeError(f"{type(model).__name__} must run ASEntmax attention, got none; give an ASEntmax model")
    names = ("block_sparsity", "zero_share", "mean_support")
    means = {name: fmean(getattr(one, name) for one in calls.found) for name in names}
    return replace(calls.found[0], **means)


class _SupportOfCalls(TorchDispatchMode):
    """While it is entered, measures each call of the attention operator."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Support] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == f"{OP_NAMESPACE}::entmax_attention":
            given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
            names = ("scaling", "query_scale", "alibi_slopes")
            options = {name: given[name] for name in names}
            alpha, heads = given["alpha"], given["query"].shape[1]
            options["alpha"] = given["alpha_value"] if alpha is None else alpha.expand(heads).tolist()
            found = measure_support(given["query"], given["key"], **options, max_scores=1 << 32)
            self.found.append(found)
        return func(*args, **(kwargs or {}))
