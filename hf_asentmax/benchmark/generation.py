"""Speed of ``generate()`` by length of the prompt: a Llama of 1.1 billion parameters, softmax (SDPA) against ASEntmax.

The attention is that of the setting ``topics`` of :mod:`hf_asentmax.benchmark.models`. The clock is read after every
token, by a stopping criterion: the first token ends the prefill, the others are decoded one at a time.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from .models import ATTENTIONS, ModelCase, build_model, check_choices, model_support
from .timing import MIB, summary

CACHES = ("dynamic", "static")  # Transformers compiles the decoding of a static cache on a GPU
SIZES = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
WARMUP, ROUNDS = 1, 3  # calls; compilation and the recording of CUDA graphs fall into the first


@dataclass(frozen=True)
class GenerationCase:
    """One measurement of ``generate()``, of one sequence.

    Attributes:
        attention: a key of ATTENTIONS.
        prompt: tokens of the prompt.
        cache: one of CACHES.
        new_tokens: tokens that are written, the first one included.
        block_sparsity: what heads without positions are to have over the prompt.
    """

    attention: str
    prompt: int
    cache: str
    new_tokens: int = 65
    block_sparsity: float = 0.9

    def __post_init__(self) -> None:
        check_choices(self, attention=ATTENTIONS, cache=CACHES)
        for name, least in (("prompt", 1), ("new_tokens", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)!r}")

    @property
    def name(self) -> str:
        return f"{self.cache}_{self.prompt}"


class _Clock(StoppingCriteria):
    """Reads the clock after each token, when the device is done; never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def benchmark_generation(
    case: GenerationCase, *, seed: int, device: torch.device, sizes: dict[str, Any] = SIZES
) -> dict[str, Any]:
    """Time ``generate()`` in bfloat16, greedy, one sequence.

    Args:
        case: what to time.
        seed: of the weights and tokens.
        device: where.
        sizes: arguments of the Llama configuration.

    Returns:
        A row: prefill_ms and tokens_per_s of the decoding (median, 10 and 90 % of the calls), parameters, peak_mib, and
        support (means over the layers, of the prompt; None for softmax).
    """
    shape = ModelCase(case.attention, case.prompt, "topics", case.block_sparsity, step_tokens=case.prompt)
    model, input_ids = build_model(shape, seed=seed, device=device, sizes=sizes)
    row: dict[str, Any] = {
        "case": case.name,
        "implementation": case.attention,
        "settings": asdict(case),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "support": None if ATTENTIONS[case.attention] is None else asdict(model_support(model, input_ids)),
    }
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": case.new_tokens}
    options |= {"min_new_tokens": case.new_tokens, "attention_mask": torch.ones_like(input_ids)}
    options |= {} if case.cache == "dynamic" else {"cache_implementation": case.cache}
    prefill, speed = [], []
    for number in range(WARMUP + ROUNDS):
        clock = _Clock()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        model.generate(input_ids, stopping_criteria=StoppingCriteriaList([clock]), **options)  # type: ignore[operator]
        if number >= WARMUP:
            prefill.append(1e3 * (clock.times[0] - start))
            speed.append((len(clock.times) - 1) / (clock.times[-1] - clock.times[0]))
    row["prefill_ms"], row["tokens_per_s"] = summary(prefill), summary(speed)
    row["peak_mib"] = torch.cuda.max_memory_allocated() / MIB if device.type == "cuda" else None
    return row
