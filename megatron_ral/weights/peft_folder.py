"""Folder of low-rank adapters as the PEFT library writes it: adapter_config.json and adapter_model.safetensors.

Source of the layout: PEFT 0.21, `LoraConfig` and the names of its weights: `base_model.model.`, the name of the adapted
module, `.lora_A.weight` or `.lora_B.weight`.
"""

import json
from pathlib import Path
from typing import Any, Callable, Mapping

import torch
from torch import Tensor

from megatron_ral.errors import CheckpointError, ConfigError
from megatron_ral.functional.sampling import uniform_stream
from megatron_ral.models.folder import read_json
from megatron_ral.models.parameter_shapes import adapter_shapes
from megatron_ral.models.shape import ModelShape
from megatron_ral.weights.huggingface import common_name
from megatron_ral.weights.safetensors_files import SafetensorsFile, SafetensorsWriter, TensorEntry

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_UNKNOWN = {
    "use_dora": False,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layer_replication": None,
    "bias": "none",
    "trainable_token_indices": None,
    "lora_bias": False,
}
"""Entry of a LoraConfig -> its value without which an adapter is something else than alpha / rank * B A."""


def stored_name(name: str) -> str:
    """Return the name of a factor in a PEFT folder for transformers 5, given its common name."""
    return _PREFIX + name.replace("model.", "model.language_model.", 1)


def adapter_config(shape: ModelShape, base: str) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    Args:
        shape: Shape of the model, with adapters.
        base: Folder of the base model.
    """
    assert shape.adapter is not None
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": shape.adapter.rank,
        "lora_alpha": shape.adapter.alpha,
        "lora_dropout": 0.0,
        # A pattern, because modules of some vision towers have the same names.
        "target_modules": rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(shape.adapter.targets)})",
        "inference_mode": True,
        **_UNKNOWN,
    }


def fill_folder(
    folder: Path, shape: ModelShape, base: str, dtype: torch.dtype, factor: Callable[[str], Tensor]
) -> None:
    """Write both files of a PEFT folder, factor by factor.

    Args:
        folder: Folder that exists.
        shape: Shape of the model, with adapters.
        base: Folder of the base model.
        dtype: Type of the factors.
        factor: Function from the common name of a factor to its value.
    """
    sizes = adapter_shapes(shape)
    entries = [TensorEntry(stored_name(name), dtype, size) for name, size in sizes.items()]
    writer = SafetensorsWriter(folder / WEIGHTS, entries)
    for name in sizes:
        writer.add(stored_name(name), factor(name).to(dtype))
    writer.close()
    text = json.dumps(adapter_config(shape, base), indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def check_adapters(path: str, shape: ModelShape) -> None:
    """Compare a PEFT folder with the adapters of a model. No weight is read.

    Args:
        path: Setting adapter.path. Nothing is compared if it is empty.
        shape: Shape of the model, with the adapters that the settings ask for.

    Raises:
        ConfigError: the folder holds no adapters, or others than the settings ask for.
        CheckpointError: a file is damaged.
    """
    if path and shape.adapter is not None:
        _open(path, shape)


def read_adapters(path: str, shape: ModelShape, require_finite: bool = True) -> Mapping[str, Tensor]:
    """Return the factors of all adapters in float32, by common name.

    Args:
        path: PEFT folder.
        shape: Shape of the model, with the adapters that the settings ask for.
        require_finite: Refuse NaN and infinite values.

    Raises:
        ConfigError: as `check_adapters`.
        CheckpointError: a file is damaged, or a value is refused.
    """
    file, names = _open(path, shape)
    factors = {name: file.read(stored).float() for name, stored in names.items()}
    for name, factor in factors.items():
        if require_finite and not bool(factor.isfinite().all()):
            raise CheckpointError(
                f"'{path}'", None, f"has NaN or infinite values in '{names[name]}'; give an earlier adapter"
            )
    return factors


def _open(path: str, shape: ModelShape) -> tuple[SafetensorsFile, dict[str, str]]:
    """Return the weights of a PEFT folder that fits a model, and the name in the file of each factor by common name."""
    folder = Path(path)
    assert shape.adapter is not None
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ConfigError("adapter.path", path, f"has no {name}; give a folder that PEFT's save_pretrained wrote")
    config = read_json(folder / CONFIG, "peft_type", "r", "lora_alpha")
    if config["peft_type"] != "LORA":
        raise ConfigError("adapter.path", path, f"has adapters of type {config['peft_type']!r}; only LORA is known")
    for name, known in _UNKNOWN.items():
        value = config.get(name, known)
        if value != known and value:
            raise ConfigError("adapter.path", path, f"has {name} = {value!r} in {CONFIG}; only {known!r} is known")
    for key, name in (("rank", "r"), ("alpha", "lora_alpha")):
        ours = getattr(shape.adapter, key)
        if config[name] != ours:
            raise ConfigError(
                f"adapter.{key}", ours, f"but '{path}' has {name} = {config[name]}; set adapter.{key} to that"
            )
    file, wanted = SafetensorsFile(folder / WEIGHTS), adapter_shapes(shape)
    names = {common_name(stored.removeprefix(_PREFIX)): stored for stored in file.shapes}
    for name in sorted(wanted.keys() - names.keys()):
        raise ConfigError(
            "adapter.path", path, f"has no '{stored_name(name)}'; adapter.targets must name what the folder adapts"
        )
    for name in sorted(names.keys() - wanted.keys()):
        raise ConfigError(
            "adapter.path",
            path,
            f"adapts '{names[name]}', which adapter.targets does not name or this project does not adapt (vision "
            "tower, embeddings, LM head); set adapter.targets to what the folder adapts",
        )
    for name, size in wanted.items():
        if file.shapes[names[name]] != size:
            raise ConfigError(
                "adapter.path",
                path,
                f"has '{names[name]}' of shape {file.shapes[names[name]]}, but '{shape.path}' needs {size}; it is of "
                "another model",
            )
    return file, names


def new_factor(name: str, size: tuple[int, ...], seed: int) -> Tensor:
    """Return the initial value of a factor in float32: uniform in +-1 / sqrt(inputs) for A, zero for B.

    The value depends on the arguments alone, so that it is the same in every layout. Source of the bounds: PEFT, which
    initialises A as torch does a linear layer.

    Args:
        name: Common name.
        size: Shape of the factor.
        seed: Seed of the run.
    """
    if name.endswith("lora_B.weight"):
        return torch.zeros(size)
    uniform = uniform_stream(size[0] * size[1], seed, "adapter", name)
    return ((2 * uniform - 1) / size[1] ** 0.5).float().view(size)
