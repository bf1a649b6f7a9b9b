"""One training step, in order. Read this file first.

`ral_step` is one rollout and the optimizer steps made on it; `sft_step` is one supervised optimizer step. Both are
plain sequences of calls: what a call does is one file away.
"""

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Iterator, Optional, Sequence

import torch

from megatron_ral.config import RunConfig
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine.frozen import FrozenEngine
from megatron_ral.engine.policy import PolicyEngine
from megatron_ral.functional.advantages import has_signal
from megatron_ral.parallel.collectives import sum_metrics
from megatron_ral.rollout.assemble import assemble_minibatches, global_totals
from megatron_ral.rollout.collect import ScoredGroups, collect_rollout
from megatron_ral.training.objective import RalObjective, SftObjective, finish_metrics
from megatron_ral.types import GroupBatch, Prompt, TrainBatch, pad_prompts


@dataclass
class StepReport:
    """What one step leaves behind for the log."""

    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    rollout: Sequence[ScoredGroups] = ()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def sft_step(policy: PolicyEngine, prompts: Sequence[Prompt], processor: PromptProcessor,
             config: RunConfig) -> StepReport:
    """One supervised optimizer step on this rank's share of the global batch."""
    report = StepReport()
    with report.timed("update"):
        batches = supervised_batches(prompts, processor.pad_token_id, min(config.train.micro_batch_size, len(prompts)))
        totals = global_totals([batch.response_lengths for batch in batches], config.rollout.max_response_length,
                               policy.groups)
        sums = policy.forward_backward([TrainBatch(batch, totals) for batch in batches], SftObjective())
        result = policy.step()
    report.metrics.update(finish_metrics(sums))
    report.metrics.update({"grad_norm": result.grad_norm, "lr": result.learning_rate,
                           "skipped_steps": float(not result.applied)})
    return report


def supervised_batches(prompts: Sequence[Prompt], pad_token_id: int, micro_batch_size: int) -> list[GroupBatch]:
    """Reference responses as groups of one, padded to one shape."""
    width = max(len(prompt.input_ids) for prompt in prompts)
    longest = max(len(prompt.response_ids) for prompt in prompts)
    batches = []
    for start in range(0, len(prompts), micro_batch_size):
        chosen = prompts[start:start + micro_batch_size]
        ids = torch.full((len(chosen), 1, longest), pad_token_id)
        for index, prompt in enumerate(chosen):
            ids[index, 0, : len(prompt.response_ids)] = prompt.response_ids
        lengths = torch.tensor([[len(prompt.response_ids)] for prompt in chosen])
        batches.append(GroupBatch(pad_prompts(chosen, pad_token_id, width), ids, lengths))
    return batches


def ral_step(policy: PolicyEngine, reference: Optional[FrozenEngine], prompts: Sequence[Prompt],
             processor: PromptProcessor, objective: RalObjective, config: RunConfig, step: int,
             measure_gradient_ratio: bool) -> StepReport:
    """One rollout and its optimizer steps.

    Args:
        policy: engine that samples and is updated.
        reference: frozen engine, or None where neither KL nor target `reference` needs it.
        prompts: this data-parallel rank's prompts.
        processor: for decoding.
        objective: the loss.
        config: settings.
        step: 0-based rollout number, part of the random streams.
        measure_gradient_ratio: also measure |grad attention| / |grad tokens| on the last optimizer step.
    """
    report = StepReport()
    layers, target = sorted(objective.recorded_layers), config.loss.attention_target
    per_update = len(prompts) // config.rollout.num_minibatches
    micro_batch_size = min(config.train.micro_batch_size, per_update)

    with report.timed("rollout"):
        report.rollout = collect_rollout(policy, prompts, processor, config, step, micro_batch_size)
    batches = [scored.groups for scored in report.rollout]
    with report.timed("old"):
        old = policy.forward(batches, layers if target == "old" else (), temperature=objective.temperature)
    frozen = None
    if reference is not None:
        with report.timed("reference"):
            frozen = reference.forward(batches, layers if target == "reference" else (),
                                       temperature=objective.temperature)
    minibatches = assemble_minibatches(report.rollout, old, frozen, config, policy.groups)
    report.metrics.update(rollout_metrics(report.rollout, old, policy))

    updates: list[dict[str, float]] = []
    for epoch in range(config.rollout.num_epochs):
        for index, minibatch in enumerate(minibatches):
            last = epoch == config.rollout.num_epochs - 1 and index == len(minibatches) - 1
            attention_shards = None
            if last and measure_gradient_ratio:
                with report.timed("gradient_ratio"):
                    policy.forward_backward(minibatch, objective.only_attention())
                    attention_shards = policy.gradient_shards()
            with report.timed("update"):
                sums = policy.forward_backward(minibatch, objective)
                if attention_shards is not None:
                    report.metrics["attention/grad_ratio"] = gradient_ratio(policy, attention_shards)
                result = policy.step()
            updates.append({**finish_metrics(sums), "grad_norm": result.grad_norm, "lr": result.learning_rate,
                            "skipped_steps": float(not result.applied)})
    for name in sorted(set().union(*updates)):
        values = [update[name] for update in updates if name in update]
        report.metrics[name] = sum(values) / len(values)
    # The first update is on policy (its divergence to `old` is zero by construction): the last one shows the term.
    report.metrics["attention/divergence_last_update"] = updates[-1]["attention/divergence"]
    report.metrics["attention/divergence_first_update"] = updates[0]["attention/divergence"]
    return report


def gradient_ratio(policy: PolicyEngine, attention_shards: Sequence[torch.Tensor]) -> float:
    """|grad attention| / |grad tokens| from the attention term's gradient and the whole gradient now held."""
    token_shards = [whole - attention for whole, attention in zip(policy.gradient_shards(), attention_shards)]
    token_norm = policy.gradient_norm(token_shards)
    return policy.gradient_norm(attention_shards) / token_norm if token_norm > 0 else 0.0


def rollout_metrics(rollout: Sequence[ScoredGroups], old: Sequence, policy: PolicyEngine) -> dict[str, float]:
    """Rewards, lengths, share of groups without signal, and how far the sampler is from the training engine."""
    sums: dict[str, float] = {}

    def add(name: str, value: torch.Tensor | float) -> None:
        sums[name] = sums.get(name, 0.0) + float(value)

    for scored, output in zip(rollout, old):
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
            mask = scored.groups.response_mask
            difference = (output.tokens.logprobs.cpu() - scored.rollout_logprobs).abs() * mask
            add("sampling/logprob_difference", difference.sum())
            add("tokens", mask.sum())
    total = sum_metrics(sums, policy.groups)
    responses, groups, tokens = total.pop("responses"), total.pop("groups"), total.pop("tokens")
    per = {"reward_std": groups, "frac_reward_zero_std": groups, "sampling/logprob_difference": tokens}
    return {name: value / per.get(name, responses) for name, value in total.items()} | {"completions/tokens": tokens}
