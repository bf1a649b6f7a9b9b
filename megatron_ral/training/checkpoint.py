"""Checkpoints: everything a run needs to go on, written so that a half-written one is never taken for whole.

    <output_dir>/checkpoints/step_00000020/     rank_00000.safetensors ...  rank_00000.json ...  config.yaml
                                                manifest.json (written last, then the folder gets its name)
    <output_dir>/checkpoints/latest             link to the newest

Every rank writes its own ZeRO-3 shards (master weights, AdamW moments and the average of target `ema` by parameter name) as safetensors, and its
position in the data as JSON. Random streams need no saving: they are functions of (seed, step, prompt).
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Optional

import yaml
from safetensors.torch import load_file, save_file

from megatron_ral.config import RunConfig, dump_config, load_config
from megatron_ral.data.loader import PromptLoader
from megatron_ral.models.checkpoints import CheckpointError
from megatron_ral.parallel.collectives import barrier
from megatron_ral.parallel.layout import ParallelLayout
from megatron_ral.training.step import Engines


# Settings that may differ between a checkpoint and the run that goes on from it.
FREE_SETTINGS = ("logging.", "train.stop_after_step", "train.checkpoint_interval", "train.keep_checkpoints",
                 "train.output_dir", "train.export", "train.max_skipped_steps", "parallel.timeout_minutes",
                 "teacher.cpu_offload", "data.decode_workers", "data.decode_ahead", "train.time_limit_minutes",
                 "train.keep_replays", "watchdog.")


def checkpoint_root(output_dir: str) -> Path:
    return Path(output_dir) / "checkpoints"


def newest_checkpoint(output_dir: str) -> Optional[Path]:
    """Newest whole checkpoint (one with a manifest), or None."""
    whole = [path for path in checkpoint_root(output_dir).glob("step_????????") if (path / "manifest.json").is_file()]
    return max(whole, default=None)


def find_checkpoint(config: RunConfig, resume: bool) -> Optional[Path]:
    """What to resume from; None where a run starts anew.

    Raises:
        CheckpointError: not resuming into a folder that holds checkpoints (they would be mixed with the new ones), or
            resuming with other settings than the checkpoint was made with.
    """
    found = newest_checkpoint(config.train.output_dir)
    if found is None:
        return None
    if not resume:
        raise CheckpointError(f"train.output_dir = '{config.train.output_dir}' holds '{found.name}' of an earlier run; "
                              "give --resume to go on from it, or another train.output_dir")
    # Through the loader, so that a setting which the checkpoint's version did not have counts with its default.
    saved, now = (_flat(yaml.safe_load(dump_config(made))) for made in (load_config(found / "config.yaml"), config))
    for key in sorted(saved.keys() | now.keys()):
        if saved.get(key) != now.get(key) and not key.startswith(FREE_SETTINGS):
            raise CheckpointError(f"{key} = {now.get(key)} but checkpoint '{found}' was made with {saved.get(key)}; "
                                  "resume with the same setting, or start in another train.output_dir")
    return found


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {key: value for name, item in tree.items() for key, value in _flat(item, f"{prefix}{name}.").items()}


def save_checkpoint(config: RunConfig, engines: Engines, loader: PromptLoader, step: int) -> Path:
    """Write the state after `step` steps; every rank calls it. Older ones beyond train.keep_checkpoints go."""
    policy, average = engines.policy, engines.average
    layout, root = policy.layout, checkpoint_root(config.train.output_dir)
    final = root / f"step_{step:08d}"
    partial = root / f"step_{step:08d}.partial"
    if layout.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    state = {**policy.state(), **(average.state() if average is not None else {})}
    save_file(state, partial / f"rank_{layout.rank:05d}.safetensors")
    position = {"loader": loader.state(), "num_steps_taken": policy.num_steps_taken}
    (partial / f"rank_{layout.rank:05d}.json").write_text(json.dumps(position))
    barrier()
    if layout.rank == 0:
        (partial / "config.yaml").write_text(dump_config(config))
        files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        manifest = {"step": step, "layout": _layout_dict(layout), "files": files}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        link = root / "latest.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        os.replace(link, root / "latest")
        for old in sorted(root.glob("step_????????"))[: -config.train.keep_checkpoints]:
            if old != final:
                shutil.rmtree(old)
    barrier()
    return final


def restore_checkpoint(path: Path, engines: Engines, loader: PromptLoader) -> int:
    """Continue from a checkpoint of the same layout; returns the number of steps done.

    Raises:
        CheckpointError: another layout, or a file missing or cut short.
    """
    policy, manifest = engines.policy, json.loads((path / "manifest.json").read_text())
    if manifest["layout"] != _layout_dict(policy.layout):
        raise CheckpointError(f"checkpoint '{path}' was saved with the layout {manifest['layout']}, this run has "
                              f"{_layout_dict(policy.layout)}; resume with the same")
    for name, size in manifest["files"].items():
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            raise CheckpointError(f"checkpoint '{path}': file '{name}' is missing or cut short; remove this "
                                  "checkpoint to resume from the one before")
    rank = policy.layout.rank
    position = json.loads((path / f"rank_{rank:05d}.json").read_text())
    state = load_file(path / f"rank_{rank:05d}.safetensors")
    policy.load_state(state, position["num_steps_taken"])
    if engines.average is not None:
        engines.average.load_state(state)
    loader.restore(position["loader"])
    return manifest["step"]


def _layout_dict(layout: ParallelLayout) -> dict[str, int]:
    return {"tensor": layout.tensor_size, "pipeline": layout.pipeline_size, "data": layout.data_size}
