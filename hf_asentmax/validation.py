"""Is a checkpoint folder whole? Reads headers and sizes only, and names the file that is missing or corrupt."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPE_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
_LARGEST_HEADER = 100_000_000  # the format's own limit
_AGAIN = "download or save it again"


class TensorEntry(NamedTuple):
    """A tensor in a safetensors file: its bytes are ``[start, end)`` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_safetensors_header(path: str | os.PathLike[str]) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name, after checking that the file holds all the bytes its header promises.

    Reads the header only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or corrupt; the message names it and says what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a safetensors file, but is missing; {_AGAIN}")
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
            raise _corrupt(path, f"{size} bytes without a complete header")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {name: _entry(spec, 8 + length) for name, spec in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _corrupt(path, f"a header that can't be read ({error})") from error
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end or (entry.end - entry.start) * 8 != prod(entry.shape) * DTYPE_BITS[entry.dtype]:
            raise _corrupt(path, f"a header that gives {name} the wrong bytes")
        end = entry.end
    if end != size:
        raise _corrupt(path, f"{size} bytes where its header promises {end}")
    return entries


def _entry(spec: dict[str, Any], data_start: int) -> TensorEntry:
    start, end = spec["data_offsets"]
    if spec["dtype"] not in DTYPE_BITS:
        raise ValueError(f"unknown dtype {spec['dtype']}")
    return TensorEntry(spec["dtype"], tuple(int(n) for n in spec["shape"]), data_start + start, data_start + end)


def _corrupt(path: Path, problem: str) -> ValueError:
    return ValueError(f"{path} must be a complete safetensors file, got {problem}; {_AGAIN}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got {error}; {_AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}; {_AGAIN}")
    return content


def check_checkpoint(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, dict[str, TensorEntry]]]:
    """Checks that a folder holds a whole checkpoint: config.json, and safetensors in one file or in shards.

    Reads headers and sizes, not weights.

    Returns:
        The content of config.json; the tensors of each weight file, by file name.

    Raises:
        FileNotFoundError: the folder or a file is missing; the message names it.
        ValueError: a file is corrupt or truncated; the message names it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} must be a checkpoint folder, but is none; give the folder of config.json")
    if not (folder / "config.json").is_file():
        remedy = "give the folder that save_pretrained wrote"
        if (folder / "adapter_config.json").is_file():
            remedy = "this is an adapter: load it, then merge_and_unload() and save_pretrained, or give its base"
        raise FileNotFoundError(f"{folder / 'config.json'} must be there, but is missing; {remedy}")
    config = _read_json(folder / "config.json")
    if not (folder / INDEX).is_file():
        if not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(
                f"{folder} must hold {WEIGHTS} or {INDEX}, but has neither; weights in another format become "
                "safetensors by from_pretrained and save_pretrained"
            )
        return config, {WEIGHTS: read_safetensors_header(folder / WEIGHTS)}
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or any(not _is_file_name(x) for x in weight_map.values()):
        raise ValueError(f"{folder / INDEX} must hold a weight_map from tensors to files, but does not; {_AGAIN}")
    files = {name: read_safetensors_header(folder / name) for name in sorted(set(weight_map.values()))}
    for tensor, name in weight_map.items():
        if tensor not in files[name]:
            raise ValueError(f"{folder / name} must hold {tensor}, as {INDEX} says, but does not; {_AGAIN}")
    return config, files


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Whether a tokenizer was saved into the folder."""
    return any(Path(folder).glob("tokenizer*"))


def check_weights_fit(
    folder: str | os.PathLike[str],
    model: Any,
    files: Mapping[str, Mapping[str, TensorEntry]],
    *,
    absent: Collection[str] = (),
) -> None:
    """Checks that a checkpoint's files hold every weight of a model in its shape; tied ones may be left out.

    Args:
        folder: the checkpoint, for the messages.
        model: a Transformers model, possibly without storage.
        files: the tensors of each weight file, as :func:`check_checkpoint` gives them.
        absent: names of weights that need not be there.

    Raises:
        ValueError: some are missing, or one has another shape; the message names them.
    """
    place = {name: file for file, entries in files.items() for name in entries}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in absent}
    for name, shape in expected.items():
        if name in place and files[place[name]][name].shape != shape:
            raise ValueError(
                f"{name} in {Path(folder) / place[name]} must have shape {shape} as config.json says, "
                f"got {files[place[name]][name].shape}; the two belong to different models"
            )
    missing = sorted(set(expected) - set(place) - set(model.all_tied_weights_keys))
    if missing:
        raise ValueError(
            f"{folder} must hold every weight of {type(model).__name__}, but lacks {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more' if missing[3:] else ''}; {_AGAIN}"
        )


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value == Path(value).name


def check_asentmax_checkpoint(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """As :func:`check_checkpoint`, for a checkpoint of this package: with its model type and its remote code.

    Returns:
        The content of config.json.
    """
    folder = Path(folder)
    config, files = check_checkpoint(folder)
    model_type = str(config.get("model_type"))
    if not model_type.startswith("asentmax_"):
        raise ValueError(
            f"model_type in {folder / 'config.json'} must be that of an ASEntmax model, got {model_type!r}; "
            "convert the checkpoint first, with hf-asentmax convert"
        )
    code = folder / f"modeling_{model_type}.py"
    if not code.is_file():
        raise FileNotFoundError(
            f"{code} must be there, but is missing: nobody could load the model without this package; "
            "load the checkpoint and save it again with save_pretrained"
        )
    return config
