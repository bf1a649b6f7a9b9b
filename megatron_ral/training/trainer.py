"""Run around the steps: build, resume, step, log, evaluate, checkpoint, export."""

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Mapping, Optional, Sequence

from tqdm import tqdm

from megatron_ral.config import RunConfig
from megatron_ral.config.rules import setting_warnings
from megatron_ral.data.loader import PromptLoader
from megatron_ral.data.peers import ReplicaPeers
from megatron_ral.engine.frozen import FrozenEngine, PolicyBase
from megatron_ral.engine.gather import gathered
from megatron_ral.engine.settings import EngineSettings
from megatron_ral.evaluation.evaluate import evaluate_prompts
from megatron_ral.evaluation.generation import EvaluationSettings
from megatron_ral.evaluation.probes import view_probes
from megatron_ral.evaluation.prompt_set import PromptSet, check_any_prompt, read_prompts
from megatron_ral.models.shape import ModelShape
from megatron_ral.parallel.collectives import gather_from_all, gather_objects
from megatron_ral.parallel.process_groups import ProcessGroups
from megatron_ral.rollout.ahead import RolloutsAhead
from megatron_ral.rollout.scoring import ScoringIssueLog, scoring_issues
from megatron_ral.rollout.settings import RolloutSettings
from megatron_ral.runtime.progress import progress
from megatron_ral.runtime.random_state import seed_random_state
from megatron_ral.runtime.stopping import StopRequests
from megatron_ral.training.build import build_objective, build_policy, build_sampler, build_teacher
from megatron_ral.training.checkpoint.pending import pending_files, restore_pending
from megatron_ral.training.checkpoint.restore import agree_on_checkpoint, restore_checkpoint
from megatron_ral.training.checkpoint.settings import CheckpointSettings
from megatron_ral.training.checkpoint.writer import CheckpointWriter
from megatron_ral.training.inputs import Inputs
from megatron_ral.training.logging.loggers import Loggers
from megatron_ral.training.logging.throughput import Throughput, ThroughputSettings
from megatron_ral.training.replay_files import ReplaySettings, replay_command, save_replay
from megatron_ral.training.step import Engines, StepReport, StepSettings, overlapped_step, rl_step, sft_step
from megatron_ral.types import Prompt
from megatron_ral.weights.adapter_weights import export_adapters
from megatron_ral.weights.stage_weights import export_stage

logger = logging.getLogger(__name__)


class TooManySkippedSteps(RuntimeError):
    """A loss or the gradient was not finite for train.max_skipped_steps steps in a row."""


class Trainer:
    """One run on one rank.

    Args:
        config: Resolved configuration, checked against the world size.
        shape: Shape of model.path, checked against the layout.
        process_groups: Process groups of this rank.
        inputs: Inputs on disk.
        teacher_shape: Shape of teacher.path, checked against the layout and the student. None: no teacher.
        stopping: Requests that end the run before its last step. None: train.time_limit_minutes from now.
    """

    def __init__(
        self,
        config: RunConfig,
        shape: ModelShape,
        process_groups: ProcessGroups,
        inputs: Inputs,
        teacher_shape: Optional[ModelShape] = None,
        stopping: Optional[StopRequests] = None,
    ):
        self.config, self.shape, self.process_groups, self.layout = config, shape, process_groups, process_groups.layout
        self.is_main = process_groups.layout.rank == 0
        self.inputs, self.processor, self.eval_shards = inputs, inputs.processor, inputs.eval_shards
        self.stopping = stopping or StopRequests(config.train.time_limit_minutes)
        self.num_skipped, self.first_step, self.problems = 0, 0, ScoringIssueLog()
        self.peers = ReplicaPeers(process_groups)
        self.loader = PromptLoader(
            inputs.sources,
            self.processor,
            config.data,
            dp_rank=self.layout.data_rank,
            dp_size=self.layout.data_size,
            seed=config.seed,
            batch_size=self.prompts_per_step,
            report=self.is_main,
            exchange=gather_from_all,
            peers=self.peers,
        )
        if self.eval_shards and config.logging.eval_interval:
            check_any_prompt(self._heldout_prompts(), process_groups)
        teacher = None
        if teacher_shape is not None:
            teacher = build_teacher(config, teacher_shape, shape, process_groups, self.processor)
        self.objective = build_objective(config, shape, process_groups, teacher)
        self.policy = build_policy(config, shape, process_groups)
        reference = None
        if config.needs_reference:
            if config.holds_reference:
                settings = EngineSettings.reference_from_config(config)
                reference = FrozenEngine(replace(shape, adapter=None), process_groups, settings)
            else:
                reference = PolicyBase(self.policy)
        self.engines = Engines(self.policy, build_sampler(config, self.policy, self.processor), reference, teacher)
        self.step_settings = StepSettings.from_config(config)
        self.rollout_settings = RolloutSettings.from_config(config)
        self.checkpoint_settings = CheckpointSettings.from_config(config)
        self.checkpoints = CheckpointWriter(self.checkpoint_settings, self.policy, self.loader)
        draw = self._draw if config.rollout.refill_rounds else None
        self.ahead = RolloutsAhead(
            self.policy, self.engines.sampler, self.processor, self.rollout_settings, self.loader, teacher, draw
        )
        self.throughput = Throughput(ThroughputSettings.from_config(config), shape, teacher_shape, process_groups)

    @property
    def prompts_per_step(self) -> int:
        """Number of prompts that one step reads, over all data-parallel ranks."""
        config = self.config
        return config.train.batch_size if config.train.algorithm == "sft" else config.rollout.num_prompts

    def run(self) -> None:
        """Resume from a checkpoint if there is one, train to the last step, save a checkpoint and export the model."""
        started, config = time.perf_counter(), self.config
        Path(config.train.output_dir).mkdir(parents=True, exist_ok=True)
        first = 0
        seed_random_state(config.seed, self.layout.rank)
        checkpoint = agree_on_checkpoint(self.checkpoint_settings, self.inputs.checkpoint)
        if checkpoint is not None:
            with progress.within("restore", is_long=True):
                first = self.first_step = restore_checkpoint(
                    checkpoint, self.policy, self.loader, config.model.train_vision
                )
                if config.overlaps and first < config.train.num_steps:
                    self.ahead.pending = restore_pending(checkpoint, self.layout, self.loader)
            self._print(f"resumed from {checkpoint}: {first} of {config.train.num_steps} steps done")
        self._print_shards()
        for warning in setting_warnings(config):
            if self.is_main:
                logger.warning(warning)
        log = Loggers.from_config(config, first) if self.is_main else Loggers()
        probes = self._probe_prompts()
        if first == 0:
            self._evaluate_if_due(log, probes, 0)
        end = min(config.train.stop_after_step or config.train.num_steps, config.train.num_steps)
        bar = tqdm(
            total=end,
            initial=first,
            desc=config.train.algorithm,
            unit="step",
            disable=not self.is_main,
            mininterval=5.0,
        )
        with progress.within("training", is_long=False):
            done, stop = self._steps(first, end, log, probes, bar)
        with progress.within("end", is_long=True):
            bar.close()
            self._finish(log, first, done, stop, started)

    def _finish(self, log: Loggers, first: int, done: int, stop: Optional[str], started: float) -> None:
        """Report how the run ended, export the model, and write the summary."""
        config = self.config
        self.engines.sampler.close()
        if stop:
            self._print(
                f"{stop}: stopped after step {done} of {config.train.num_steps}, "
                + (
                    f"which is checkpointed in {config.train.output_dir}; go on with the same command and --resume"
                    if done
                    else "nothing to checkpoint; start again"
                )
            )
        if config.train.export and done == config.train.num_steps:
            with progress.within("export", is_long=True):
                export_stage(
                    self.policy.stage,
                    self.process_groups,
                    config.model.path,
                    f"{config.train.output_dir}/hf",
                    config.model.format_tags,
                    gathered,
                )
                if self.shape.adapter is not None:
                    export_adapters(
                        self.policy.stage,
                        self.process_groups,
                        config.model.path,
                        f"{config.train.output_dir}/adapter",
                        gathered,
                    )
        log.close(done)
        self._summary(time.perf_counter() - started, first, done)

    def _steps(self, first: int, end: int, log: Loggers, probes: list, bar: tqdm) -> tuple[int, Optional[str]]:
        """Make steps first..end, or fewer where a stop is requested. Return (steps done, reason of an early stop)."""
        done, stop = first, self.stopping.agreed(self.process_groups)
        while done < end and not stop:
            progress.step = done + 1
            report = self._one_step(done)
            self._log_step(log, report, done, bar)
            self._watch_skipped(report, done)
            done += 1
            self._evaluate_if_due(log, probes, done)
            stop, interval = self.stopping.agreed(self.process_groups), self.config.train.checkpoint_interval
            with progress.within("checkpoint", is_long=True):
                self.checkpoints.poll()
                if done == end or stop or (interval and done % interval == 0):
                    pending = pending_files(self.ahead.pending, self.layout, self.processor.pad_token_id)
                    self.checkpoints.save(done, wait=bool(done == end or stop), files=pending)
        return done, stop if done < end else None

    def _one_step(self, step: int) -> StepReport:
        config = self.config
        interval = config.logging.gradient_ratio_interval
        acts = config.attention_acts or (config.distills and config.distill.attention_coef > 0)
        measure = bool(interval) and acts and (step + 1) % interval == 0
        objective, settings = self.objective, (self.rollout_settings, self.step_settings)
        if config.overlaps:
            return overlapped_step(self.engines, self.ahead, self._take, objective, *settings, step, measure)
        started = time.perf_counter()
        prompts = self._take()
        waited = time.perf_counter() - started
        if config.train.algorithm == "sft":
            report = sft_step(self.policy, prompts, self.processor, self.step_settings)
        else:
            report = rl_step(
                self.engines, prompts, self.processor, objective, *settings, step, measure, self.ahead.draw
            )
        return replace(report, seconds={"data": waited, **report.seconds})

    def _take(self) -> Sequence[Prompt]:
        """Read this rank's prompts of a step."""
        with progress.within("data"):
            prompts = self.loader.take(self.prompts_per_step)
            progress.tick([prompt.sample.identity for prompt in prompts])
        return prompts

    def _draw(self, slots: Sequence[int]) -> Mapping[int, Prompt]:
        """Read the prompts that replace groups without signal."""
        with progress.within("data"):
            prompts = self.loader.fill(slots)
            progress.tick([prompt.sample.identity for prompt in prompts.values()])
        return prompts

    def _log_step(self, log: Loggers, report: StepReport, step: int, bar: tqdm) -> None:
        seconds = sum(report.seconds.values())
        log.scalars(report.metrics, step + 1)
        log.scalars({f"timing/{name}": value for name, value in report.seconds.items()}, step + 1)
        log.scalars(self.throughput.measure(report), step + 1)
        by_reason = self.loader.quarantined_by_reason
        log.scalars(
            {
                "timing/step": seconds,
                "data/quarantined": float(by_reason.total()),
                **{f"data/quarantined/{reason}": float(count) for reason, count in by_reason.items()},
            },
            step + 1,
        )
        self._show_problems(report, step)
        if step == self.first_step and self.is_main and report.metrics.get("rewards/format/mean") == 0.0:
            logger.warning(
                "step %d: no response of the first rollout has the rewarded format, so that its reward teaches "
                "nothing: teach it by a cold start (train.algorithm=sft), or ask for it with data.prompt_suffix; its "
                "tags are read and written as %s (model.format_tags)",
                step + 1,
                {"text": "text", "token": "single tokens"}[self.processor.format_tags],
            )
        interval = self.config.logging.completions_interval
        if report.rollout and interval and (step % interval == 0):
            log.completions(report.rollout, step + 1)
        shown = {
            name.split("/")[-1]: f"{report.metrics[name]:.3g}"
            for name in ("loss", "reward", "kl", "attention/divergence", "attention/grad_ratio", "grad_norm")
            if name in report.metrics
        }
        bar.set_postfix(shown, refresh=False)
        bar.update()

    def _show_problems(self, report: StepReport, step: int) -> None:
        """Log the first unparsed responses and failures of reward functions of all ranks."""
        if not report.rollout:
            return
        found = [
            problem
            for scored in report.rollout
            for problem in scoring_issues(scored.score, scored.groups.prompts.prompts)
        ]
        gathered = gather_objects(ScoringIssueLog().select(found), self.process_groups.data)
        if self.is_main:
            self.problems.write([problem for rank in gathered for problem in rank], f"step {step + 1}: ")

    def _watch_skipped(self, report: StepReport, step: int) -> None:
        """Warn of skipped updates and save their batches. Stop after train.max_skipped_steps of them in a row."""
        for skipped in report.skipped:
            with progress.within("replay", is_long=True):
                kept = save_replay(self.policy, skipped, ReplaySettings.from_config(self.config), step + 1)
            if kept is not None and self.is_main:
                logger.warning(
                    "step %d, update %d: the batch was saved with the weights of that moment; "
                    "find what is not finite with\n  %s",
                    step + 1,
                    skipped.update + 1,
                    replay_command(kept, self.layout.world_size),
                )
        self.num_skipped = self.num_skipped + 1 if report.metrics["skipped_steps"] > 0 else 0
        if self.num_skipped and self.is_main:
            logger.warning(
                "step %d: a loss or the gradient was not finite; the update was skipped (%d steps in a row)",
                step + 1,
                self.num_skipped,
            )
        if self.num_skipped == self.config.train.max_skipped_steps:
            with progress.within("checkpoint", is_long=True):
                self.checkpoints.finish()  # the run resumes from one that is being written
            raise TooManySkippedSteps(
                f"a loss or the gradient was not finite for train.max_skipped_steps = {self.num_skipped} "
                f"steps in a row, the last of them step {step + 1}; lower the learning rate or "
                "resume from an earlier checkpoint"
            )

    def _probe_prompts(self) -> list:
        settings = self.config.logging
        if not self.eval_shards or not settings.probe_interval or not settings.num_probes:
            return []
        readers, peers = self.layout.world_size, self.peers
        return read_prompts(self.eval_shards, self.processor, settings.num_probes, num_readers=readers, peers=peers)

    def _evaluate_if_due(self, log: Loggers, probes: list, step: int) -> None:
        """Evaluate and draw attention pictures where they are due after `step` steps."""
        settings, layer = self.config.logging, max(self.objective.term("attention").layers)
        evaluation = EvaluationSettings.from_config(self.config)
        last = step == self.config.train.num_steps
        if probes and (step % settings.probe_interval == 0 or last):
            with progress.within("probes"):
                views = view_probes(self.policy, probes, self.processor, evaluation, layer, self.engines.teacher)
            log.probes(views, self.processor.video, step)
        if self.eval_shards and settings.eval_interval and (step % settings.eval_interval == 0 or last):
            with progress.within("evaluation"):
                result = evaluate_prompts(self.policy, self._heldout_prompts(), self.processor, evaluation, layer)
            log.evaluation(result, step)

    def _heldout_prompts(self) -> PromptSet:
        return PromptSet(
            self.eval_shards,
            self.processor,
            self.config.logging.num_eval_prompts,
            dp_rank=self.layout.data_rank,
            dp_size=self.layout.data_size,
            num_readers=self.layout.world_size,
            peers=self.peers,
        )

    def _print_shards(self) -> None:
        """Print the bytes that each rank holds, which show that ZeRO-3 shards."""
        for name, engine in (("layout", self.policy), ("teacher", self.engines.teacher)):
            if engine is None:
                continue
            held, layout = gather_objects(engine.shard_bytes(), engine.process_groups.data), engine.layout
            self._print(
                f"{name}: tensor {layout.tensor_size} x pipeline {layout.pipeline_size} x data {layout.data_size}; "
                "bytes held between steps by the data-parallel ranks of stage 0:"
            )
            for rank, parts in enumerate(held):
                shares = ", ".join(f"{name} {value:,}" for name, value in parts.items() if name != "whole stage")
                self._print(f"  data rank {rank}: {shares} (whole stage: {parts['whole stage']:,})")
        recorded = self.policy.local_layers(sorted(self.objective.recorded_layers))
        self._print(f"each optimizer step, in stage 0: {self.policy.traffic(recorded)} over the data-parallel ranks")
        if self.objective.recorded_layers:
            self._print(f"attention rows: {self.policy.row_path}")

    def _summary(self, seconds: float, first: int, end: int) -> None:
        if not self.is_main:
            return
        train = self.config.train
        summary = {
            "algorithm": train.algorithm,
            "seconds": round(seconds, 2),
            "first_step": first,
            "last_step": end,
            "end_step": min(train.stop_after_step or train.num_steps, train.num_steps),
            "quarantined": self.loader.quarantined,
            "quarantined_by_reason": self.loader.quarantined_by_reason,
            "filtered": self.loader.filtered,
            "layout": {
                "tensor": self.layout.tensor_size,
                "pipeline": self.layout.pipeline_size,
                "data": self.layout.data_size,
            },
        }
        path = Path(self.config.train.output_dir) / "summary.json"
        path.write_text(json.dumps(summary, indent=2))
        self._print(
            f"{self.config.train.algorithm}: steps {first}..{end} in {seconds:.1f} s; "
            f"{len(self.loader.quarantined)} samples quarantined; summary in {path}"
        )

    def _print(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)
