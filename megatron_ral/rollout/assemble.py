"""From scored groups and passes without gradient to micro-batches with their global denominators."""

from typing import Optional, Sequence

import torch

from megatron_ral.engine.protocol import ForwardOutput
from megatron_ral.parallel.collectives import all_reduce_sum_
from megatron_ral.parallel.groups import ParallelGroups
from megatron_ral.rollout.collect import ScoredGroups
from megatron_ral.types import GroupBatch, TrainBatch


def global_response_tokens(batches: Sequence[GroupBatch], groups: ParallelGroups) -> float:
    """Response tokens of one optimizer step over all data-parallel ranks: the denominator of every loss."""
    total = torch.tensor(float(sum(int(batch.response_lengths.sum()) for batch in batches)), dtype=torch.float64,
                         device=groups.device)
    return float(all_reduce_sum_(total, groups.data))


def assemble_minibatches(rollout: Sequence[ScoredGroups], old: Sequence[ForwardOutput],
                         reference: Optional[Sequence[ForwardOutput]], target: str, num_minibatches: int,
                         groups: ParallelGroups) -> list[list[TrainBatch]]:
    """Micro-batches of each optimizer step.

    Args:
        rollout: this rank's micro-batches, in order.
        old: pass of the policy before the first update, one per micro-batch.
        reference: pass of the frozen reference, or None where it is not needed.
        target: "old" or "reference", whose attention the divergence is taken to.
        num_minibatches: optimizer steps the rollout is cut into; divides the number of micro-batches.
    """
    per_step = len(rollout) // num_minibatches
    assert per_step * num_minibatches == len(rollout)
    minibatches = []
    for start in range(0, len(rollout), per_step):
        indices = range(start, start + per_step)
        denominator = global_response_tokens([rollout[index].groups for index in indices], groups)
        step = []
        for index in indices:
            frozen = reference[index] if reference is not None else None
            source = old[index] if target == "old" else frozen
            step.append(TrainBatch(
                groups=rollout[index].groups, denominator=denominator, advantages=rollout[index].advantages,
                old_logprobs=old[index].tokens.logprobs if old[index].tokens else None,
                ref_logprobs=frozen.tokens.logprobs if frozen is not None and frozen.tokens else None,
                target_attention=dict(source.attention)))
        minibatches.append(step)
    return minibatches
