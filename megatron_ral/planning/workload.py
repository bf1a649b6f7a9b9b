"""Sizes of one step on one rank, and batches of these sizes without contents."""

from dataclasses import dataclass

import torch

from megatron_ral.config import RunConfig
from megatron_ral.engine.stage import StageEngine
from megatron_ral.models.families import PatchRules
from megatron_ral.models.shape import ModelShape
from megatron_ral.models.vision import PATCHES_PER_CALL
from megatron_ral.parallel.rank_layout import RankLayout
from megatron_ral.rollout.assemble import num_on_policy_updates
from megatron_ral.rollout.lengths import MicroBatchSettings
from megatron_ral.types import GroupBatch, Patches, Prompt, Sample, pad_prompts

_SAMPLE = Sample("rehearsed", "", "", "", "", "", (), ())


@dataclass(frozen=True)
class Workload:
    """Sizes of one step on one rank, at the limits that the configuration allows."""

    prompt_length: int
    """Tokens of a prompt."""
    grid: tuple[int, int]
    """Visual tokens of a prompt as rows and columns of one picture; (0, 0) for text only."""
    response_length: int
    """Tokens of a response."""
    group_size: int
    """Responses to each prompt."""
    generation_batch: int
    """Prompts generated together in one batch."""
    in_flight: int
    """Batches that generation processes by turns; 0 in a supervised step."""
    micro_batch: int
    """Prompt groups of a micro-batch."""
    num_prompts: int
    """Prompts of a rollout on this rank."""
    num_updates: int
    """Optimizer steps on a rollout."""
    micro_batches: int
    """Micro-batches of one optimizer step."""
    on_policy: int = 0
    """Micro-batches that the pass of the old policy leaves out, because their update is on policy."""

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of a prompt."""
        return self.grid[0] * self.grid[1]

    @property
    def passes(self) -> int:
        """Micro-batches of the whole rollout. Passes without gradient read each once, except those of `on_policy`."""
        return -(-self.num_prompts // self.micro_batch)

    def pictures_per_call(self, tensor_size: int, merge_size: int) -> int:
        """Return the pictures that one call of the vision tower reads at most, while a batch is generated.

        Args:
            tensor_size: tensor-parallel ranks, which share the pictures of a batch.
            merge_size: patches along a side of one visual token.
        """
        fitting = max(PATCHES_PER_CALL // max(self.visual_tokens * merge_size**2, 1), 1)
        return min(-(-self.generation_batch // tensor_size), fitting)

    @classmethod
    def from_config(cls, config: RunConfig, layout: RankLayout, visual_tokens: int = -1) -> "Workload":
        """Return the sizes for prompts and responses of the largest length. A supervised step is one update.

        Args:
            config: settings of the run.
            layout: layout of the ranks.
            visual_tokens: visual tokens of each prompt; negative for as many as the limits allow.
        """
        length, rollout = config.data.max_prompt_length, config.rollout
        micro_batches = MicroBatchSettings.from_config(config)
        visual = (
            visual_tokens if visual_tokens >= 0 else min(config.data.max_visual_tokens or length, length - length // 64)
        )
        rows = next((rows for rows in range(int(visual**0.5), 0, -1) if visual % rows == 0), 0) if visual else 0
        grid = rows, visual // rows if rows else 0
        if config.train.algorithm == "sft":
            share = config.train.batch_size // layout.data_size
            micro = micro_batches.num_largest(length + rollout.max_response_length, share)
            return cls(length, grid, rollout.max_response_length, 1, 0, 0, micro, share, 1, -(-share // micro))
        share = rollout.num_prompts // layout.data_size
        per_update = share // rollout.num_minibatches
        micro = micro_batches.num_largest(length + rollout.group_size * rollout.max_response_length, per_update)
        # Prompts are spread over batches as in `engine/pipelined_decoder.py`.
        fitting = rollout.cache_tokens // (length + rollout.group_size * rollout.max_response_length)
        together = min(rollout.generation_batch_size, -(-share // layout.pipeline_size))
        together = min(together, max(fitting, 1)) if rollout.cache_tokens else together
        return cls(
            length,
            grid,
            rollout.max_response_length,
            rollout.group_size,
            together,
            min(layout.pipeline_size, -(-share // together)),
            micro,
            share,
            config.updates_per_rollout,
            -(-per_update // micro),
            num_on_policy_updates(config.rollout.num_epochs) * -(-per_update // micro),
        )


def visual_tokens(shape: ModelShape, work: Workload) -> int:
    """Return the visual tokens of a prompt, whole frames of them where the family's frames have one size."""
    return work.visual_tokens - work.visual_tokens % shape.patches.frame_tokens


def make_prompt(shape: ModelShape, work: Workload) -> Prompt:
    """Return one prompt of the largest length: a picture, then text."""
    length, visual, rules = work.prompt_length, visual_tokens(shape, work), shape.patches
    mask = torch.arange(length) < visual
    sides = rules.frame or (work.grid[0] * rules.merge_size, work.grid[1] * rules.merge_size)
    frames = visual // rules.frame_tokens if rules.frame else 1
    grids = [[frames, *sides]] if visual else []
    return Prompt(
        sample=_SAMPLE,
        input_ids=torch.where(mask, shape.image_token_id, 1),
        position_ids=torch.arange(length).expand(3, -1),
        next_position=length,
        patches=(make_patches(rules, visual * rules.merge_size**2),) if visual else (),
        grid_thw=torch.tensor(grids, dtype=torch.int64).view(-1, 3),
        is_video=torch.zeros(len(grids), dtype=torch.bool),
        seconds_per_grid=torch.zeros(len(grids)),
        visual_mask=mask,
        target_mask=torch.arange(length) < min(visual, 1),
        response_ids=torch.zeros(0, dtype=torch.int64),
    )


def make_patches(rules: PatchRules, count: int) -> Patches:
    """Return patches of a picture without contents."""
    pixels = torch.empty(count, 1, rules.patch_size**2, rules.channels, dtype=torch.uint8)
    return Patches(pixels, torch.empty(rules.channels, 256), rules.temporal_patch_size)


def make_groups(engine: StageEngine, work: Workload, size: int, embeds: bool) -> GroupBatch:
    """Return a batch of groups of the largest size.

    Args:
        engine: engine that the groups are for.
        work: sizes.
        size: number of groups.
        embeds: whether the groups carry visual embeddings, which lie on the engine's device.
    """
    shape, prompts = engine.shape, pad_prompts([make_prompt(engine.shape, work)] * size, 0)
    G, R = work.group_size, work.response_length
    features = None
    if embeds:
        size_of_one = visual_tokens(shape, work), 1 + shape.num_deepstack_layers, shape.hidden_size
        place = {"dtype": engine.stage.dtype, "device": engine.process_groups.device}
        features = tuple(torch.empty(size_of_one, **place) for _ in range(size))
    return GroupBatch(prompts, torch.ones(size, G, R, dtype=torch.int64), torch.full((size, G), R), features)
