"""Model cards: a README.md with metadata that the Hub understands and the numbers that were measured."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from math import isfinite, prod
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from .configuration_asentmax import auto_class
from .tasks import SETTINGS_FILE, load_task
from .validation import check_checkpoint, has_tokenizer

PAPER = "2506.16640"
TAGS = ["asentmax", "entmax", "sparse-attention", "long-context", f"arxiv:{PAPER}"]
_PIPELINES = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}
_PICTURES = {".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp"}

_SCALE_FORMULAS = {
    "none": "",
    "log": r"r_i = s \, \log(1 + n_i)",
    "static": r"r_i = \delta + \mathrm{softplus}(b) \, \log(1 + n_i)^{m + c \tanh d}",
    "adaptive": r"r_i = \delta + \mathrm{softplus}(w^\top x_i + b) \, \log(1 + n_i)^{m + c \tanh(u^\top x_i + d)}",
}
_SETTINGS = (
    ("model_type", "model type"),
    ("entmax_alpha", "alpha (1 is softmax, 2 is sparsemax)"),
    ("entmax_alpha_learned", "alpha learned per head"),
    ("attention_top_k", "keys of a query (top-k softmax)"),
    ("adaptive_temperature", "temperature from the entropy of a query's weights"),
    ("query_scaling", "query scale r"),
    ("query_scale_delta", "delta"),
    ("query_scale_gamma_range", "c (range of the exponent)"),
    ("query_scale_gamma_center", "m (its center)"),
    ("query_scale_length", "length at which r starts (query scale `log`, or m other than 0)"),
    ("positions", "positions"),
    ("num_hidden_layers", "layers"),
    ("hidden_size", "hidden size"),
    ("num_attention_heads", "heads"),
    ("num_key_value_heads", "key/value heads"),
    ("max_position_embeddings", "context length in its config"),
    ("vocab_size", "vocabulary"),
    ("dtype", "dtype"),
)


def write_model_card(
    folder: str | os.PathLike[str], *, pictures: Sequence[str | os.PathLike[str]] = (), **about: Any
) -> Path:
    """Writes README.md into a checkpoint folder, and copies the pictures that it shows beside it.

    Args:
        folder: what ``save_pretrained`` wrote; the settings are read from its config.json.
        pictures: image files.
        **about: what :func:`render_model_card` takes.

    Returns:
        The path of the card.

    Raises:
        FileNotFoundError, ValueError: as :func:`render_model_card`, or a picture can't be used; nothing was written.
    """
    folder = Path(folder)
    copies = check_pictures(pictures)
    card = folder / "README.md"
    text = render_model_card(folder, pictures=[path.name for path in copies], **about)
    for path in copies:
        if path.resolve() != (folder / path.name).resolve():
            shutil.copyfile(path, folder / path.name)
    unfinished = folder / "README.md.unfinished"
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(card)
    return card


def check_pictures(pictures: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The paths, after checking that each is there, is an image by its ending, and has a name of its own."""
    paths = [Path(path) for path in pictures]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} must be a picture, but is missing; draw it first or leave it out")
        if path.suffix.lower() not in _PICTURES:
            raise ValueError(
                f"{path} must be a picture ({', '.join(sorted(_PICTURES))}), got {path.suffix!r}; convert it"
            )
    if len({path.name for path in paths}) != len(paths):
        raise ValueError(f"pictures must have names of their own, got {[path.name for path in paths]}; rename one")
    return paths


def render_model_card(
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    results: Iterable[Mapping[str, Any]] = (),
    pictures: Sequence[str] = (),
    title: str | None = None,
    name: str | None = None,
    prompt: str = "Once upon a time",
    new_tokens: int = 40,
    training: str | None = None,
    license: str | None = "apache-2.0",
) -> str:
    """The text of a model card.

    Args:
        folder: a checkpoint of this package; the loading example is of its tokenizer, or else of its task.json.
        base_model: Hub id of the softmax model that this one was converted from.
        datasets: Hub ids of the training data. Data that is not on the Hub is told of in ``training``.
        results: measurements, each with ``method``, ``length`` (tokens) and a value under ``accuracy`` or under the
            name that ``metric`` gives; and, if wanted, ``task``, ``seed``, ``samples``. All go into the tables; those
            whose method starts with "asentmax" go into the metadata, averaged over seeds, each method by itself.
        pictures: names of image files in the folder.
        title: heading; the folder's name by default.
        name: what the loading example loads; the title by default.
        prompt: what it gives to a model that has a tokenizer.
        new_tokens: how many tokens it generates.
        training: how the model was trained, in Markdown.
        license: of the weights, an identifier of the Hub.

    Raises:
        FileNotFoundError, ValueError: the folder isn't whole, an id can't be one, or a result lacks something.
    """
    config, weights = check_checkpoint(folder)
    if "query_scaling" not in config:
        raise ValueError(
            f"model_type in {Path(folder) / 'config.json'} must be that of an ASEntmax model, got "
            f"{config.get('model_type')!r}; convert the checkpoint first, with hf-asentmax convert"
        )
    for what, ids in (("base_model", [base_model] if base_model else []), ("datasets", datasets)):
        for item in ids:
            try:
                validate_repo_id(item)
            except ValueError as error:
                raise ValueError(
                    f"{what} must be an id on the Hub, got {item!r}; name anything else in training"
                ) from error
    rows = [_Row(result, number) for number, result in enumerate(results)]
    loader = auto_class(config["architectures"][0])
    title = title or Path(folder).resolve().name
    card_data = ModelCardData(
        base_model=base_model,
        datasets=list(datasets) or None,
        eval_results=_eval_results(rows, _PIPELINES[loader]) or None,
        library_name="transformers",
        license=license,
        model_name=title,
        pipeline_tag=_PIPELINES[loader],
        tags=list(TAGS),
    )
    count = sum(prod(entry.shape) for tensors in weights.values() for entry in tensors.values())
    set_up = {key: value for key, value in config.items() if value is not None and value is not False}  # 0 is a setting
    if config["query_scaling"] == "none":
        set_up = {key: value for key, value in set_up.items() if not key.startswith("query_scale_")}
    settings = [(label, set_up[key]) for key, label in _SETTINGS if key in set_up]
    tokenizer = has_tokenizer(folder)
    task = load_task(None, folder) if not tokenizer and (Path(folder) / SETTINGS_FILE).is_file() else None
    card = ModelCard.from_template(
        card_data,
        template_str=(files(f"{__package__}.model_cards") / "template.md").read_text(encoding="utf-8"),
        title=title,
        name=name or title,
        prompt=prompt,
        new_tokens=new_tokens,
        family=str(config["model_type"]).removeprefix("asentmax_"),
        auto_class=loader,
        tokenizer=tokenizer,
        task=task,
        alpha=config["entmax_alpha"],
        scale_formula=_SCALE_FORMULAS[config["query_scaling"]],
        settings=[*settings, ("parameters", f"{count:,}")],
        training=training,
        tables=_tables(rows),
        pictures=[f"![{picture}]({picture})" for picture in pictures],
    )
    return str(card)


class _Row:
    """One measurement."""

    def __init__(self, result: Mapping[str, Any], number: int) -> None:
        self.metric = str(result.get("metric", "accuracy"))
        missing = [key for key in ("method", "length", self.metric) if key not in result]
        if missing:
            raise ValueError(
                f"result {number} must have method, length and {self.metric}, but lacks {', '.join(missing)}; add it"
            )
        value = result[self.metric]
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise ValueError(
                f"{self.metric} of result {number} must be a finite number, got {value!r}; leave the row out"
            )
        self.method, self.length, self.value = str(result["method"]), int(result["length"]), float(value)
        self.task = str(result.get("task", "retrieval"))
        self.seed, self.samples = result.get("seed"), result.get("samples")


def _groups(rows: Iterable[_Row], *keys: str) -> dict[tuple[Any, ...], list[_Row]]:
    groups: dict[tuple[Any, ...], list[_Row]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, key) for key in keys), []).append(row)
    return groups


def _mean(rows: Sequence[_Row]) -> float:
    return round(sum(row.value for row in rows) / len(rows), 6)


def _eval_results(rows: list[_Row], pipeline: str) -> list[EvalResult]:
    ours = [row for row in rows if row.method.lower().startswith("asentmax")]
    ways = {key: len(_groups(group, "method")) for key, group in _groups(ours, "task", "metric").items()}
    results = []
    for (task, length, metric, method), group in sorted(_groups(ours, "task", "length", "metric", "method").items()):
        name = f"{metric}, {method}" if ways[task, metric] > 1 else metric  # one model, read in two ways
        results.append(
            EvalResult(
                task_type=pipeline,
                task_name=task,
                dataset_type="generated",
                dataset_name=f"{task}, {length} tokens",
                dataset_config=f"{task}-{length}",
                metric_type=metric,
                metric_name=name if len(group) == 1 else f"{name}, mean of {len(group)} runs",
                metric_value=_mean(group),
            )
        )
    return results


def _tables(rows: list[_Row]) -> list[str]:
    """One Markdown table a task and metric: a line a length, a column a method; of several runs, mean and range."""
    tables = []
    for (task, metric), group in _groups(rows, "task", "metric").items():
        methods = [method for (method,) in _groups(group, "method")]
        lines = [
            f"**{task}**, {metric}:\n",
            f"| length | {' | '.join(methods)} | samples |",
            "|---:|" + "---:|" * (len(methods) + 1),
        ]
        for (length,), line in sorted(_groups(group, "length").items()):
            cells = [_cell([row for row in line if row.method == method]) for method in methods]
            samples = sorted({row.samples for row in line if row.samples is not None})
            lines.append(f"| {length:,} | {' | '.join(cells)} | {' or '.join(map(str, samples)) or 'not given'} |")
        tables.append("\n".join(lines))
    return tables


def _cell(rows: list[_Row]) -> str:
    values = [row.value for row in rows]
    if len(values) < 2:
        return f"{values[0]:.4g}" if values else ""
    return f"{_mean(rows):.4g} ({min(values):.4g} to {max(values):.4g}, {len(values)} runs)"
