"""From a softmax checkpoint to an ASEntmax one on disk, file by file: the model is never built in memory.

The weights are copied byte for byte. What is new, the parameters of the query scale, is small: it goes into the file
that holds the same layer's o_proj. Names and shapes come from a model without storage (torch's meta device).
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import logging

from .configuration_asentmax import CONFIG_CLASSES, auto_class
from .methods import METHODS
from .options import option
from .patching import patch_model
from .positions import POSITIONS
from .scaling import QUERY_SCALINGS, QueryScale
from .validation import DTYPE_BITS, INDEX, TensorEntry, check_checkpoint, check_weights_fit

logger = logging.get_logger(__name__)

# What goes with the weights: tokenizer, generation settings, licences. Not the card, which is about the original.
COMPANIONS = [
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "additional_chat_templates", "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
]  # fmt: skip
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_COPY_BYTES = 1 << 24


@dataclass
class ConvertArguments:
    """What to convert, and into what."""

    model: str = field(metadata={"help": f"Folder or Hub id of a softmax checkpoint: {', '.join(CONFIG_CLASSES)}."})
    output_dir: str = field(metadata={"help": "Folder to write: new or empty. It appears when it is whole."})
    method: str = option("asentmax", "Decides what the options below leave open.", tuple(METHODS))
    alpha: float | None = option(None, "1 is softmax, 2 sparsemax; the larger, the fewer keys keep a weight.")
    alpha_learned: bool | None = option(None, "Learn one alpha a head, starting from --alpha.")
    attention_top_k: int | None = option(None, "Keys that --method top_k keeps a query.")
    query_scaling: str | None = option(
        None, "Factor of the scores: adaptive (ASEntmax), static, log (SSMax) or none.", QUERY_SCALINGS
    )
    positions: str = option(
        "rope", "rope keeps the model's own; nope, alibi or nape replace them and need much training.", POSITIONS
    )
    query_scale_delta: float | None = option(
        None, "Constant part of the query scale; by default 1 - ln 2, to start at 1."
    )


def run_conversion(args: ConvertArguments) -> Iterator[str]:
    """Convert a checkpoint; yields the texts to print. Raises as :func:`convert_checkpoint`."""
    settings = asdict(args)
    target = convert_checkpoint(settings.pop("model"), settings.pop("output_dir"), **settings)
    yield "\n".join(f"{name:<24}{'of the method' if value is None else value}" for name, value in settings.items())
    files = [f"{path.name:<44}{path.stat().st_size:>16,}" for path in sorted(target.iterdir())]
    yield "\n".join([f"{'file':<44}{'bytes':>16}", *files])
    how = "after `import hf_asentmax` or with trust_remote_code=True"
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    yield f"Load {args.output_dir} with {auto_class(config['architectures'][0])}, {how}."


def convert_checkpoint(source: str | os.PathLike[str], target: str | os.PathLike[str], **settings: Any) -> Path:
    """Writes the ASEntmax version of a softmax checkpoint: what ``patch_model`` and ``save_pretrained`` would write.

    Needs little memory, however large the model. The target appears whole, at the end, or not at all.

    Args:
        source: folder or Hub id of a checkpoint with safetensors.
        target: folder to write, which must not exist or be empty.
        **settings: what :func:`hf_asentmax.patch_model` takes (``alpha``, ``query_scaling``, ``positions``, ...).

    Returns:
        The target's path.

    Raises:
        FileNotFoundError: the source, or one of its files, is missing; the message names it.
        FileExistsError: the target holds something.
        ValueError: the family or a setting isn't supported, or a file is truncated or corrupt; the message names it.
    """
    target = Path(target).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} must be a new or empty folder, got one with content; name another")
    folder = _local_folder(source)
    stored, files = check_checkpoint(folder)
    _check_convertible(folder, stored)
    model = _skeleton(folder, _dtype(stored, files))
    patch_model(model, **settings)
    additions, left_out = _plan(model, files, folder)

    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    unfinished.mkdir(parents=True)
    try:
        _write_weights(folder, unfinished, files, additions, left_out)
        model.config.architectures = [type(model).__name__]
        model.config.dtype = model.dtype
        model.config.save_pretrained(unfinished)
        for path in sorted(folder.iterdir()):
            if any(fnmatch(path.name, pattern) for pattern in COMPANIONS):
                (shutil.copytree if path.is_dir() else shutil.copyfile)(path, unfinished / path.name)
        _name_tokenizer_class(folder, unfinished)
        if target.exists():
            target.rmdir()
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return target


def _name_tokenizer_class(folder: Path, target: Path) -> None:
    """Write down the tokenizer's class that the source loads with. For some families Transformers goes by the model
    type, whatever tokenizer_config.json says, and of the class named there it would make another tokenizer."""
    path = target / TOKENIZER_CONFIG_FILE
    if not path.is_file():
        return
    try:
        name = type(AutoTokenizer.from_pretrained(folder, trust_remote_code=False)).__name__
    except Exception as error:  # code of its own, a library that is missing: it is copied as it is
        logger.warning(f"The tokenizer of {folder} is copied unseen, since it does not load here: {error}")
        return
    written = json.loads(path.read_text(encoding="utf-8"))
    if written.get("tokenizer_class") not in (name, name.removesuffix("Fast")):
        text = json.dumps(written | {"tokenizer_class": name}, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def _local_folder(source: str | os.PathLike[str]) -> Path:
    if Path(source).is_dir():
        return Path(source)
    try:
        patterns = ["*.json", "*.safetensors", *COMPANIONS]
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"source must be a checkpoint folder or a Hub id, got {str(source)!r}, which is neither a folder here nor "
            f"within reach on the Hub ({type(error).__name__}); check the path, the name and the network"
        ) from error


def _check_convertible(folder: Path, stored: dict[str, Any]) -> None:
    family = stored.get("model_type")
    if str(family).startswith("asentmax_"):
        raise ValueError(f"{folder} must be a softmax checkpoint, got {family!r}, which is ASEntmax; use it as it is")
    if family not in CONFIG_CLASSES:
        raise ValueError(
            f"model_type in {folder / 'config.json'} must be one of {', '.join(CONFIG_CLASSES)}, got {family!r}; "
            "other families are not supported"
        )
    if stored.get("quantization_config"):
        raise ValueError(f"{folder} must hold plain floating point weights, got quantized ones; dequantize them first")


def _dtype(stored: dict[str, Any], files: dict[str, dict[str, TensorEntry]]) -> torch.dtype:
    """What Transformers would load the checkpoint in: the config's dtype, or the weights' own."""
    named = getattr(torch, str(stored.get("dtype") or stored.get("torch_dtype")), None)
    held = (_DTYPES[e.dtype] for entries in files.values() for e in entries.values() if e.dtype in _DTYPES)
    return named if isinstance(named, torch.dtype) else next(held, torch.float32)


def _skeleton(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The softmax model without storage."""
    config = AutoConfig.from_pretrained(folder)
    architecture = (config.architectures or [""])[0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise ValueError(
            f"architectures in {folder / 'config.json'} must name a class of transformers, got {config.architectures!r}"
            "; load the model with its class and save it again"
        )
    with torch.device("meta"):
        return model_class(config).to(dtype)


def _plan(
    model: PreTrainedModel, files: dict[str, dict[str, TensorEntry]], folder: Path
) -> tuple[dict[str, dict[str, Tensor]], set[str]]:
    """The new tensors by file, and the stored ones that the model has no place for."""
    place = {name: file for file, entries in files.items() for name in entries}
    names = set(model.state_dict())
    new = {name for name in names if ".query_scale." in name}
    check_weights_fit(folder, model, files, absent=new)
    start = QueryScale(model.config).to(model.dtype).state_dict()
    additions: dict[str, dict[str, Tensor]] = {file: {} for file in files}
    for name in new:
        layer, _, parameter = name.partition(".query_scale.")
        additions[place[f"{layer}.o_proj.weight"]][name] = start[parameter]
    left_out = set(place) - (names - new)
    if left_out:
        logger.warning(f"Left out, since {type(model).__name__} has no such weights: {', '.join(sorted(left_out))}")
    return additions, left_out


def _write_weights(
    folder: Path,
    target: Path,
    files: dict[str, dict[str, TensorEntry]],
    additions: dict[str, dict[str, Tensor]],
    left_out: set[str],
) -> None:
    weight_map: dict[str, str] = {}
    parameters = size = 0
    total = sum(entry.end - entry.start for entries in files.values() for entry in entries.values())
    with logging.tqdm(total=total, unit="B", unit_scale=True, desc="Converting") as progress:
        for file, entries in files.items():
            kept = {name: entry for name, entry in entries.items() if name not in left_out}
            written = _write_file(folder / file, target / file, kept, additions[file], progress)
            weight_map |= dict.fromkeys(written, file)
            parameters += sum(torch.Size(entry.shape).numel() for entry in written.values())
            size += sum(entry.end - entry.start for entry in written.values())
    if (folder / INDEX).is_file():
        index = {"metadata": {"total_parameters": parameters, "total_size": size}, "weight_map": weight_map}
        (target / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_file(
    source: Path, target: Path, kept: dict[str, TensorEntry], added: dict[str, Tensor], progress: Any
) -> dict[str, TensorEntry]:
    """One safetensors file: the kept tensors, copied in pieces, and the added ones. Returns its entries."""
    written = dict(kept)
    for name, tensor in added.items():
        written[name] = TensorEntry(_NAMES[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes)
    # Wide dtypes first, as safetensors does it: so every tensor is aligned.
    order = sorted(written, key=lambda name: (-DTYPE_BITS[written[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        dtype, shape, start, end = written[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + end - start]}
        offset += end - start
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with source.open("rb") as read, target.open("wb") as write:
        write.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            if name in added:
                write.write(added[name].contiguous().view(torch.uint8).numpy().tobytes())
            else:
                _copy(read, write, kept[name], progress)
        write.flush()
        os.fsync(write.fileno())
    return written


def _copy(read: BinaryIO, write: BinaryIO, entry: TensorEntry, progress: Any) -> None:
    read.seek(entry.start)
    left = entry.end - entry.start
    while left:
        piece = read.read(min(left, _COPY_BYTES))
        if not piece:
            raise ValueError(f"{read.name} must stay as it is while it is converted, but became shorter; start again")
        write.write(piece)
        left -= len(piece)
        progress.update(len(piece))
