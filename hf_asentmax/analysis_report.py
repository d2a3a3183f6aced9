"""What ``hf-asentmax plot`` does: runs models over inputs of several lengths, and writes tables and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from .adapters import load_causal_model, load_config
from .analysis import attention_maps, attention_statistics, head_rows, join_statistics
from .analysis_plots import (
    Row,
    plot_heads,
    plot_learned_alpha,
    plot_maps,
    plot_model_dispersion,
    plot_scale,
    plot_sparsity,
    spread_evenly,
)
from .analysis_tables import BENCHMARK_SPARSITY, FINAL_TOKENS, heads_table, scale_table, summary_table
from .checkpoints import write_json
from .data import long_documents
from .formula_plots import FORMULA_FIGURES, dispersion_rows
from .methods import method_name
from .options import option
from .patching import patch_model
from .positions import alibi_slopes
from .pruning import zero_heads
from .scale_fits import fit_scale, scale_points
from .tasks import IGNORED, load_task, sample_batch

MODEL_FIGURES = ("scale", "learned_alpha", "model_dispersion", "sparsity", "heads", "map")
FIGURES = (*FORMULA_FIGURES, *MODEL_FIGURES)
MAPS = 4  # heads in the picture of maps
_CHARACTERS = 16  # of a text that are read for each token needed: more than tokenizers take for one


@dataclass
class AnalysisArguments:
    """What to look into. Without --model: the pictures of formulas."""

    model: list[str] = option(
        [], "Folders or Hub ids of causal language models or their adapters, softmax or ASEntmax."
    )
    figures: list[str] = option(
        [],
        f"Pictures. Of formulas: {', '.join(FORMULA_FIGURES)}. Of models: {', '.join(MODEL_FIGURES)}. By default all "
        "that the models allow.",
        FIGURES,
    )
    text: str | None = option(
        None, "Text file to read; without it, the validation stream of the task in the task.json of the model's folder."
    )
    data: str | None = option(
        None,
        "Held-out documents in place of a text, as for `hf-asentmax evaluate perplexity`: of those that hold the "
        "longest length the last tokens, so that the final queries are the same at every length.",
    )
    text_column: str = option("text", "Column of --data with the text; where it is missing: tokens of 'input_ids'.")
    lengths: list[int] = option(
        [64, 256, 1024],
        "Tokens: of the text or document, or of the task's source. Beyond the trained length as far as you like.",
    )
    samples: int = option(4, "Sequences at each length; time goes with their number and the square of the length.")
    method: list[str] = option([], "Names of the models in tables and pictures; by default the kind of attention.")
    map_length: int = option(64, "Length of the sequence of the attention maps.")
    heads: list[str] = option([], "Heads of the maps as layer:head, both from 0; by default some evenly chosen ones.")
    seed: int = option(0, "Seed of the task's sequences.")
    dtype: str = option("float32", "Dtype of the weights.", ("float32", "bfloat16", "float16"))
    device: str | None = option(None, "cpu or cuda; by default the GPU where there is one.")
    output_dir: str = option("runs/analysis", "Gets the pictures, results.json and results.md.")


def run_analysis(args: AnalysisArguments) -> Iterator[str]:
    """Measure, draw and write; yields the texts to print.

    Raises:
        ValueError: a figure is asked for that the models don't allow, or an argument doesn't fit.
        OSError: a file is missing.
    """
    names = _check(args)
    cut: dict[str, list[tuple[int, int]]] = {}
    wanted = args.figures or [*FORMULA_FIGURES, *(MODEL_FIGURES if args.model else ())]
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    scales: list[Row] = []
    pictures: list[Path] = []
    maps: dict[str, dict[tuple[int, int], Tensor]] = {}
    for source, name in zip(args.model, names, strict=True):
        model = load_model(source, args.dtype, args.device)
        cut[name] = cut_heads(model)
        if "map" in wanted:
            ids, _ = _sequences(source, args, args.map_length, 1)
            maps[name] = attention_maps(model, ids.to(model.device), _chosen_heads(args.heads, model.config, cut[name]))
        if set(wanted) & set(MODEL_FIGURES) - {"map"}:
            own, own_scales = _measure(model, source, name, args, cut[name])
            rows, scales = rows + own, scales + own_scales
            pictures += _draw_model(model.config, name, own, own_scales, wanted, folder)
    pictures += [FORMULA_FIGURES[name](folder / f"{name}.png") for name in wanted if name in FORMULA_FIGURES]
    if rows and "model_dispersion" in wanted:
        pictures.append(plot_model_dispersion(rows, folder / "model_dispersion.png"))
    if rows and "sparsity" in wanted:
        pictures.append(plot_sparsity(rows, folder / "sparsity.png", benchmark=BENCHMARK_SPARSITY))
    if maps:
        pictures.append(plot_maps(maps, folder / "map.png"))
    formula = dispersion_rows() if "dispersion" in wanted else []
    results = {"settings": asdict(args), "cut": cut, "heads": rows, "scale": scales, "formula": formula}
    write_json(folder / "results.json", results)
    if rows:
        tables = [summary_table(rows), *([scale_table(scales)] if scales else [])]
        text = "\n\n".join([*tables, heads_table(rows)])
        (folder / "results.md").write_text(text + "\n", encoding="utf-8")
        yield from tables
    yield from (f"{name}: {len(heads)} heads are cut and left out" for name, heads in cut.items() if heads)
    yield f"written to {folder}: {', '.join(['results.json', *(['results.md'] if rows else [])])} and " + ", ".join(
        path.name for path in pictures
    )


def _check(args: AnalysisArguments) -> list[str]:
    """The models' names. Raises before anything is measured."""
    for name, least in (("lengths", 16), ("samples", 1), ("map_length", 2)):
        value = getattr(args, name)
        if not value or min(value if isinstance(value, list) else [value]) < least:
            raise ValueError(f"{name} must be at least {least}, got {value!r}; correct it")
    if args.text is not None and args.data is not None:
        raise ValueError(f"text must be None where --data is given, got {args.text!r}; give one of them")
    if not args.model and (unfit := [name for name in args.figures if name in MODEL_FIGURES]):
        raise ValueError(f"figures must be of formulas where no model is given, got {unfit!r}; give --model")
    if args.method and len(args.method) != len(args.model):
        raise ValueError(f"method must name each of the {len(args.model)} models, got {args.method!r}; name them all")
    configs = [load_config(source) for source in args.model]
    names = args.method or [method_name(config) for config in configs]
    if len(set(names)) < len(names):
        raise ValueError(f"method must name each model differently, got {names!r}; name them with --method")
    learned = {
        "scale": any(getattr(config, "query_scaling", "none") != "none" for config in configs),
        "learned_alpha": any(getattr(config, "entmax_alpha_learned", False) for config in configs),
    }
    for figure in args.figures:
        if not learned.get(figure, True):
            raise ValueError(f"figures must be of what a model has, got {figure!r} of {names!r}; leave it out")
    return names


def load_model(source: str, dtype: str = "float32", device: str | None = None) -> Any:
    """A causal language model whose attention can be looked into; a softmax one computes what it did before."""
    model = load_causal_model(source, dtype=dtype)
    if not hasattr(model.config, "entmax_alpha"):
        patch_model(model, method="softmax")
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _sequences(source: str, args: AnalysisArguments, length: int, samples: int) -> tuple[Tensor, Tensor]:
    """Tokens (samples, T), and which queries are final: those that predict a task's answer, or the last of a text."""
    final = (torch.arange(length) >= length - FINAL_TOKENS).expand(samples, -1)
    if args.data is not None:
        longest = max(*args.lengths, length)
        read, documents = long_documents(args.data, [source], longest, column=args.text_column, most=samples)
        if len(documents) < samples:
            raise ValueError(
                f"samples must be at most the {len(documents)} documents of {read} that hold {longest} tokens, got "
                f"{samples}; lower --samples or --lengths"
            )
        return torch.tensor([ids[-length:] for ids in documents]), final
    if args.text is None:
        if not (Path(source) / "task.json").is_file():
            raise ValueError(
                f"text must be given for {source}, which has no task.json, got None; give --text or --data"
            )
        task = load_task(None, source)
        one = [sample_batch(task, 1, length, stream="validation", seed=args.seed, index=i) for i in range(samples)]
        ids, labels = (torch.cat([batch[name] for batch in one]) for name in ("input_ids", "labels"))
        return ids, torch.nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1))
    needed = samples * length
    with open(args.text, encoding="utf-8") as file:
        text = file.read(needed * _CHARACTERS)
    tokens = AutoTokenizer.from_pretrained(source)(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(tokens) < needed:
        raise ValueError(
            f"text must hold samples x length = {needed} tokens, got {len(tokens)} in {args.text}; lower --samples or "
            "--lengths, or give a longer text"
        )
    return torch.tensor(tokens[:needed]).view(samples, length), final


def _measure(
    model: Any, source: str, name: str, args: AnalysisArguments, cut: list[tuple[int, int]]
) -> tuple[list[Row], list[Row]]:
    """Rows by length, layer and head; and r against n with its fits at the longest length. Heads cut are left out."""
    kinds = head_kinds(model.config)
    rows: list[Row] = []
    for length in sorted(set(args.lengths)):
        ids, final = _sequences(source, args, length, args.samples)
        total = args.samples * model.config.num_hidden_layers
        with tqdm(total=total, desc=f"{name}, {length} tokens", unit=" layers", leave=False) as bar:
            found = [attention_statistics(model, one[None].to(model.device), progress=bar.update) for one in ids]
        layers = [join_statistics(parts) for parts in zip(*found, strict=True)]
        about = {"model": name, "length": length}
        own = [row for row in head_rows(layers, final) if (row["layer"], row["head"]) not in cut]
        rows += [about | {"kind": kinds[row["head"]]} | row for row in own]
    scales: list[Row] = []
    for number, layer in enumerate(layers if model.config.query_scaling != "none" else []):
        points = scale_points(layer.n, layer.query_scale)
        for head, kind in enumerate(kinds):
            unscaled = kind == "ALiBi" and model.config.positions == "nape"
            if not unscaled and (number, head) not in cut:
                n, r = points["n"], points["r"][head]
                fits = fit_scale(torch.tensor(n), torch.tensor(r))
                about = {"model": name, "layer": number, "head": head, "kind": kind}
                scales.append(about | {"n": n, "r": r, "fits": fits})
    return rows, scales


def head_kinds(config: Any) -> list[str]:
    """What each head knows of positions: RoPE, NoPE or ALiBi."""
    slopes = alibi_slopes(config.positions, config.num_attention_heads, torch.device("cpu"))
    if slopes is None:
        return [{"rope": "RoPE", "nope": "NoPE"}[config.positions]] * config.num_attention_heads
    return ["ALiBi" if slope > 0 else "NoPE" for slope in slopes.tolist()]


def cut_heads(model: Any) -> list[tuple[int, int]]:
    """Layer and number of each head that writes nothing (:func:`hf_asentmax.pruning.zero_heads`)."""
    zero = zero_heads(model).items()
    cut = [(model.get_submodule(name).layer_idx, head) for name, heads in zero for head in heads]
    if len(cut) == model.config.num_hidden_layers * model.config.num_attention_heads:
        raise ValueError(
            f"model must have a head that writes something, got all {len(cut)} cut; give another checkpoint"
        )
    return cut


def _chosen_heads(names: Sequence[str], config: Any, cut: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    everyone = [(i, j) for i in range(config.num_hidden_layers) for j in range(config.num_attention_heads)]
    if not names:
        return spread_evenly([head for head in everyone if head not in cut], MAPS)
    known = {f"{layer}:{head}": (layer, head) for layer, head in everyone}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"heads must be layer:head up to {list(known)[-1]}, got {unknown!r}; correct them")
    return [known[name] for name in names]


def _draw_model(
    config: Any, name: str, rows: list[Row], scales: list[Row], wanted: Sequence[str], folder: Path
) -> list[Path]:
    """The pictures of one model, those of them that it has something for."""
    pictures = []
    if "scale" in wanted and scales:
        path = folder / f"scale_{name}.png"
        pictures.append(plot_scale(scales, path, train_length=config.max_position_embeddings))
    if "learned_alpha" in wanted and config.entmax_alpha_learned:
        path = folder / f"learned_alpha_{name}.png"
        pictures.append(plot_learned_alpha(rows, path, title=f"{name}: learned alpha"))
    if "heads" in wanted:
        title = f"{name}: support size (above), block sparsity (below)"
        pictures.append(plot_heads(rows, folder / f"heads_{name}.png", title=title))
    return pictures
