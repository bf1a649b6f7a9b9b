"""One training step, in order. Read this file first.

`rl_step` is one rollout and the optimizer steps made on it. `sft_step` is one supervised optimizer step. With
`rollout.overlap`, `overlapped_step` trains on the rollout before. All are plain sequences of calls, each explained one
file away.
"""

import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Callable, Iterator, Mapping, Optional, Sequence

import torch

from megatron_ral.attention.targets.registry import TargetPass
from megatron_ral.config.sections import RunConfig
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine.frozen import FrozenEngine, PolicyBase
from megatron_ral.engine.policy import PolicyEngine
from megatron_ral.engine.stage import StageEngine
from megatron_ral.engine.teacher import TeacherEngine
from megatron_ral.objectives.attention import AttentionTerm
from megatron_ral.objectives.base import Objective, finish_metrics, mean_over_updates
from megatron_ral.objectives.distillation import AttentionDistillationTerm, shuffled_visual_columns
from megatron_ral.objectives.supervised import supervised_objective
from megatron_ral.parallel.process_groups import ProcessGroups
from megatron_ral.rollout.ahead import RolloutsAhead
from megatron_ral.rollout.assemble import Passes, assemble_minibatches, global_totals, num_on_policy_updates
from megatron_ral.rollout.collect import Rollout, RolloutBatch, collect_rollout
from megatron_ral.rollout.lengths import MicroBatchSettings, cut_into_micro_batches
from megatron_ral.rollout.metrics import refill_metrics, resampling_metrics, rollout_metrics, staleness_metrics
from megatron_ral.rollout.refill import DrawPrompts
from megatron_ral.rollout.sampler import Sampler
from megatron_ral.rollout.settings import RolloutSettings
from megatron_ral.runtime.progress import progress
from megatron_ral.training.gradients import accumulate_gradients
from megatron_ral.types import GroupBatch, Prompt, RlBatch, Score, SftBatch, TeacherOutputs, TrainBatch, pad_prompts


@dataclass(frozen=True)
class StepSettings:
    """Settings of one step."""

    micro_batches: MicroBatchSettings
    """Size of a forward pass on one rank."""
    max_response_length: int
    num_minibatches: int
    """Optimizer updates per pass over a rollout."""
    num_epochs: int
    """Passes over one rollout."""
    num_optimizer_steps: int
    """Optimizer steps of the whole run, over which the attention coefficient is scheduled."""
    encodes_for_reference: bool
    """True if the reference encodes pixels itself, because another checkpoint may have another vision tower."""
    seed: int
    shuffles_teacher_rows: bool
    """True if the teacher's rows are a shuffled control."""

    @classmethod
    def from_config(cls, config: RunConfig) -> "StepSettings":
        return cls(
            micro_batches=MicroBatchSettings.from_config(config),
            max_response_length=config.rollout.max_response_length,
            num_minibatches=config.rollout.num_minibatches,
            num_epochs=config.rollout.num_epochs,
            num_optimizer_steps=config.num_optimizer_steps,
            encodes_for_reference=bool(config.model.reference_path),
            seed=config.seed,
            shuffles_teacher_rows=config.distill.attention_rows == "shuffled",
        )


@dataclass(frozen=True)
class SkippedUpdate:
    """Inputs of an optimizer step that was skipped because its loss or gradient was not finite."""

    update: int
    """0-based number in the step."""
    minibatch: Sequence[TrainBatch]
    """Micro-batches of this rank."""
    scores: Sequence[Score]
    """Scores of their responses, one per micro-batch. Empty in supervised training."""
    metrics: Mapping[str, float]


@dataclass
class StepReport:
    """Results of one step, for the log."""

    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """Phase -> seconds."""
    rollout: Sequence[RolloutBatch] = ()
    """Micro-batches of the rollout. Empty in supervised training."""
    supervised: Sequence[GroupBatch] = ()
    """Micro-batches of a supervised step. Empty in RL."""
    skipped: list[SkippedUpdate] = field(default_factory=list)
    sampling_seconds: float = 0.0
    """Seconds that the rollout took to sample, beside updates or not."""

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds inside the context to a phase, and report the phase as this process's progress."""
        start = time.perf_counter()
        with progress.within(phase):
            yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def sft_step(
    policy: PolicyEngine, prompts: Sequence[Prompt], processor: PromptProcessor, settings: StepSettings
) -> StepReport:
    """Make one supervised optimizer step on this rank's share of the global batch."""
    report = StepReport()
    with report.timed("update"):
        batches = supervised_batches(prompts, processor.pad_token_id, settings.micro_batches, policy.process_groups)
        totals = global_totals(
            [batch.response_lengths for batch in batches], settings.max_response_length, policy.process_groups
        )
        minibatch, report.supervised = [SftBatch(batch, totals) for batch in batches], batches
        sums = policy.forward_backward(minibatch, supervised_objective())
        result = policy.step()
    report.metrics.update(finish_metrics(sums))
    if not result.applied:
        report.skipped.append(SkippedUpdate(0, minibatch, (), report.metrics))
    report.metrics.update(
        {"grad_norm": result.grad_norm, "lr": result.learning_rate, "skipped_steps": float(not result.applied)}
    )
    return report


def supervised_batches(
    prompts: Sequence[Prompt], pad_token_id: int, micro_batches: MicroBatchSettings, process_groups: ProcessGroups
) -> list[GroupBatch]:
    """Return reference responses as groups of one, in micro-batches."""
    lengths = [len(prompt.input_ids) + len(prompt.response_ids) for prompt in prompts]
    batches = []
    for part in cut_into_micro_batches(lengths, len(prompts), micro_batches, process_groups):
        chosen = [prompts[index] for index in part]
        longest = max(len(prompt.response_ids) for prompt in chosen)
        ids = torch.full((len(chosen), 1, longest), pad_token_id)
        for index, prompt in enumerate(chosen):
            ids[index, 0, : len(prompt.response_ids)] = prompt.response_ids
        lengths = torch.tensor([[len(prompt.response_ids)] for prompt in chosen])
        batches.append(GroupBatch(pad_prompts(chosen, pad_token_id), ids, lengths))
    return batches


@dataclass(frozen=True)
class Engines:
    """Models of a run."""

    policy: PolicyEngine
    sampler: Sampler
    """Source of the policy's responses."""
    reference: Optional[FrozenEngine | PolicyBase] = None
    """Frozen reference, where the KL or target `reference` needs it. With adapters, the policy without them."""
    teacher: Optional[TeacherEngine] = None
    """Model to distil from."""


def rl_step(
    engines: Engines,
    prompts: Sequence[Prompt],
    processor: PromptProcessor,
    objective: Objective,
    rollout_settings: RolloutSettings,
    settings: StepSettings,
    step: int,
    measure_gradient_ratio: bool,
    draw: Optional[DrawPrompts] = None,
) -> StepReport:
    """Collect one rollout and make its optimizer steps.

    Args:
        engines: Models of the run.
        prompts: Prompts of this data-parallel rank.
        processor: Decoder of token ids.
        objective: Loss with an attention term. The term's coefficient is set here for every optimizer step.
        rollout_settings: Settings of the rollout.
        settings: Settings of the step.
        step: 0-based rollout number, part of the random streams.
        measure_gradient_ratio: Whether to measure |grad attention| / |grad tokens| on the last optimizer step.
        draw: Source of the prompts that replace groups without signal. None: no group is replaced.
    """
    report, policy = StepReport(), engines.policy
    with report.timed("rollout"):
        rollout = collect_rollout(
            policy,
            engines.sampler,
            prompts,
            processor,
            rollout_settings,
            step,
            settings.micro_batches,
            engines.teacher,
            draw,
        )
    report.sampling_seconds = report.seconds["rollout"]
    _train(engines, rollout, objective, rollout_settings, settings, step, measure_gradient_ratio, report)
    return report


def overlapped_step(
    engines: Engines,
    ahead: RolloutsAhead,
    take: Callable[[], Sequence[Prompt]],
    objective: Objective,
    rollout_settings: RolloutSettings,
    settings: StepSettings,
    step: int,
    measure_gradient_ratio: bool,
) -> StepReport:
    """Make the optimizer steps of a rollout that was sampled one step before, and meanwhile sample the next one.

    A run's first step has no step before it and samples two rollouts. Its last step samples none.

    Args:
        engines, objective, rollout_settings, settings, step, measure_gradient_ratio: As for `rl_step`.
        ahead: Rollouts of the run.
        take: Function that reads this rank's next prompts.
    """
    report = StepReport()
    if ahead.pending is None:
        with report.timed("data"):
            prompts = take()
        with report.timed("rollout"):
            ahead.sample(prompts, step)
    with report.timed("rollout"):
        rollout, report.sampling_seconds = ahead.take(step, settings.micro_batches)
    if step + 1 < rollout_settings.num_steps:
        with report.timed("data"):
            prompts = take()
        with report.timed("rollout"):
            ahead.begin(prompts, step + 1)
    report.metrics.update(staleness_metrics(rollout.versions, engines.policy))
    _train(engines, rollout, objective, rollout_settings, settings, step, measure_gradient_ratio, report)
    with report.timed("rollout"):
        ahead.finish()
    return report


def _train(
    engines: Engines,
    rollout: Rollout,
    objective: Objective,
    rollout_settings: RolloutSettings,
    settings: StepSettings,
    step: int,
    measure_gradient_ratio: bool,
    report: StepReport,
) -> None:
    """Make the optimizer steps on a rollout and add their results to the report. Arguments are those of `rl_step`."""
    policy, report.rollout = engines.policy, rollout.batches
    old, reference, target = _passes(engines, [batch.groups for batch in report.rollout], objective, settings, report)
    minibatches = assemble_minibatches(
        report.rollout,
        old,
        reference,
        target,
        objective.term("attention"),
        num_minibatches=settings.num_minibatches,
        max_response_length=settings.max_response_length,
        process_groups=policy.process_groups,
    )
    report.metrics.update(rollout_metrics(report.rollout, policy, engines.teacher is not None))
    if rollout_settings.num_resamplings:
        report.metrics.update(resampling_metrics(rollout.resampling, policy))
    if rollout_settings.refill_rounds:
        report.metrics.update(refill_metrics(rollout.sampled_rewards, policy))

    updates: list[dict[str, float]] = []
    num_updates = settings.num_epochs * len(minibatches)
    for number in range(num_updates):
        index = number % len(minibatches)
        minibatch = minibatches[index]
        if number == 0 and not rollout_settings.explores:
            minibatch = [replace(batch, compares_sampler=True) for batch in minibatch]
        if engines.teacher is not None:  # per update, so that the teacher's rows of a whole rollout need not be held
            with report.timed("teacher"):
                minibatch = add_teacher_outputs(engines.teacher, minibatch, objective, settings, step)
        with report.timed("update"):
            with policy.ready(policy.local_layers(sorted(objective.recorded_layers))):
                measures = measure_gradient_ratio and number == num_updates - 1
                metrics = accumulate_gradients(policy, minibatch, objective, settings.num_optimizer_steps, measures)
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
            batches = report.rollout[index * len(minibatch) : (index + 1) * len(minibatch)]
            report.skipped.append(SkippedUpdate(number, minibatch, [batch.score for batch in batches], updates[-1]))
    report.metrics.update(mean_over_updates(updates))
    # The first update is on policy (its divergence to `old` is zero by construction): the last one shows the term.
    for name, update in (("last", updates[-1]), ("first", updates[0])):
        if "attention/divergence" in update:
            report.metrics[f"attention/divergence_{name}_update"] = update["attention/divergence"]


def _passes(
    engines: Engines,
    batches: Sequence[GroupBatch],
    objective: Objective,
    settings: StepSettings,
    report: StepReport,
) -> tuple[Passes, Optional[Passes], Optional[Passes]]:
    """Run the passes without gradient before the first update.

    Returns:
        Passes of the policy, of the reference, and of whichever of them the attention target needs. The policy's leaves
        out (None) the micro-batches of the update that is still on policy.
    """
    term: AttentionTerm = objective.term("attention")
    layers, needs = sorted(term.layers), term.target_pass
    own = num_on_policy_updates(settings.num_epochs) * (len(batches) // settings.num_minibatches)

    def run(engine: StageEngine | PolicyBase, recorded: bool, batches: Sequence[GroupBatch]) -> Passes:
        if not batches:
            return []
        return engine.forward(
            batches,
            layers if recorded else (),
            temperature=objective.temperature,
            position=term.stored_position,
            store=term.store,
        )

    with report.timed("old"):
        old = [None] * own + list(run(engines.policy, needs is TargetPass.ROLLOUT_POLICY, batches[own:]))
    reference = None
    if engines.reference is not None:
        with report.timed("reference"):
            theirs = batches
            if settings.encodes_for_reference:
                theirs = [replace(batch, visual_embeds=None) for batch in batches]
            reference = run(engines.reference, needs is TargetPass.REFERENCE, theirs)
    target = {TargetPass.ROLLOUT_POLICY: old, TargetPass.REFERENCE: reference}.get(needs)
    return old, reference, target


def add_teacher_outputs(
    teacher: TeacherEngine, minibatch: Sequence[RlBatch], objective: Objective, settings: StepSettings, step: int
) -> list[RlBatch]:
    """Return the micro-batches of one optimizer step with the teacher's outputs for them."""
    attention: AttentionDistillationTerm = objective.term("distill_attention")
    outputs = teacher.read(
        [batch.groups for batch in minibatch],
        sorted(attention.layers),
        position=attention.position,
        store=attention.store,
        hidden_states=attention.settings.token_divergence != "cross_entropy",
    )
    result = []
    for batch, output in zip(minibatch, outputs):
        rows = output.attention
        if settings.shuffles_teacher_rows:
            rows = {
                layer: shuffled_visual_columns(row, batch.groups, settings.seed, step) for layer, row in rows.items()
            }
        result.append(replace(batch, teacher=TeacherOutputs(output.hidden, rows)))
    return result
