"""Where a model folder, Hugging Face or Megatron, keeps its config, tokenizer and processor."""

import json
from pathlib import Path

from megatron_ral.errors import CheckpointError

MANIFEST = "megatron.json"


def config_folder(path: str | Path) -> Path:
    """Where a checkpoint, Hugging Face or Megatron, keeps config.json, tokenizer and processor."""
    return Path(path) / "hf" if (Path(path) / MANIFEST).is_file() else Path(path)


def read_json(path: Path, *keys: str) -> dict:
    """JSON object that must hold `keys`.

    Raises:
        CheckpointError: unreadable, or a key is missing.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return {**value, **{key: value[key] for key in keys}}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"'{path}' is not readable ({error!r})") from None
