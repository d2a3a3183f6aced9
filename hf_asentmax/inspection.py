"""What a checkpoint folder holds, from config.json and the headers of its weights: nothing is built or run.

Of the weights only the parameters of the query scale are read, so that a large model takes no longer than a small one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from . import modeling_asentmax
from .evaluation import markdown_table
from .methods import method_name
from .positions import alibi_slopes
from .scaling import QueryScale
from .validation import TensorEntry, check_checkpoint, check_weights_fit

LENGTHS = (64, 1024, 65536)  # the numbers n of visible keys at which r is given
_PARAMETER = re.compile(r"(?:.+\.)?layers\.(\d+)\.self_attn\.query_scale\.(.+)")
_KINDS = {
    "none": "none (r = 1)",
    "log": "log: r = s log(1 + n)",
    "static": "static: r = {delta:.3g} + softplus(b) log(1 + n)^({m}{c:g} tanh(d))",
    "adaptive": "adaptive: r = {delta:.3g} + softplus(b + w x) log(1 + n)^({m}{c:g} tanh(d + u x)), x the hidden state",
}


def inspect_checkpoint(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Tables of what a checkpoint is and has learned; yields the texts to print.

    Args:
        folder: a checkpoint folder, ASEntmax or softmax.

    Raises:
        FileNotFoundError, ValueError: there is no config.json; or, after the tables, the weights are not whole: a file
            is missing or damaged, or does not fit the model's class.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        check_checkpoint(folder)  # says what is missing, and the remedy
    config = AutoConfig.from_pretrained(folder)
    files: dict[str, dict[str, TensorEntry]] = {}
    problem = None
    try:
        files = check_checkpoint(folder)[1]
        if (model_class := _model_class(config)) is not None:
            with torch.device("meta"):
                model = model_class(config)
            check_weights_fit(folder, model, files)
    except (OSError, ValueError) as error:
        problem = error
    yield "\n".join(markdown_table(["checkpoint", str(folder)], _facts(folder, config, files, problem)))
    scales = {} if problem else read_query_scales(folder, config, files)
    if scales and (config.query_scaling != "none" or config.entmax_alpha_learned):
        yield "\n".join(_scale_table(config, scales))
        if config.query_scaling != "none":
            yield _scale_note(config)
    if problem is not None:
        raise problem


def read_query_scales(
    folder: str | os.PathLike[str], config: Any, files: Mapping[str, Mapping[str, TensorEntry]]
) -> dict[int, QueryScale]:
    """The query scale of each layer, float32; empty for a softmax checkpoint.

    Args:
        folder: a whole checkpoint.
        config: its config.
        files: its tensors by file, as ``check_checkpoint`` gives them.
    """
    states: dict[int, dict[str, Tensor]] = {}
    for file, entries in files.items():
        found = {name: match for name in entries if (match := _PARAMETER.fullmatch(name))}
        if found:
            with safe_open(Path(folder) / file, framework="pt") as weights:
                for name, match in found.items():
                    states.setdefault(int(match[1]), {})[match[2]] = weights.get_tensor(name)
    scales: dict[int, QueryScale] = {}
    for layer in sorted(states):
        scales[layer] = QueryScale(config)
        scales[layer].load_state_dict(states[layer])
    return scales


@torch.no_grad()
def scale_at(scale: QueryScale, config: Any, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    """r at each number of visible keys and hidden state zero, of the heads that it scales: (heads, lengths), float32.

    What "adaptive" adds for a query's hidden state is left out: this is what the biases alone give. Under NAPE the
    ALiBi heads keep r = 1 and are left out too.
    """
    r = scale(torch.zeros(1, len(lengths), config.hidden_size), torch.tensor([lengths]))[0][0]
    slopes = alibi_slopes(config.positions, config.num_attention_heads, torch.device("cpu"))
    return r[slopes == 0] if config.positions == "nape" and slopes is not None else r


def _model_class(config: Any) -> Any:
    """The class that config.json names, None where neither this package nor Transformers has it."""
    name = (config.architectures or [""])[0]
    return getattr(modeling_asentmax, name, None) or getattr(transformers, name, None)


def _facts(
    folder: Path, config: Any, files: dict[str, dict[str, TensorEntry]], problem: Exception | None
) -> Iterator[tuple[str, str]]:
    entries = {name: entry for of_file in files.values() for name, entry in of_file.items()}
    ours = hasattr(config, "entmax_alpha")
    yield "class", (config.architectures or ["not named in config.json"])[0]
    yield "family", config.family if ours else config.model_type
    top_k = getattr(config, "attention_top_k", None)
    yield "method", method_name(config) + (f", {top_k} keys a query" if top_k is not None else "")
    if ours:
        learned = f"learned, one a head, from {config.entmax_alpha:g}"
        yield "alpha", learned if config.entmax_alpha_learned else f"{config.entmax_alpha:g}"
        delta, c, m = config.query_scale_delta, config.query_scale_gamma_range, config.query_scale_gamma_center
        center = f"{m:g} + " if m else ""
        yield "query scale", _KINDS[config.query_scaling].format(delta=delta, c=c, m=center)
    yield "positions", config.positions if ours else "the family's own"
    yield "context", _context(config)
    if problem is None:
        count = {kind: sum(prod(entries[name].shape) for name in names) for kind, names in _kinds(entries).items()}
        dtypes = ", ".join(sorted({entry.dtype for entry in entries.values()}))
        scale = f", of the query scale {count['scale']:,}" if ours else ""
        yield "parameters", f"{sum(count.values()):,}{scale}; {dtypes}"
    else:
        yield "parameters", "unknown, since the weights are not whole"
    if ours:
        code = f"modeling_{config.model_type}.py"
        yield "remote code", f"yes, {code}" if (folder / code).is_file() else f"NO, {code} is missing"
    whole = f"yes, {len(files)} file{'s' if len(files) > 1 else ''}, whole"
    whole += "" if _model_class(config) else ", not compared with a class, since config.json names none that is known"
    yield "safetensors", whole if problem is None else f"NOT WHOLE: {problem}"


def _kinds(names: Mapping[str, Any]) -> dict[str, list[str]]:
    scale = [name for name in names if _PARAMETER.fullmatch(name)]
    return {"scale": scale, "others": sorted(set(names) - set(scale))}


def _context(config: Any) -> str:
    """How many tokens, and on which layers a window limits what is seen, and with it n."""
    length = getattr(config, "max_position_embeddings", None)
    text = "not in config.json" if length is None else f"{length:,} tokens"
    window = getattr(config, "sliding_window", None)
    if window is None:
        return text
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return f"{text}; a window of {window:,} on {kinds.count('sliding_attention')} of {len(kinds)} layers"


def _scale_table(config: Any, scales: Mapping[int, QueryScale]) -> list[str]:
    header = ["layer"]
    header += ["alpha by head"] if config.entmax_alpha_learned else []
    header += [f"r at n = {n:,}" for n in LENGTHS] if config.query_scaling != "none" else []
    lines = []
    for layer, scale in scales.items():
        line, alpha = [str(layer)], scale.alpha()
        if alpha is not None:
            line.append(" ".join(f"{value:.3f}" for value in alpha.tolist()))
        if config.query_scaling != "none":
            line += [f"{r.mean():.3g} ({r.min():.3g} to {r.max():.3g})" for r in scale_at(scale, config).unbind(1)]
        lines.append(line)
    return markdown_table(header, lines)


def _scale_note(config: Any) -> str:
    heads = "the NoPE heads, since the ALiBi heads keep r = 1" if config.positions == "nape" else "heads"
    note = f"r: mean (smallest to largest) over {heads}."
    if config.query_scaling == "adaptive":
        note += " Of the biases b and d alone (x = 0)."
    return note
