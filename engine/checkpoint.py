"""Checks a Hugging Face folder's safetensors files before anything is loaded from them.

    | header length, 8 bytes | header: JSON, name -> dtype, shape, offsets | data, gapless |

A truncated or damaged file is found here, with file and tensor named; the reading that the
fingerprint needs anyway brings the files into the page cache for the load that follows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from wire.errors import ConfigError

Progress = Callable[[str, int, int], None]
"""Told (stage, done, total) while a model loads."""

DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
READ_BYTES = 1 << 22
NOT_THE_MODEL = ("_name_or_path", "transformers_version")  # config entries that change nothing


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder whose files are complete as far as their headers tell."""

    folder: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Find and check the files of a model folder; ConfigError names what is missing or damaged."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"no model folder at {folder}; give a folder with config.json and *.safetensors"
        )
    config = _read_json(folder / "config.json")
    expected = _expected_tensors(folder)
    for name, tensors in expected.items():
        if absent := sorted(tensors - _check_file(folder / name)):
            raise ConfigError(
                f"{folder / name}: the index places tensor {absent[0]} here; it is not"
            )
    return Checkpoint(folder, config, tuple(folder / name for name in sorted(expected)))


def fingerprint(checkpoint: Checkpoint, progress: Progress) -> str:
    """Hash of the config and of every byte of the weight files (not of the tokenizer)."""
    digest = xxhash.xxh3_128()
    config = {k: v for k, v in checkpoint.config.items() if k not in NOT_THE_MODEL}
    digest.update(json.dumps(config, sort_keys=True).encode())
    done, total, buffer = 0, checkpoint.num_bytes, memoryview(bytearray(READ_BYTES))
    for file in checkpoint.files:
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                digest.update(buffer[:count])
                done += count
                progress("reading weights", done, total)
    return digest.hexdigest()


def _expected_tensors(folder: Path) -> dict[str, set[str]]:
    """The weight files, and the tensors that the index says each holds (none without an index)."""
    if (folder / "model.safetensors").is_file():
        return {"model.safetensors": set()}
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise ConfigError(_no_weights(folder))
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index} has no weight_map")
    expected: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise ConfigError(f"{index}: tensor {tensor} is placed in {name!r}, not a file name")
        expected.setdefault(name, set()).add(tensor)
    if absent := sorted(name for name in expected if not (folder / name).is_file()):
        raise ConfigError(
            f"{folder}: {len(absent)} of {len(expected)} weight files missing, first {absent[0]}"
        )
    return expected


def _no_weights(folder: Path) -> str:
    if pickled := sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth")):
        return (
            f"{folder} has its weights as pickle ({pickled[0]}), which can run code when opened; "
            "convert them to safetensors first"
        )
    return f"{folder} has no weights: neither model.safetensors nor model.safetensors.index.json"


def _check_file(file: Path) -> set[str]:
    """Names of the file's tensors, after checking that the data is exactly what the header says."""
    header, data_bytes = _read_header(file)
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    spans = sorted((*_tensor_span(file, name, entry), name) for name, entry in tensors.items())
    position = 0
    for begin, end, name in spans:
        if begin != position:
            raise ConfigError(f"{file}: tensor {name} starts at byte {begin}, expected {position}")
        if end > data_bytes:
            raise ConfigError(
                f"{file} is truncated: tensor {name} ends at byte {end} of the data, "
                f"the file has {data_bytes}"
            )
        position = end
    if position != data_bytes:
        raise ConfigError(f"{file}: {data_bytes - position} bytes after the last tensor")
    return set(tensors)


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header and the number of bytes after it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ConfigError(f"{file} is truncated or no safetensors file: {size} bytes")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ConfigError(f"{file}: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ConfigError(f"{file}: the header is not a JSON object")
    return header, size - 8 - length


def _tensor_span(file: Path, name: str, entry: Any) -> tuple[int, int]:
    """[begin, end) of a tensor in the data, checked against its shape and dtype."""
    try:
        bits = DTYPE_BITS[entry["dtype"]] * math.prod(entry["shape"])
        begin, end = entry["data_offsets"]
        size, needed = end - begin, -(-bits // 8)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{file}: the header's entry for tensor {name} is damaged") from error
    if size != needed:
        raise ConfigError(
            f"{file}: tensor {name} has {end - begin} bytes, its shape needs {bits // 8}"
        )
    return begin, end


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{file} is missing; is {file.parent} a model folder?") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} is not a JSON object")
    return value
