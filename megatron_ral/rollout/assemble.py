"""From scored groups and passes without gradient to micro-batches with their global denominators."""

from typing import Optional, Sequence

import torch
from torch import Tensor

from megatron_ral.config import RunConfig
from megatron_ral.engine.outputs import ForwardOutput
from megatron_ral.functional.advantages import has_signal
from megatron_ral.attention.targets.success import success_target
from megatron_ral.parallel.collectives import all_reduce_sum_
from megatron_ral.parallel.process_groups import ProcessGroups
from megatron_ral.rollout.collect import RolloutBatch
from megatron_ral.types import StepTotals, TrainBatch


def global_totals(
    response_lengths: Sequence[Tensor], max_response_length: int, process_groups: ProcessGroups
) -> StepTotals:
    """Denominators of one optimizer step, summed over all data-parallel ranks.

    Args:
        response_lengths: [X, G] int64 of each of this rank's micro-batches, X groups that take part (0 or more).
        max_response_length: limit of the generation.
    """
    counts = torch.tensor(
        [sum(int(lengths.sum()) for lengths in response_lengths), sum(lengths.numel() for lengths in response_lengths)],
        device=process_groups.device,
    )
    num_tokens, num_sequences = all_reduce_sum_(counts, process_groups.data).tolist()
    return StepTotals(max(num_tokens, 1), max(num_sequences, 1), max_response_length)


def groups_taking_part(scored: RolloutBatch, config: RunConfig) -> Tensor:
    """[B] bool: all groups, or with `loss.filter_equal_rewards` those that have a signal."""
    signal = has_signal(scored.score.rewards)
    return signal if config.loss.filter_equal_rewards else torch.ones_like(signal)


def on_policy_updates(config: RunConfig) -> int:
    """First optimizer steps of a rollout that need no pass of the old policy, because they are made on it: 1, or 0 where
    their samples come back in another epoch, when it has moved."""
    return int(config.rollout.num_epochs == 1)


def assemble_minibatches(
    rollout: Sequence[RolloutBatch],
    old: Sequence[Optional[ForwardOutput]],
    reference: Optional[Sequence[ForwardOutput]],
    target: Optional[Sequence[Optional[ForwardOutput]]],
    config: RunConfig,
    process_groups: ProcessGroups,
) -> list[list[TrainBatch]]:
    """Micro-batches of each optimizer step.

    Args:
        rollout: this rank's micro-batches, in order.
        old: pass of the policy before the first update, one per micro-batch; None where the update is made on it.
        reference: pass of the frozen reference, or None where it is not needed.
        target: pass whose attention the divergence is taken to, None where the target needs none (`oracle`). A
            micro-batch whose target is the update's own pass has None in its place.
        config: `rollout.num_minibatches` optimizer steps are made of the rollout and divide the micro-batches;
            `loss.filter_equal_rewards` says which groups take part.
    """
    per_step = len(rollout) // config.rollout.num_minibatches
    assert per_step * config.rollout.num_minibatches == len(rollout)
    minibatches = []
    for start in range(0, len(rollout), per_step):
        indices = range(start, start + per_step)
        parts = {index: groups_taking_part(rollout[index], config) for index in indices}
        totals = global_totals(
            [rollout[index].groups.response_lengths[part] for index, part in parts.items()],
            config.rollout.max_response_length,
            process_groups,
        )
        step = []
        for index in indices:
            scored, before = rollout[index], old[index]
            frozen, compared = (None if outputs is None else outputs[index] for outputs in (reference, target))
            kept = compared.attention if compared is not None else {}
            if config.loss.attention_target in ("group", "hindsight"):
                kept = {
                    layer: success_target(rows, scored.attention_advantages.to(rows.device))
                    for layer, rows in kept.items()
                }
            step.append(
                TrainBatch(
                    groups=scored.groups,
                    totals=totals,
                    advantages=scored.advantages,
                    old_logprobs=before.tokens.logprobs if before is not None and before.tokens else None,
                    ref_logprobs=frozen.tokens.logprobs if frozen is not None and frozen.tokens else None,
                    target_attention=dict(kept),
                    group_mask=parts[index],
                    on_policy=before is None,
                    attention_advantages=scored.attention_advantages,
                )
            )
        minibatches.append(step)
    return minibatches
