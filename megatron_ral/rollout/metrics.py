"""Figures of a rollout for the log: rewards and lengths, staleness, and what refill rounds sampled."""

from dataclasses import asdict
from typing import Sequence

import torch

from megatron_ral.engine.policy import PolicyEngine
from megatron_ral.functional.advantages import has_signal
from megatron_ral.parallel.collectives import sum_metrics
from megatron_ral.rollout.collect import RolloutBatch
from megatron_ral.rollout.resample import Resampling


def rollout_metrics(rollout: Sequence[RolloutBatch], policy: PolicyEngine, distills: bool = False) -> dict[str, float]:
    """Return rewards, lengths and the share of groups without signal, the same on every rank."""
    sums: dict[str, float] = {}

    def add(name: str, value: torch.Tensor | float) -> None:
        sums[name] = sums.get(name, 0.0) + float(value)

    for scored in rollout:
        rewards, lengths = scored.score.rewards, scored.groups.response_lengths
        if policy.layout.is_last_stage:
            add("responses", rewards.numel())
            add("groups", len(rewards))
            add("reward", rewards.sum())
            add("reward_std", rewards.std(dim=1).sum())
            add("frac_reward_zero_std", (~has_signal(rewards)).sum())
            add("completions/mean_length", lengths.sum())
            add("completions/clipped_ratio", (~scored.finished).sum())
            for name, values in scored.score.components.items():
                add(f"rewards/{name}/mean", values.sum())
            add("distill/teacher_rollouts", scored.from_teacher.sum())
            add("tokens", lengths.sum())
    total = sum_metrics(sums, policy.process_groups)
    responses, groups, tokens = total.pop("responses"), total.pop("groups"), total.pop("tokens")
    per = {"reward_std": groups, "distill/teacher_rollouts": groups, "frac_reward_zero_std": groups}
    if not distills:
        del total["distill/teacher_rollouts"]
    return {name: value / per.get(name, responses) for name, value in total.items()} | {"completions/tokens": tokens}


def staleness_metrics(versions: Sequence[int], policy: PolicyEngine) -> dict[str, float]:
    """Return the mean number of updates between the weights that sampled and those of now, the same on every rank.

    Args:
        versions: Updates behind the weights that sampled each of this rank's groups. Empty where the teacher answered.
        policy: Policy before the first update of the step.
    """
    sums = {"groups": 0.0, "updates": 0.0}
    if policy.layout.is_last_stage:
        sums = {"groups": float(len(versions)), "updates": float(sum(policy.num_steps_taken - v for v in versions))}
    total = sum_metrics(sums, policy.process_groups)
    return {"sampling/staleness": total["updates"] / total["groups"]} if total["groups"] else {}


def resampling_metrics(resampling: Resampling, policy: PolicyEngine) -> dict[str, float]:
    """Return shares of the groups that the policy sampled, the same on every rank: of those without a right response at
    the first attempt, and of those to which more noise gave one. Empty where a teacher answered all prompts.

    Args:
        resampling: Count of this rank.
        policy: Policy.
    """
    sums = dict.fromkeys(asdict(resampling), 0.0)
    if policy.layout.is_last_stage:
        sums.update(asdict(resampling))
    total = sum_metrics(sums, policy.process_groups)
    tried = total.pop("tried")
    return {f"attention_noise/{name}": value / tried for name, value in total.items()} if tried else {}


def refill_metrics(rewards: torch.Tensor, policy: PolicyEngine) -> dict[str, float]:
    """Return figures of everything that a rollout sampled, the same on every rank. Those of `rollout_metrics` are of
    the groups that are trained on.

    Args:
        rewards: Rewards of all groups that this rank sampled, [groups, G].
        policy: Policy.
    """
    sums = {"num_prompts": 0.0, "frac_reward_zero_std": 0.0, "reward": 0.0}
    if policy.layout.is_last_stage:
        sums["num_prompts"] += len(rewards)
        sums["frac_reward_zero_std"] += float((~has_signal(rewards)).sum())
        sums["reward"] += float(rewards.mean(dim=1).sum())
    total = sum_metrics(sums, policy.process_groups)
    num_prompts = total.pop("num_prompts")
    return {"refill/num_prompts": num_prompts} | {
        f"refill/{name}": value / num_prompts for name, value in total.items()
    }
