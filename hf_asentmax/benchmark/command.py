"""What ``scripts/benchmark_attention.py`` does: chooses cases, runs them, and keeps the results as they come."""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..checkpoints import write_json
from ..options import option
from .cases import benchmark_case
from .decoding import DecodeCase, benchmark_decoding
from .generation import CACHES, GenerationCase, benchmark_generation
from .implementations import IMPLEMENTATIONS
from .inputs import CASES, PATTERNS, Case
from .models import ATTENTIONS, SETTINGS, CheckpointCase, ModelCase, benchmark_checkpoint, benchmark_model
from .report import OURS, case_table, decoding_table, generation_table, models_table, plot_benchmark, tables

SWEEPS = ("lengths", "sparsity")
TARGETS = tuple(name for name in CASES if name != "huge")
KEPT = ("runs", "rows", "decoding", "models", "generation")  # what results.json holds
DEFAULTS = {
    "cuda": [name for name in IMPLEMENTATIONS if name != "sdpa_math"],
    "cpu": ["asentmax", "sdpa_math"],
}


@dataclass
class BenchmarkArguments:
    """What to measure. Without --cases, --sweep, --decode, --models, --checkpoints, --generation, --plot: all cases."""

    cases: list[str] = option(
        [],
        f"Cases by name; 'all' is {', '.join(TARGETS)}; 'huge' is 32 heads at 128K tokens, for its memory; 'custom' is "
        "the case of --batch to --pattern.",
        ("all", "custom", *CASES),
    )
    nape: bool = option(False, "Time each of --cases again with ALiBi slopes on the first half of the heads (NAPE).")
    sweep: list[str] = option(
        [], "'lengths': time against N; 'sparsity': ratios against block sparsity; of the custom case.", SWEEPS
    )
    decode: list[int] = option(
        [],
        "Keys in the cache, such as 4096 65536 262144: time one decoding step of --batch sequences, 32 heads (8 "
        "key/value) of 128; more than one sequence also padded on the left, ragged.",
    )
    models: bool = option(
        False, "Training tokens/s of a 120M Llama: ASEntmax with NAPE and with RoPE, and softmax with SDPA."
    )
    checkpoints: list[str] = option(
        [],
        "Folders or Hub ids of trained models: training tokens/s of each on the documents of --data. What the others "
        "are compared with is the first that has Transformers' own softmax.",
    )
    data: str | None = option(
        None, "Documents of --checkpoints, as long as --contexts: a file, glob, folder or Hub id with a column 'text'."
    )
    generation: bool = option(
        False,
        "Speed of generate() by length of the prompt, prefill and decoding: a 1.04B Llama with the same attentions.",
    )
    implementations: list[str] = option(
        [], "What to compare; by default all that run on the device, sdpa_math only on a CPU.", tuple(IMPLEMENTATIONS)
    )
    lengths: list[int] = option([2048, 4096, 8192, 16384, 32768, 65536], "Tokens of --sweep lengths.")
    sparsities: list[float] = option([0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98], "Block sparsities of --sweep sparsity.")
    contexts: list[int] = option(
        [2048, 8192, 32768], "Context lengths of --models and --checkpoints; a step takes 32768 tokens."
    )
    prompts: list[int] = option([4096, 32768, 131072], "Tokens of the prompt of --generation.")
    caches: list[str] = option(
        list(CACHES), "Caches of --generation; Transformers compiles the decoding of a static one.", CACHES
    )
    model_settings: list[str] = option(
        list(SETTINGS),
        "--models on 'fresh' weights and random tokens (nearly dense), or on 'topics' (of --block_sparsity).",
        SETTINGS,
    )
    batch: int = option(1, "Custom case, --decode: sequences.")
    heads: int = option(8, "Custom case: query heads.")
    kv_heads: int = option(8, "Custom case: key/value heads.")
    tokens: int = option(32768, "Custom case: tokens N.")
    head_dim: int = option(64, "Custom case: head dim D.")
    block_sparsity: float = option(
        0.9, "Custom case, topics of --models: share of visible 64 x 64 blocks without support. What comes is measured."
    )
    pattern: str = option("topics", "Custom case: topics, or topics + attention sink + band of 256 tokens.", PATTERNS)
    device: str = option("cuda", "'cpu' is for trying the script at tiny sizes.", tuple(DEFAULTS))
    dtype: str = option("bfloat16", "Of the attention's inputs.", ("bfloat16", "float16", "float32"))
    seed: int = option(0, "Of inputs and weights.")
    compile_only: bool = option(
        False,
        "Check and compile, time nothing, write nothing. Several such processes side by side fill Triton's cache, "
        "faster than one run that compiles all in turn.",
    )
    output_dir: str = option("runs/benchmark", "Folder for results.json, results.md and the picture benchmark.png.")
    plot: str | None = option(None, "Draw the picture of this results.json beside it and stop; needs no GPU.")

    def chosen_cases(self) -> list[Case]:
        """The attention cases in order: the named ones, each followed by its twin with slopes, then the sweeps."""
        sizes = (self.batch, self.heads, self.kv_heads, self.tokens, self.head_dim, self.block_sparsity, self.pattern)
        nothing = not (self.cases or self.sweep or self.decode or self.models or self.checkpoints or self.generation)
        names = [each for name in self.cases or (["all"] if nothing else []) for each in _named(name)]
        cases = [Case("custom", *sizes) if name == "custom" else CASES[name] for name in dict.fromkeys(names)]
        if self.nape:
            cases = [twin for case in cases for twin in (case, replace(case, name=f"{case.name}_nape", nape=True))]
        if "lengths" in self.sweep:
            cases += [Case(f"lengths_{n}", *sizes[:3], n, *sizes[4:]) for n in self.lengths]
        if "sparsity" in self.sweep:
            cases += [Case(f"sparsity_{share:g}", *sizes[:5], share, self.pattern) for share in self.sparsities]
        return cases

    def chosen_decoding(self) -> list[DecodeCase]:
        """The decoding steps in order."""
        padding = (False, True) if self.batch > 1 else (False,)
        return [
            DecodeCase(self.batch, keys, ragged) for keys in self.decode for ragged in padding if not self.compile_only
        ]

    def chosen_models(self) -> list[ModelCase]:
        """The whole-model cases in order."""
        return [
            ModelCase(attention, context, setting, self.block_sparsity)
            for setting in self.model_settings
            for context in self.contexts
            for attention in ATTENTIONS
            if self.models and not self.compile_only
        ]

    def chosen_checkpoints(self) -> list[CheckpointCase]:
        """The measurements of checkpoints in order.

        Raises:
            ValueError: there are no documents to train on.
        """
        if self.checkpoints and self.data is None:
            raise ValueError("data must name the documents that the checkpoints train on, got None; give --data")
        return [
            CheckpointCase(checkpoint, context, str(self.data))
            for context in self.contexts
            for checkpoint in self.checkpoints
            if not self.compile_only
        ]

    def chosen_generation(self) -> list[GenerationCase]:
        """The measurements of generate() in order."""
        return [
            GenerationCase(attention, prompt, cache, block_sparsity=self.block_sparsity)
            for prompt in self.prompts
            for cache in self.caches
            for attention in ATTENTIONS
            if self.generation and not self.compile_only
        ]


def _named(name: str) -> tuple[str, ...]:
    return TARGETS if name == "all" else (name,)


def run_benchmark(args: BenchmarkArguments) -> Iterator[str]:
    """Run what the arguments ask for; gives the table of each case when it is done, then the path of the report.

    results.json in the output folder is written after each case. Results of other cases that are there already stay,
    so a benchmark may be run in parts; each row names its run, and only times of one run are compared.

    Raises:
        ValueError: a setting can't be, or the device isn't there.
        RuntimeError: at the end, if ours was wrong or failed.
    """
    if args.plot is not None:
        path = Path(args.plot)
        yield f"written: {plot_benchmark(read_results(path), path.with_name('benchmark.png'))}"
        return
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device must be one that is there, got 'cuda' without a GPU that PyTorch can use; run on a machine with an "
            "NVIDIA GPU, draw former results with --plot results.json, or try --device cpu --cases custom --tokens 2048"
        )
    cases, generation = args.chosen_cases(), args.chosen_generation()
    models: list[ModelCase | CheckpointCase] = [*args.chosen_models(), *args.chosen_checkpoints()]
    chosen = [IMPLEMENTATIONS[name] for name in args.implementations or DEFAULTS[device.type]]
    path = Path(args.output_dir) / "results.json"
    results = read_results(path)
    results["runs"].append(_about(args, device))
    bad = []
    for case in tqdm(cases, desc="attention", unit="case", disable=not cases):
        rows = benchmark_case(
            case,
            chosen,
            seed=args.seed,
            device=device,
            dtype=getattr(torch, args.dtype),
            compile_only=args.compile_only,
        )
        rows = [row | {"run": len(results["runs"]) - 1} for row in rows]
        _replace(results["rows"], rows)
        if not args.compile_only:
            _write(results, path)
        bad += [case.name for row in rows if row["implementation"] == OURS and row["status"] != "ok"]
        yield case_table(rows, results["rows"])
    for step in tqdm(args.chosen_decoding(), desc="decoding", unit="case", disable=not args.decode):
        rows = benchmark_decoding(step, chosen, seed=args.seed, device=device, dtype=getattr(torch, args.dtype))
        rows = [row | {"run": len(results["runs"]) - 1} for row in rows]
        _replace(results["decoding"], rows)
        _write(results, path)
        bad += [step.name for row in rows if row["implementation"] == OURS and row["status"] != "ok"]
        yield decoding_table(rows)
    for model in tqdm(models, desc="models", unit="model", disable=not models):
        if isinstance(model, CheckpointCase):
            row = benchmark_checkpoint(model, device=device)
        else:
            row = benchmark_model(model, seed=args.seed, device=device)
        row |= {"run": len(results["runs"]) - 1}
        _replace(results["models"], [row])
        _write(results, path)
        yield models_table([one for one in results["models"] if one["case"] == model.name])
    for each in tqdm(generation, desc="generation", unit="model", disable=not generation):
        row = benchmark_generation(each, seed=args.seed, device=device) | {"run": len(results["runs"]) - 1}
        _replace(results["generation"], [row])
        _write(results, path)
        yield generation_table([one for one in results["generation"] if one["case"] == each.name])
    if not args.compile_only:
        yield f"written: {', '.join(map(str, _report(results, path)))}"
    if bad:
        raise RuntimeError(f"{OURS} must be right to be timed, got errors in {', '.join(bad)}; see its rows")


def _about(args: BenchmarkArguments, device: torch.device) -> dict[str, Any]:
    """Where and how the run was made."""
    versions = {"python": platform.python_version()}
    for name in ("hf_asentmax", "torch", "triton", "transformers", "adasplash"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "dtype": args.dtype,
        "seed": args.seed,
        "versions": versions,
    }


def read_results(path: Path) -> dict[str, Any]:
    """The results of former runs, the lists of KEPT; empty ones if there is no file.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.is_file():
        return {name: [] for name in KEPT}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got {error}; remove it or name another folder") from error
    if not isinstance(results, dict) or not {"runs", "rows"} <= set(results):
        raise ValueError(f"{path} must hold runs and rows, got something else; name another folder")
    return {name: [] for name in KEPT} | results


def _replace(rows: list[dict[str, Any]], new: list[dict[str, Any]]) -> None:
    """Put rows in place of older ones of the same case and implementation."""
    names = {(row["case"], row["implementation"]) for row in new}
    rows[:] = [row for row in rows if (row["case"], row["implementation"]) not in names] + new


def _write(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results)


def _report(results: dict[str, Any], path: Path) -> list[Path]:
    text = path.with_name("results.md")
    text.write_text(tables(results) + "\n", encoding="utf-8")
    with suppress(ValueError):  # no sweep yet, nothing to draw
        return [path, text, plot_benchmark(results, path.with_name("benchmark.png"))]
    return [path, text]
