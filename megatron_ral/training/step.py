"""One training step, in order. Read this file first.

`ral_step` is one rollout and the optimizer steps made on it; `sft_step` is one supervised optimizer step. Both are
plain sequences of calls: what a call does is one file away.
"""

import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Iterator, Mapping, Optional, Sequence

import torch

from megatron_ral.config import RunConfig
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine.ema import AverageEngine
from megatron_ral.engine.frozen import FrozenEngine
from megatron_ral.engine.policy import PolicyEngine, schedule_factor
from megatron_ral.engine.outputs import ForwardOutput
from megatron_ral.engine.teacher import TeacherEngine
from megatron_ral.functional.advantages import has_signal
from megatron_ral.parallel.collectives import sum_metrics
from megatron_ral.runtime.progress import progress
from megatron_ral.rollout.assemble import assemble_minibatches, global_totals, on_policy_updates
from megatron_ral.rollout.collect import RolloutBatch, collect_rollout
from megatron_ral.rollout.lengths import longest_first
from megatron_ral.objectives.attention import ROLLOUT_POLICY
from megatron_ral.objectives.distillation import DistillTerm, shuffled_visual_columns
from megatron_ral.objectives.objective import RalObjective, SftObjective, finish_metrics
from megatron_ral.types import GroupBatch, Prompt, Score, TrainBatch, pad_prompts


@dataclass(frozen=True)
class SkippedUpdate:
    """What an optimizer step was made of that was skipped because its loss or gradient was not finite."""

    update: int
    """0-based, of the step."""
    minibatch: Sequence[TrainBatch]
    """This rank's micro-batches."""
    scores: Sequence[Score]
    """Of their responses, one per micro-batch; none in supervised training."""
    metrics: Mapping[str, float]


@dataclass
class StepReport:
    """What one step leaves behind for the log."""

    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    rollout: Sequence[RolloutBatch] = ()
    supervised: Sequence[GroupBatch] = ()
    """Micro-batches of a supervised step."""
    skipped: list["SkippedUpdate"] = field(default_factory=list)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        with progress.within(phase):
            yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def sft_step(
    policy: PolicyEngine, prompts: Sequence[Prompt], processor: PromptProcessor, config: RunConfig
) -> StepReport:
    """One supervised optimizer step on this rank's share of the global batch."""
    report = StepReport()
    with report.timed("update"):
        batches = supervised_batches(prompts, processor.pad_token_id, min(config.train.micro_batch_size, len(prompts)))
        totals = global_totals(
            [batch.response_lengths for batch in batches], config.rollout.max_response_length, policy.process_groups
        )
        minibatch, report.supervised = [TrainBatch(batch, totals) for batch in batches], batches
        sums = policy.forward_backward(minibatch, SftObjective())
        result = policy.step()
    report.metrics.update(finish_metrics(sums))
    if not result.applied:
        report.skipped.append(SkippedUpdate(0, minibatch, (), report.metrics))
    report.metrics.update(
        {"grad_norm": result.grad_norm, "lr": result.learning_rate, "skipped_steps": float(not result.applied)}
    )
    return report


def supervised_batches(prompts: Sequence[Prompt], pad_token_id: int, micro_batch_size: int) -> list[GroupBatch]:
    """Reference responses as groups of one, in micro-batches of like lengths, each as wide as its longest."""
    order = longest_first([len(prompt.input_ids) + len(prompt.response_ids) for prompt in prompts], len(prompts))
    batches = []
    for start in range(0, len(prompts), micro_batch_size):
        chosen = [prompts[index] for index in order[start : start + micro_batch_size]]
        longest = max(len(prompt.response_ids) for prompt in chosen)
        ids = torch.full((len(chosen), 1, longest), pad_token_id)
        for index, prompt in enumerate(chosen):
            ids[index, 0, : len(prompt.response_ids)] = prompt.response_ids
        lengths = torch.tensor([[len(prompt.response_ids)] for prompt in chosen])
        batches.append(GroupBatch(pad_prompts(chosen, pad_token_id), ids, lengths))
    return batches


@dataclass(frozen=True)
class Engines:
    """The models of a run."""

    policy: PolicyEngine
    """Samples and is updated."""
    reference: Optional[FrozenEngine] = None
    """Where the KL or target `reference` needs it."""
    average: Optional[AverageEngine] = None
    """For target `ema`."""
    teacher: Optional[TeacherEngine] = None
    """To distil from."""


def ral_step(
    engines: Engines,
    prompts: Sequence[Prompt],
    processor: PromptProcessor,
    objective: RalObjective,
    config: RunConfig,
    step: int,
    measure_gradient_ratio: bool,
) -> StepReport:
    """One rollout and its optimizer steps.

    Args:
        engines: the models.
        prompts: this data-parallel rank's prompts.
        processor: for decoding.
        objective: the loss; its coefficient is set here for every optimizer step.
        config: settings.
        step: 0-based rollout number, part of the random streams.
        measure_gradient_ratio: also measure |grad attention| / |grad tokens| on the last optimizer step.
    """
    report, policy = StepReport(), engines.policy
    per_update = len(prompts) // config.rollout.num_minibatches
    micro_batch_size = min(config.train.micro_batch_size, per_update)

    with report.timed("rollout"):
        report.rollout = collect_rollout(policy, prompts, processor, config, step, micro_batch_size, engines.teacher)
    old, frozen, target = _passes(engines, [scored.groups for scored in report.rollout], objective, config, report)
    minibatches = assemble_minibatches(report.rollout, old, frozen, target, config, policy.process_groups)
    report.metrics.update(rollout_metrics(report.rollout, policy, config.distills))

    updates: list[dict[str, float]] = []
    for epoch in range(config.rollout.num_epochs):
        for index, minibatch in enumerate(minibatches):
            last = epoch == config.rollout.num_epochs - 1 and index == len(minibatches) - 1
            if not updates:  # the policy is still the sampler's: do they agree?
                minibatch = [
                    replace(batch, rollout_logprobs=scored.rollout_logprobs, from_teacher=scored.from_teacher)
                    for batch, scored in zip(minibatch, report.rollout)
                ]
            if engines.teacher is not None:  # per update, so that its rows of a whole rollout need not be held
                with report.timed("teacher"):
                    minibatch = add_teacher_outputs(engines.teacher, minibatch, objective.distill, config, step)
            with report.timed("update"):
                with policy.ready(policy.local_layers(sorted(objective.recorded_layers))):
                    metrics = accumulate_gradients(
                        policy, minibatch, objective, config, last and measure_gradient_ratio
                    )
                result = policy.step()
            updates.append(
                {
                    **metrics,
                    "grad_norm": result.grad_norm,
                    "lr": result.learning_rate,
                    "skipped_steps": float(not result.applied),
                }
            )
            if not result.applied:
                scores = [
                    scored.score for scored in report.rollout[index * len(minibatch) : (index + 1) * len(minibatch)]
                ]
                report.skipped.append(SkippedUpdate(len(updates) - 1, minibatch, scores, updates[-1]))
    if engines.average is not None and len(report.skipped) < len(updates):
        engines.average.follow(policy)
    for name in sorted(set().union(*updates)):
        values = [update[name] for update in updates if name in update]
        report.metrics[name] = sum(values) / len(values)
    # The first update is on policy (its divergence to `old` is zero by construction): the last one shows the term.
    for name, update in (("last", updates[-1]), ("first", updates[0])):
        if "attention/divergence" in update:
            report.metrics[f"attention/divergence_{name}_update"] = update["attention/divergence"]
    return report


def _passes(
    engines: Engines, batches: Sequence[GroupBatch], objective: RalObjective, config: RunConfig, report: StepReport
) -> tuple[
    Sequence[Optional[ForwardOutput]], Optional[Sequence[ForwardOutput]], Optional[Sequence[Optional[ForwardOutput]]]
]:
    """Passes without gradient before the first update: of the policy, of the reference, and whichever of them (or of the
    average) the attention is compared with. The policy's leaves out (None) what the first update is made of."""
    target, layers = objective.settings.attention_target, sorted(objective.term_layers)
    own = on_policy_updates(config) * (len(batches) // config.rollout.num_minibatches)

    def run(
        engine: FrozenEngine | PolicyEngine, recorded: bool, batches: Sequence[GroupBatch] = batches
    ) -> list[ForwardOutput]:
        return (
            []
            if not batches
            else engine.forward(
                batches,
                layers if recorded else (),
                temperature=objective.temperature,
                row_kind=objective.settings.attention_row,
                keep=objective.term.keep,
            )
        )

    with report.timed("old"):
        old = [None] * own + run(engines.policy, target in ROLLOUT_POLICY, batches[own:])
    reference = average = None
    if engines.reference is not None:
        with report.timed("reference"):
            theirs = batches
            if config.model.reference_path:  # another checkpoint may have another vision tower
                theirs = [replace(batch, visual_embeds=None) for batch in batches]
            reference = run(engines.reference, target == "reference", theirs)
    if engines.average is not None:
        with report.timed("average"):
            average = run(engines.average, True)
    source = {"reference": reference, "ema": average, "oracle": None}.get(target, old)
    return old, reference, source


def add_teacher_outputs(
    teacher: TeacherEngine, minibatch: Sequence[TrainBatch], term: DistillTerm, config: RunConfig, step: int
) -> list[TrainBatch]:
    """The micro-batches of one optimizer step with the teacher's view of them."""
    tokens = config.distill.token_divergence != "cross_entropy"
    outputs = teacher.read(
        [batch.groups for batch in minibatch],
        sorted(term.layers),
        row_kind=term.row_kind,
        keep=term.keep,
        hidden_states=tokens,
    )
    result = []
    for batch, output in zip(minibatch, outputs):
        rows = output.attention
        if config.distill.attention_rows == "shuffled":
            rows = {layer: shuffled_visual_columns(row, batch.groups, config.seed, step) for layer, row in rows.items()}
        result.append(replace(batch, teacher_hidden=output.hidden, teacher_attention=rows))
    return result


def accumulate_gradients(
    policy: PolicyEngine,
    minibatch: Sequence[TrainBatch],
    objective: RalObjective,
    config: RunConfig,
    measure_ratio: bool,
) -> dict[str, float]:
    """Gradient of one optimizer step, ready for `policy.step`, with the coefficient of the attention term that the
    schedule or the wanted ratio of gradients asks for. Returns metrics."""
    settings = config.loss
    if settings.attention_grad_ratio > 0:
        attention_sums = policy.forward_backward(minibatch, objective.only("attention", 1.0))
        attention_shards = policy.gradient_shards()
        sums = policy.forward_backward(minibatch, objective.only("tokens"))
        token_shards = policy.gradient_shards()
        attention_norm, token_norm = policy.gradient_norm(attention_shards), policy.gradient_norm(token_shards)
        coef = settings.attention_grad_ratio * token_norm / attention_norm if attention_norm > 0 else 0.0
        policy.set_gradient_shards(
            [token.add_(attention, alpha=coef) for token, attention in zip(token_shards, attention_shards)]
        )
        attention_sums["loss/attention"] *= coef
        metrics = {**finish_metrics({**attention_sums, **sums}), "attention/coef": coef}
        return {**metrics, "attention/grad_ratio": settings.attention_grad_ratio} if coef > 0 else metrics
    coef = settings.attention_coef * schedule_factor(
        policy.num_steps_taken,
        config.num_optimizer_steps,
        settings.attention_coef_warmup_steps,
        settings.attention_coef_decay,
    )
    objective = replace(objective, attention_coef=coef)
    acting = {
        "attention": coef > 0,
        "distill_attention": objective.distill is not None and config.distill.attention_coef > 0,
    }
    shards = {}
    for parts in (name for name, acts in acting.items() if acts and measure_ratio):
        policy.forward_backward(minibatch, objective.only(parts))
        shards[parts] = policy.gradient_shards()
    metrics = {**finish_metrics(policy.forward_backward(minibatch, objective)), "attention/coef": coef}
    for parts, part in shards.items():
        name = {"attention": "attention/grad_ratio", "distill_attention": "distill/attention_grad_ratio"}[parts]
        metrics[name] = gradient_ratio(policy, part)
    return metrics


def gradient_ratio(policy: PolicyEngine, attention_shards: Sequence[torch.Tensor]) -> float:
    """|grad of a part| / |grad of the rest| from the part's gradient and the whole gradient now held."""
    token_shards = [whole - attention for whole, attention in zip(policy.gradient_shards(), attention_shards)]
    token_norm = policy.gradient_norm(token_shards)
    return policy.gradient_norm(attention_shards) / token_norm if token_norm > 0 else 0.0


def rollout_metrics(rollout: Sequence[RolloutBatch], policy: PolicyEngine, distills: bool = False) -> dict[str, float]:
    """Rewards, lengths, share of groups without signal."""
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
