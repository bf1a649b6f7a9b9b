"""Settings of a sampler that is a server, and the checks of a model that need no memory."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping

from megatron_ral.config.sections import RunConfig
from megatron_ral.errors import ConfigError
from megatron_ral.models.folder import config_folder
from megatron_ral.models.shape import ModelShape

ENGINE = Path(__file__).with_name("vllm_engine.py")
TRIED_VERSIONS = ("0.32.0",)
"""Versions of vLLM with which pushes, pictures and seeds were tried."""
_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Head sizes that attention of vLLM 0.32.0 has on every device."""


@dataclass(frozen=True)
class ServedSettings:
    """Settings of a sampler that is a server."""

    python: str
    """Interpreter of the sampler's environment."""
    engine: str
    """Python file with the class `Engine`, see `server.py`."""
    options: Mapping[str, Any]
    """Options of the engine, as JSON values."""
    versions: tuple[str, ...]
    """Versions of the engine that may be used. Empty: any."""
    log_folder: Path
    """Folder that gets what the servers print."""
    request_seconds: float
    start_seconds: float
    bucket_bytes: int
    probe_bound: float

    @classmethod
    def from_config(cls, config: RunConfig) -> "ServedSettings":
        rollout, vllm = config.rollout, config.rollout.vllm
        return cls(
            python=vllm.python,
            engine=str(ENGINE),
            options={
                "model": os.path.abspath(config_folder(config.model.path)),
                "dtype": config.model.dtype,
                "max_length": config.data.max_prompt_length + rollout.max_response_length,
                "max_sequences": rollout.generation_batch_size * rollout.group_size,
                "temperature": rollout.temperature,
                "memory_share": vllm.memory_share,
            },
            versions=TRIED_VERSIONS,
            log_folder=Path(config.train.output_dir) / "sampler",
            request_seconds=float(vllm.request_seconds),
            start_seconds=float(vllm.start_seconds),
            bucket_bytes=vllm.bucket_mib << 20,
            probe_bound=vllm.probe_bound,
        )


def check_sampler_from_config(config: RunConfig, shape: ModelShape) -> None:
    """Check that the sampler of a run can serve its model, as far as that shows without starting it.

    Raises:
        ConfigError: it cannot.
    """
    rollout = config.rollout
    if config.train.algorithm == "ral" and rollout.sampler == "vllm":
        check_served(shape)
        if not os.access(rollout.vllm.python, os.X_OK):
            raise ConfigError(
                "rollout.vllm.python",
                rollout.vllm.python,
                "is no interpreter; make the environment with launch_scripts/setup_vllm.sh",
            )


def check_served(shape: ModelShape) -> None:
    """Check that vLLM can serve a model.

    Raises:
        ConfigError: it cannot, or what it would sample was not compared with our own.
    """
    family = shape.family
    if family.vllm_issue:
        raise ConfigError(
            "rollout.sampler",
            "vllm",
            f"is not possible with a {family.model_type} model, because {family.vllm_issue}; set native",
        )
    if family.interleaved_rotary and not _says_interleaved(shape.path):
        raise ConfigError(
            "rollout.sampler",
            "vllm",
            "is not possible with this folder, because its config.json does not say mrope_interleaved: true in "
            f"rope_parameters, as published {family.model_type} models do, and vLLM then reads the rotary axes as "
            "blocks; write it there, or set native",
        )
    if shape.kv_channels not in _HEAD_SIZES:
        raise ConfigError(
            "rollout.sampler",
            "vllm",
            f"is not possible with heads of size {shape.kv_channels}, because its attention has "
            f"{', '.join(map(str, _HEAD_SIZES))}; set native",
        )


def device_variables(kind: str, index: int) -> Mapping[str, str]:
    """Return the variables that let a server see this rank's GPU alone. Not tried on a GPU.

    Args:
        kind: Kind of this rank's device, e.g. `cuda`.
        index: Number of the device among those that this rank sees.
    """
    if kind != "cuda":
        return {}
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return {"CUDA_VISIBLE_DEVICES": visible[index] if index < len(visible) else str(index)}


def _says_interleaved(path: str) -> bool:
    """Say whether a model's config.json tells that rotary axes alternate over frequencies.

    transformers always takes them so in such families. vLLM 0.32.0 does only where it is written.
    """
    config = json.loads((config_folder(path) / "config.json").read_text())
    text = config.get("text_config", config)
    return bool((text.get("rope_parameters") or text.get("rope_scaling") or {}).get("mrope_interleaved"))
