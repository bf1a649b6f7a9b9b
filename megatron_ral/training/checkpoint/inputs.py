"""Files that a run reads, listed in its checkpoints, so that a resumed run may find the same files in another place.

Shards are compared by name and size. The files of a model folder are compared by name, size and a digest of bytes at
evenly spaced places, because two checkpoints of one model have the same names and sizes.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Collection, Iterable, Mapping, Optional

from megatron_ral.data.loader import shard_labels
from megatron_ral.data.shards import find_shards
from megatron_ral.errors import DataError
from megatron_ral.models.folder import config_folder

INPUTS = "inputs.json"
"""File of a checkpoint with the list."""
MODELS = ("model.path", "model.reference_path", "teacher.path", "adapter.path")
"""Settings that name folders of a model or of adapters."""
SOURCES = "data.train"
"""Setting that names globs of shards."""
_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt")
_UNUSED = ("generation_config.json",)
_NUM_SAMPLED, _SAMPLE_BYTES = 16, 4096

Files = Mapping[str, str]
"""File name -> size in bytes and, in a model folder, digest."""


def input_files(values: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the files that a run reads by setting; a source of samples is `data.train.N.shards`.

    Args:
        values: Every setting by dotted key (`config.flat_settings`).

    Raises:
        OSError: A file cannot be read.
    """
    found = {key: _model_files(values[key]) for key in MODELS if values.get(key)}
    for number, source in enumerate(values.get(SOURCES) or ()):
        found[f"{SOURCES}.{number}.shards"] = _shards(source["shards"])
    return found


def saved_inputs(checkpoint: Path) -> dict[str, dict[str, str]]:
    """Return the list of a whole checkpoint; empty for one of a version that kept none."""
    path = checkpoint / INPUTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def difference(now: Files, saved: Files) -> Optional[str]:
    """Return a clause about the first file that is not the same, None where all are."""
    for name in sorted(now.keys() | saved.keys()):
        if name not in now:
            return f"file '{name}' is missing there"
        if name not in saved:
            return f"file '{name}' is new there"
        if now[name] != saved[name]:
            sizes = [entry.split()[0] for entry in (now[name], saved[name])]
            return f"file '{name}' has " + ("other contents" if sizes[0] == sizes[1] else f"{sizes[0]} bytes")
    return None


def path_of(values: Mapping[str, Any], key: str) -> str:
    """Return the model folder or the glob of shards that a key of `input_files` stands for."""
    return values[key] if key in MODELS else values[SOURCES][int(key.split(".")[2])]["shards"]


def with_places(saved: Mapping[str, Any], now: Mapping[str, Any], listed: Collection[str]) -> dict[str, Any]:
    """Return saved settings with the paths of this run, where the files behind them are listed and thus compared."""
    result = dict(saved) | {key: now[key] for key in MODELS if key in listed and now.get(key)}
    if SOURCES in saved and len(saved[SOURCES]) == len(now.get(SOURCES, ())):
        result[SOURCES] = [
            {**theirs, "shards": ours["shards"]} if f"{SOURCES}.{number}.shards" in listed else theirs
            for number, (theirs, ours) in enumerate(zip(saved[SOURCES], now[SOURCES]))
        ]
    return result


def _shards(pattern: str) -> dict[str, str]:
    try:
        shards = find_shards(pattern, SOURCES)
    except DataError:  # reported where the shards are opened
        return {}
    return {label: str(Path(shard).stat().st_size) for shard, label in shard_labels(shards).items()}


def _model_files(path: str) -> dict[str, str]:
    folders = [folder for folder in dict.fromkeys((Path(path), config_folder(path))) if folder.is_dir()]
    files: Iterable[Path] = (file for folder in folders for file in folder.iterdir() if file.is_file())
    return {
        file.name: f"{file.stat().st_size} {_sampled_digest(file)}"
        for file in files
        if file.suffix in _SUFFIXES and file.name not in _UNUSED and not file.name.startswith(".")
    }


def _sampled_digest(file: Path) -> str:
    """Return a digest of bytes at evenly spaced places of a file, of all bytes of a small one."""
    size, digest = file.stat().st_size, hashlib.blake2b(digest_size=8)
    with open(file, "rb") as stream:
        if size <= _NUM_SAMPLED * _SAMPLE_BYTES:
            digest.update(stream.read())
        else:
            for number in range(_NUM_SAMPLED):
                stream.seek(number * (size - _SAMPLE_BYTES) // (_NUM_SAMPLED - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
