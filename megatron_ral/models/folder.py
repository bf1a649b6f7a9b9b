"""Model folders, Hugging Face or Megatron: where each has its config, tokenizer and processor.

A Megatron folder has a manifest, `megatron.json`, and a subfolder `hf/` with the files that a Hugging Face folder has
beside its weights.
"""

import json
from pathlib import Path

from megatron_ral.errors import CheckpointError

MANIFEST = "megatron.json"
"""File that makes a folder a Megatron folder."""
ADAPTER = "adapter_config.json"
"""File that makes a folder a PEFT adapter."""
_POINTER = b"version https://git-lfs"
"""Begin of the small file that Git LFS leaves in place of a large one that was not fetched."""
_FOREIGN = (
    (
        "model-*-of-*.safetensors",
        "is one of several weight files, but model.safetensors.index.json is missing; copy it",
    ),
    ("*.gguf", "is a GGUF file, made for inference alone; give the safetensors folder that it was made from"),
    (
        "*model*.bin",
        "is a pickle, which can run code and is never opened here; load it with transformers where you trust it, and "
        "write safetensors with save_pretrained",
    ),
    (
        "zero_to_fp32.py",
        "is a part of a DeepSpeed checkpoint; let it write the weights, or write the model with save_pretrained",
    ),
    ("*.distcp", "is a part of a distributed checkpoint; write the model with save_pretrained"),
    ("*.pt", "is a pickle, which can run code and is never opened here; write the model as safetensors"),
    ("*.pth", "is a pickle, which can run code and is never opened here; write the model as safetensors"),
    ("adapter_model.safetensors", "is a PEFT adapter, not a whole model; merge it into its base model"),
    ("rank_00000.safetensors", "is the state of a run; write a model folder with tools/convert_checkpoint.py from-run"),
    (
        "checkpoints",
        "is the folder of a run's checkpoints; give the exported hf/ beside it, or write a model folder with "
        "tools/convert_checkpoint.py from-run",
    ),
    ("*.safetensors", "is there instead; where it holds the whole model, rename it to model.safetensors"),
)
"""Content of folders that are often given instead of a model folder, and the way out."""


def config_folder(path: str | Path) -> Path:
    """Return the folder that holds config.json, the tokenizer and the processor of a model folder."""
    return Path(path) / "hf" if (Path(path) / MANIFEST).is_file() else Path(path)


def foreign_content(path: str | Path) -> str:
    """Return a clause about what a folder holds instead of a model's safetensors, empty where nothing is recognised."""
    folder = Path(path)
    if (folder / ADAPTER).is_file():
        return (
            f"it is a PEFT adapter ('{ADAPTER}'), not a whole model; merge it into its base model (merge_and_unload, "
            "then save_pretrained)"
        )
    for pattern, way_out in _FOREIGN:
        if found := sorted(item.name for item in folder.glob(pattern)):
            return f"'{found[0]}' {way_out}"
    return ""


def check_fetched(path: str | Path, key: str) -> None:
    """Check that no file of a folder is a Git LFS pointer.

    Args:
        path: Folder.
        key: Setting, option or quoted path that names the folder, for the error.

    Raises:
        CheckpointError: naming the files that were not fetched.
    """
    small = (item for item in Path(path).iterdir() if item.is_file() and item.stat().st_size < 1024)
    pointers = sorted(item.name for item in small if item.read_bytes().startswith(_POINTER))
    if pointers:
        raise CheckpointError(
            key, None, f"holds Git LFS pointers instead of files ({', '.join(pointers)}); fetch them with git lfs pull"
        )


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
