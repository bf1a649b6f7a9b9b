"""Files of skipped optimizer steps, which `megatron_ral.replay` runs again.

    <output_dir>/replay/step_00000003_update_001/     rank_00000.safetensors ...  rank_00000.json ...
                                                      hf/ (the weights of that moment)  config.yaml
                                                      replay.json (written last)

The tensors of a rank's micro-batches are named by their place in them (`0.groups.prompts.input_ids`). The rest of the
dataclasses is JSON. Nothing is pickled. Encoded pictures are left out, because the pixels are there.
"""

import dataclasses
import json
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ral.attention.group_layout import AttentionRecord
from megatron_ral.config import RunConfig, dump_config
from megatron_ral.engine.gather import gathered
from megatron_ral.engine.policy import PolicyEngine
from megatron_ral.errors import CheckpointError
from megatron_ral.models.folder import read_json
from megatron_ral.parallel.collectives import barrier, from_first_rank_of_all
from megatron_ral.training.step import SkippedUpdate
from megatron_ral.types import (
    FramePictures,
    GroupBatch,
    Patches,
    Prompt,
    PromptBatch,
    RlBatch,
    Sample,
    Score,
    SftBatch,
    StepTotals,
    TargetFrames,
    TeacherOutputs,
    TrainBatch,
)
from megatron_ral.weights.adapter_weights import export_adapters
from megatron_ral.weights.stage_weights import export_stage

MANIFEST = "replay.json"
_TYPES = {
    kind.__name__: kind
    for kind in (
        AttentionRecord,
        FramePictures,
        GroupBatch,
        Patches,
        Prompt,
        PromptBatch,
        RlBatch,
        Sample,
        Score,
        SftBatch,
        StepTotals,
        TargetFrames,
        TeacherOutputs,
    )
}
_LEFT_OUT = {"Sample": {"images": (), "videos": ()}}


def pack(value: Any, tensors: dict[str, Tensor], place: str = "") -> Any:
    """Return a value of dataclasses, tuples, mappings and tensors as JSON. Its tensors go to `tensors`, by place."""
    below = f"{place}." if place else ""
    if torch.is_tensor(value):
        tensors[place] = value.detach().cpu().contiguous().clone()
        return {"tensor": place}
    if dataclasses.is_dataclass(value):
        kind = type(value).__name__
        assert kind in _TYPES, kind
        fields = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)} | _LEFT_OUT.get(kind, {})
        return {"type": kind, "fields": {name: pack(item, tensors, below + name) for name, item in fields.items()}}
    if isinstance(value, Mapping):
        return {"items": [[key, pack(item, tensors, f"{below}{key}")] for key, item in value.items()]}
    if isinstance(value, (tuple, list)):
        return {"tuple": [pack(item, tensors, f"{below}{index}") for index, item in enumerate(value)]}
    assert value is None or isinstance(value, (bool, int, float, str)), type(value)
    return value


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the value that `pack` was given.

    Raises:
        CheckpointError: A dataclass is not known to this version, or has other fields in it.
    """
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "type" in tree:
        kind = _TYPES.get(tree["type"])
        if kind is None or set(tree["fields"]) != {item.name for item in dataclasses.fields(kind)}:
            raise CheckpointError(
                "the replay", tree["type"], "is of another version; run it with the version that wrote it"
            )
        return kind(**{name: unpack(item, tensors) for name, item in tree["fields"].items()})
    if "items" in tree:
        return {key: unpack(item, tensors) for key, item in tree["items"]}
    return tuple(unpack(item, tensors) for item in tree["tuple"])


@dataclass(frozen=True)
class ReplaySettings:
    """Settings of the replays of a run."""

    output_dir: str
    keep: int
    """Number of replays to save."""
    model_path: str
    """Folder that the run started from."""
    config_text: str
    """Resolved configuration as YAML."""

    @classmethod
    def from_config(cls, config: RunConfig) -> "ReplaySettings":
        return cls(config.train.output_dir, config.train.keep_replays, config.model.path, dump_config(config))


def save_replay(policy: PolicyEngine, skipped: SkippedUpdate, settings: ReplaySettings, step: int) -> Optional[Path]:
    """Write a skipped batch of all ranks with the weights, which have not changed since. Every rank calls it.

    Args:
        policy: Policy with the weights of the skipped step.
        skipped: Inputs of the step.
        settings: Where the files go, and how many replays are saved.
        step: 1-based number of the step.

    Returns:
        Folder of the replay. None: `keep` replays exist already.
    """
    root, layout = Path(settings.output_dir) / "replay", policy.layout
    folder = root / f"step_{step:08d}_update_{skipped.update + 1:03d}"
    partial = folder.with_name(folder.name + ".partial")

    def begin() -> bool:
        if len(list(root.glob(f"step_*/{MANIFEST}"))) >= settings.keep:
            return False
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return True

    if not from_first_rank_of_all(begin):
        return None
    tensors: dict[str, Tensor] = {}
    tree = {"batches": pack(list(skipped.minibatch), tensors), "scores": pack(list(skipped.scores), tensors, "scores")}
    save_file(tensors, partial / f"rank_{layout.rank:05d}.safetensors")
    (partial / f"rank_{layout.rank:05d}.json").write_text(json.dumps(tree))
    groups, source = policy.process_groups, settings.model_path
    export_stage(policy.stage, groups, source, str(partial / "hf"), gathered=gathered, merges_adapters=False)
    if policy.shape.adapter is not None:
        export_adapters(policy.stage, groups, source, str(partial / "adapter"), gathered)
    if layout.rank == 0:
        (partial / "config.yaml").write_text(settings.config_text)
        manifest = {
            "step": step,
            "update": skipped.update + 1,
            "world_size": layout.world_size,
            "metrics": dict(skipped.metrics),
            "command": replay_command(folder, layout.world_size),
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    barrier()
    return folder


def load_replay(folder: Path, rank: int) -> tuple[list[TrainBatch], Sequence[Score], dict[str, Tensor]]:
    """Return this rank's micro-batches, the scores of their responses, and all tensors by their place.

    Raises:
        CheckpointError: The replay is not whole, or of fewer ranks.
    """
    name = folder / f"rank_{rank:05d}"
    tree = read_json(name.with_suffix(".json"), "batches", "scores")
    try:
        tensors = load_file(name.with_suffix(".safetensors"))
    except Exception as error:
        raise CheckpointError(f"'{name}.safetensors'", None, f"is not readable ({error})") from None
    return list(unpack(tree["batches"], tensors)), unpack(tree["scores"], tensors), tensors


def replay_command(folder: Path, world_size: int) -> str:
    """Return the shell command that runs a replay again, from where the training was started."""
    return (
        f"{shlex.quote(sys.executable)} -m torch.distributed.run --standalone --nproc-per-node {world_size} "
        f"-m megatron_ral.replay {shlex.quote(str(Path(folder).resolve()))}"
    )
