"""Model folders, Hugging Face or Megatron: where each has its config, tokenizer and processor.

A Megatron folder has a manifest, `megatron.json`, and a subfolder `hf/` with the files that a Hugging Face folder has
beside its weights.
"""

import json
from pathlib import Path

from megatron_ral.errors import CheckpointError

MANIFEST = "megatron.json"
"""File that makes a folder a Megatron folder."""


def config_folder(path: str | Path) -> Path:
    """Return the folder that holds config.json, the tokenizer and the processor of a model folder."""
    return Path(path) / "hf" if (Path(path) / MANIFEST).is_file() else Path(path)


def read_json(path: Path, *keys: str) -> dict:
    """Return the JSON object in a file.

    Args:
        path: File to read.
        keys: Names that the object must have.

    Raises:
        CheckpointError: the file cannot be read, holds no JSON object, or lacks a key.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return {**value, **{key: value[key] for key in keys}}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"'{path}'", None, f"is not readable ({error!r})") from None
