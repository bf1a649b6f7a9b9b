"""A model with the widths of Qwen2.5-VL-7B and random weights, without a folder of weights to read.

Layers are as many as asked for. Batches have the largest size that a run allows, and random contents.
"""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Iterator, Optional, Sequence

import torch

from megatron_ral.config import RunConfig, load_config
from megatron_ral.models.shape import ModelShape
from megatron_ral.types import GroupBatch
from tools.acceptance.part import PROJECT, Setting

SEVEN = PROJECT / "pretrained_configs/models/qwen2.5-vl-7b/config.json"
NARROW = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
NARROW_VISION = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 128}
"""Widths on the CPU."""


def write_config(setting: Setting, num_layers: int) -> Path:
    """Write the config.json of a model with so many layers, narrow on the CPU, and return its folder."""
    config = json.loads(SEVEN.read_text(encoding="utf-8"))
    config["text_config"]["num_hidden_layers"] = num_layers
    if not setting.on_gpu:
        config["text_config"].update(NARROW, vocab_size=152064 // 64)
        config["text_config"]["rope_parameters"]["mrope_section"] = [4, 6, 6]
        config["vision_config"].update(NARROW_VISION, fullatt_block_indexes=[1])
        for number, name in enumerate(
            ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ):
            config[name] = 2000 + number
    folder = setting.folder / f"shape_{num_layers}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def settings_of(setting: Setting, num_layers: int, *overrides: str) -> tuple[Path, list[str]]:
    """Return run file and overrides of `ral_7b` on one rank with this model, with short sequences on the CPU."""
    changes = [
        f"model.path={write_config(setting, num_layers)}",
        f"model.dtype={'bfloat16' if setting.on_gpu else 'float32'}",
        "parallel.tensor_model_parallel_size=1",
        "parallel.sequence_parallel=false",
        "loss.kl_coef=0.0",  # a reference would be a second model
        "optimizer.warmup_steps=0",
        "rollout.num_prompts=4",
        "rollout.num_minibatches=2",
        "logging.gradient_ratio_interval=0",
    ]
    if not setting.on_gpu:
        changes += ["data.max_prompt_length=272", "rollout.max_response_length=8", "rollout.group_size=2"]
    return PROJECT / "pretrained_configs/runs/ral_7b.yaml", [*changes, *overrides]


def config_of(setting: Setting, num_layers: int, *overrides: str) -> RunConfig:
    """Return the configuration of `settings_of`."""
    path, changes = settings_of(setting, num_layers, *overrides)
    return load_config(path, changes)


@contextmanager
def random_weights() -> Iterator[None]:
    """Make engines that are built inside fill their stage with random weights where it lies, and read no folder."""
    from megatron_ral.engine import stage
    from megatron_ral.weights.stage_weights import describe_stage

    @torch.no_grad()
    def fill(built, path: str, require_finite: bool = True) -> None:
        describe_stage(built)
        for name, parameter in built.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.normal_(0.0, 0.02)

    plain = stage.load_stage
    stage.load_stage = fill
    try:
        yield
    finally:
        stage.load_stage = plain


def random_groups(engine, work, size: int, seed: int = 0, prompt_lengths: Optional[Sequence[int]] = None) -> GroupBatch:
    """Return a batch of groups of the largest size with random responses and visual features."""
    from megatron_ral.planning.workload import make_groups

    shape: ModelShape = engine.shape
    groups = make_groups(engine, work, size, True)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 1000, groups.response_ids.shape, generator=generator)
    assert groups.visual_embeds is not None and shape.image_token_id > 1000
    features = tuple(features.normal_(0.0, 0.02) for features in groups.visual_embeds)
    return replace(groups, response_ids=ids, visual_embeds=features)
