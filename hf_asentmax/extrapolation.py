"""Beyond the trained length without training: YaRN and dynamic NTK, by Transformers' own rope parameters; in blocks.

Bare RoPE fails beyond the length it was trained at, so a comparison at such lengths needs these. Nothing is written:
the config is changed when the model is loaded. In blocks: :mod:`hf_asentmax.blocks`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .adapters import load_causal_model, load_config
from .blocks import check_block
from .evaluation import model_names

T = TypeVar("T")
BARE = "none"
ROPE_TYPES = ("yarn", "dynamic")  # as Transformers calls them
ROPE_HELP = (
    "RoPE beyond the trained length, for all models or one for each: none, yarn:FACTOR, or dynamic:FACTOR (NTK; "
    "dynamic:1 fits the base to each length). FACTOR is the longest length by the trained one. yarn:FACTOR:1 doesn't "
    "sharpen attention, as YaRN does for softmax: for ASEntmax."
)
BLOCKS = "blocks"
BLOCK_HELP = (
    "Read all but the last so many tokens in blocks of so many that don't see each other, for all models or one for "
    "each; 0: whole. The trained length, with RoPE half of it or less. Softmax may gain by YaRN's attention factor "
    "alone (--rope yarn:1:1.3 for 20 times the trained length), ASEntmax doesn't."
)


def rope_choices(given: Sequence[str] | None, models: Sequence[str]) -> list[str]:
    """What to do with each model's RoPE; one choice is for all models, None is "none".

    Raises:
        ValueError: there are neither one nor as many choices as models.
    """
    return _for_each("rope", given or [BARE], models)


def _for_each(what: str, given: Sequence[T], models: Sequence[str]) -> list[T]:
    if len(given) not in (1, len(models)):
        raise ValueError(
            f"{what} must be given once or for each of the {len(models)} models, got {list(given)!r}; correct it"
        )
    return list(given) * (len(models) // len(given))


def extend_rope(config: PretrainedConfig, choice: str) -> None:
    """Set the rope parameters of a config that has plain RoPE.

    L is the config's ``max_position_embeddings``, the trained length, which stays as it is. "yarn:s" computes s L
    positions at every length: high frequencies stay, low ones are divided by s, and cos and sin are multiplied by
    0.1 ln s + 1, which was fitted to softmax; "yarn:s:a" multiplies them by a. "dynamic:s" changes nothing up to L; for
    a sequence of n > L tokens the base is multiplied by (s n / L - (s - 1))^(d / (d - 2)), where d is the number of
    rotated dims: with s = 1 the NTK-aware base of n itself.

    Args:
        config: of a causal language model; changed in place.
        choice: "none", "yarn:s", "yarn:s:a" or "dynamic:s" with s >= 1 and a > 0.

    Raises:
        ValueError: the choice is none of these, or the model has no RoPE, or one that is scaled already or differs by
            layer.

    Reference: arXiv 2309.00071 (YaRN; dynamic NTK in its section 3.3).
    """
    if choice == BARE:
        return
    kind, *texts = choice.split(":")
    try:
        factor, *attention = map(float, texts)
    except ValueError:
        factor, attention = math.nan, []
    known = {"yarn": len(attention) < 2 and all(0 < a < math.inf for a in attention), "dynamic": not attention}
    if not known.get(kind) or not 1 <= factor < math.inf:
        raise ValueError(
            "rope must be none, yarn:FACTOR, yarn:FACTOR:ATTENTION or dynamic:FACTOR, FACTOR at least 1 and ATTENTION "
            f"above 0, got {choice!r}; try yarn:8"
        )
    old = getattr(config, "rope_parameters", None)
    positions = getattr(config, "positions", "rope")
    if not old or positions != "rope":
        found = "no rope_parameters" if positions == "rope" else f"positions {positions!r}"
        raise ValueError(f"rope must be none for a model without RoPE, got {choice!r} and {found}; leave it out")
    if old.get("rope_type") != "default":
        raise ValueError(
            f"rope must be none for a model whose RoPE is not plain, got {choice!r} and {old}; leave it out"
        )
    new = old | {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        new["original_max_position_embeddings"] = config.max_position_embeddings
    if attention:
        new["attention_factor"] = attention[0]
    config.rope_parameters = new


def load_extended(source: str, choice: str = BARE, *, dtype: str = "float32", device: Any = "cpu") -> Any:
    """A causal language model in eval mode, its RoPE as :func:`extend_rope` says.

    Args:
        source: folder or Hub id, also of an adapter.
        choice: "none", "yarn:FACTOR" or "dynamic:FACTOR".
        dtype: name of the weights' dtype.
        device: where to.

    Raises:
        ValueError: as `extend_rope`.
        OSError: there is no such model.
    """
    config = load_config(source)
    extend_rope(config, choice)
    return load_causal_model(source, config=config, dtype=dtype).to(device).eval()


@torch.no_grad()
def set_context(model: PreTrainedModel, tokens: int) -> None:
    """Give dynamic RoPE the frequencies of a sequence of so many tokens; of any other model nothing changes.

    Left alone, Transformers keeps those of the longest sequence seen so far, and while a longer one is generated it
    changes them under keys that were rotated before and lie in the cache.

    Args:
        model: a causal language model.
        tokens: of the next sequences, what will be generated included.
    """
    parameters = getattr(model.config, "rope_parameters", None) or {}
    if parameters.get("rope_type") == "dynamic":
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        for place in (0, tokens - 1):  # a short sequence sets them back, a position beyond L moves them on
            model.base_model(input_ids=token, position_ids=torch.full_like(token, place), use_cache=False)


@dataclass(frozen=True)
class Reading:
    """A model, and how it reads texts longer than those that it was trained on.

    Attributes:
        source: folder or Hub id, also of an adapter.
        name: what to call it; None: by its method.
        rope: what its RoPE becomes, as :func:`extend_rope` takes it.
        block: tokens of the blocks it reads in (:mod:`hf_asentmax.blocks`); 0: whole.
    """

    source: str
    name: str | None
    rope: str
    block: int

    def load(self, *, dtype: str, device: Any) -> Any:
        return load_extended(self.source, self.rope, dtype=dtype, device=device)

    def label(self, method: str) -> dict[str, str]:
        """Columns model and method of its results; where it has no name, the method's tail says how it reads."""
        tail = ("" if self.rope == BARE else f", {self.rope}") + (f", {BLOCKS}:{self.block}" if self.block else "")
        return {"model": self.source + tail, "method": self.name or method + tail}


def readings(
    models: Sequence[str], names: Sequence[str] | None, rope: Sequence[str] | None, block: Sequence[int]
) -> list[Reading]:
    """Each model with its name and choices, checked against its config before anything takes time.

    Raises:
        ValueError: there are neither one nor as many of them as models, or a model can't be read so.
        OSError: there is no such model.
    """
    ropes, blocks = rope_choices(rope, models), _for_each("block", block, models)
    found = [Reading(*each) for each in zip(models, model_names(names, models), ropes, blocks, strict=True)]
    for reading in found:
        config = load_config(reading.source)
        extend_rope(config, reading.rope)
        if reading.block:
            check_block(config, reading.block)
    return found


def tail_of(model: str) -> str:
    """What `Reading.label` put behind a model's source, "" where nothing."""
    tail = re.search(rf"(, ({'|'.join(ROPE_TYPES)}):[^, ]+)?(, {BLOCKS}:\d+)?$", model)
    return tail[0] if tail else ""
