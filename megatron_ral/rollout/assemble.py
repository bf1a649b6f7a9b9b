"""Assembly of micro-batches from scored groups and passes without gradient, with their global denominators."""

from typing import Any, Mapping, Optional, Sequence

import torch
from torch import Tensor

from megatron_ral.attention.targets.registry import TargetPass
from megatron_ral.engine.outputs import ForwardOutput
from megatron_ral.functional.advantages import has_signal
from megatron_ral.objectives.attention import AttentionTerm
from megatron_ral.parallel.collectives import all_reduce_sum_
from megatron_ral.parallel.process_groups import ProcessGroups
from megatron_ral.rollout.collect import RolloutBatch
from megatron_ral.types import RlBatch, StepTotals

Passes = Sequence[Optional[ForwardOutput]]
"""Results of a pass without gradient, one per micro-batch. None where the update's own pass serves."""


def global_totals(
    response_lengths: Sequence[Tensor], max_response_length: int, process_groups: ProcessGroups
) -> StepTotals:
    """Return the denominators of one optimizer step, summed over all data-parallel ranks.

    Args:
        response_lengths: Lengths [X, G] int64 of each of this rank's micro-batches, X the groups that take part (0 or
            more).
        max_response_length: Limit of the generation.
        process_groups: Process groups of this rank.
    """
    counts = torch.tensor(
        [
            sum(int(lengths.sum()) for lengths in response_lengths),
            sum(lengths.numel() for lengths in response_lengths),
        ],
        device=process_groups.device,
    )
    num_tokens, num_sequences = all_reduce_sum_(counts, process_groups.data).tolist()
    return StepTotals(max(num_tokens, 1), max(num_sequences, 1), max_response_length)


def group_mask(rollout: RolloutBatch, filter_equal_rewards: bool) -> Tensor:
    """Return the mask of groups that take part, [B] bool: all, or with the filter those that have a signal."""
    signal = has_signal(rollout.score.rewards)
    return signal if filter_equal_rewards else torch.ones_like(signal)


def num_on_policy_updates(num_epochs: int) -> int:
    """Return the number of leading updates (0 or 1) for which the current policy still is the rollout policy, so that
    `old_logprobs` come from the update's own forward pass.

    With several epochs it is 0, because the samples of the first update come back when the policy has moved.
    """
    return int(num_epochs == 1)


def assemble_minibatches(
    rollout: Sequence[RolloutBatch],
    old: Passes,
    reference: Optional[Passes],
    target: Optional[Passes],
    term: AttentionTerm,
    *,
    num_minibatches: int,
    max_response_length: int,
    process_groups: ProcessGroups,
) -> list[list[RlBatch]]:
    """Return the micro-batches of each optimizer step.

    Args:
        rollout: Micro-batches of this rank, in order.
        old: Pass of the policy before the first update.
        reference: Pass of the frozen reference. None: there is none.
        target: Pass whose attention the divergence is taken to. None: the target needs none.
        term: Attention term. Its settings say which groups take part (`filter_equal_rewards`).
        num_minibatches: Optimizer steps per pass over the rollout. They divide the micro-batches.
        max_response_length: Limit of the generation.
        process_groups: Process groups of this rank.
    """
    per_step = len(rollout) // num_minibatches
    assert per_step * num_minibatches == len(rollout)
    minibatches = []
    for start in range(0, len(rollout), per_step):
        indices = range(start, start + per_step)
        masks = {index: group_mask(rollout[index], term.settings.filter_equal_rewards) for index in indices}
        totals = global_totals(
            [rollout[index].groups.response_lengths[mask] for index, mask in masks.items()],
            max_response_length,
            process_groups,
        )
        step = []
        for index in indices:
            scored, before = rollout[index], old[index]
            step.append(
                RlBatch(
                    groups=scored.groups,
                    totals=totals,
                    group_mask=masks[index],
                    advantages=scored.advantages,
                    attention_advantages=scored.attention_advantages,
                    rollout_logprobs=scored.rollout_logprobs,
                    from_teacher=scored.from_teacher,
                    is_on_policy=before is None,
                    compares_sampler=False,
                    old_logprobs=_logprobs(before),
                    ref_logprobs=_logprobs(reference[index] if reference is not None else None),
                    target_attention=_target_attention(target, index, term, scored),
                )
            )
        minibatches.append(step)
    return minibatches


def _logprobs(output: Optional[ForwardOutput]) -> Optional[Tensor]:
    return output.tokens.logprobs if output is not None and output.tokens is not None else None


def _target_attention(
    target: Optional[Passes], index: int, term: AttentionTerm, scored: RolloutBatch
) -> Mapping[int, Any]:
    if term.target_pass is TargetPass.ROLLOUT:
        return scored.explored_attention
    output = target[index] if target is not None else None
    if output is None:
        return {}
    weights = scored.attention_advantages
    return {layer: term.target.combine(stored, weights) for layer, stored in output.attention.items()}
