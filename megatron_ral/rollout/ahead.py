"""Rollouts one step ahead: the rollout of the next step is sampled before the updates of this one change the weights.

    step k    train on rollout k, which was sampled before the updates of step k - 1
              meanwhile sample rollout k + 1 with the weights that step k begins with

A served sampler works while the policy is trained. The native one needs the policy's devices, so that its rollout is
complete before the updates begin. Both draw the same prompts in the same order, with the same seeds and weights.

Every rollout is complete at the end of a step: answered, scored and refilled. So nothing is under way while a run
evaluates or saves, and a checkpoint can hold the rollout that the next step trains on (`PendingRollout`).
"""

import time
from dataclasses import dataclass, replace
from typing import Mapping, Optional, Sequence

from torch import Tensor

from megatron_ral.data.loader import PromptLoader
from megatron_ral.data.order import Place
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine.stage import StageEngine
from megatron_ral.engine.teacher import TeacherEngine
from megatron_ral.rollout.collect import (
    Rollout,
    ScoredRollout,
    begin_rollout,
    cut_rollout,
    sample_rollout,
)
from megatron_ral.rollout.lengths import MicroBatchSettings
from megatron_ral.rollout.refill import DrawPrompts
from megatron_ral.rollout.sampler import Background, Sampler
from megatron_ral.rollout.settings import RolloutSettings
from megatron_ral.types import Prompt


@dataclass(frozen=True)
class PendingRollout:
    """Rollout that waits for the step that trains on it."""

    step: int
    """0-based step."""
    scored: ScoredRollout
    """Groups of this data-parallel rank, without visual embeddings, which the step computes. The i-th group has the
    slot rank + i * data-parallel size of the batch."""
    places: Mapping[int, Place]
    """Place of each slot's sample in the data, of all ranks."""
    seconds: float
    """Seconds that sampling and scoring took, those beside updates included."""


@dataclass(frozen=True)
class BegunRollout:
    """Rollout that a sampler works at while the policy is trained."""

    step: int
    prompts: Sequence[Prompt]
    background: Background
    seconds: float
    """Seconds that its beginning took."""


class RolloutsAhead:
    """Rollouts of a run, each sampled one step before it is trained on. Every rank makes the same calls.

    Args:
        engine: Policy.
        sampler: Source of its responses.
        processor: Decoder of token ids.
        settings: Settings of a rollout.
        loader: Loader that the prompts come from.
        teacher: Model that answers a share of the prompts.
        draw: Source of the prompts that replace groups without signal. None: no group is replaced.
    """

    def __init__(
        self,
        engine: StageEngine,
        sampler: Sampler,
        processor: PromptProcessor,
        settings: RolloutSettings,
        loader: PromptLoader,
        teacher: Optional[TeacherEngine] = None,
        draw: Optional[DrawPrompts] = None,
    ):
        self.engine, self.sampler, self.processor, self.settings = engine, sampler, processor, settings
        self.loader, self.teacher, self.draw = loader, teacher, draw
        self.pending: Optional[PendingRollout] = None
        """Rollout that the next step trains on."""
        self._begun: Optional[BegunRollout] = None

    def sample(self, prompts: Sequence[Prompt], step: int, seconds: float = 0.0) -> None:
        """Sample and score the rollout of a step now, and wait for it.

        Args:
            prompts: The loader's newest batch.
            step: 0-based step.
            seconds: Seconds that were spent on it before.
        """
        assert self.pending is None, "the rollout before it was not trained on"
        started = time.perf_counter()
        arguments = self.engine, self.sampler, prompts, self.processor, self.settings, step, self.teacher
        scored = sample_rollout(*arguments, self.draw)
        groups = replace(scored.groups, visual_embeds=[None] * len(prompts))
        seconds += time.perf_counter() - started
        self.pending = PendingRollout(step, replace(scored, groups=groups), dict(self.loader.places), seconds)

    def take(self, step: int, micro_batches: MicroBatchSettings) -> tuple[Rollout, float]:
        """Return the rollout of a step in micro-batches, and the seconds that it took to sample.

        Args:
            step: 0-based step.
            micro_batches: Size of a micro-batch.
        """
        pending, self.pending = self.pending, None
        assert pending is not None and pending.step == step
        groups = pending.scored.groups
        scored = replace(pending.scored, groups=replace(groups, visual_embeds=self._encode(groups.prompts)))
        rollout = cut_rollout(scored, self.processor, self.settings, step, micro_batches, self.engine.process_groups)
        return rollout, pending.seconds

    def begin(self, prompts: Sequence[Prompt], step: int) -> None:
        """Start the rollout of a step with the weights of this moment, or sample it where the sampler cannot wait."""
        started = time.perf_counter()
        arguments = self.engine, self.sampler, prompts, self.processor, self.settings, step, self.teacher
        background = begin_rollout(*arguments)
        seconds = time.perf_counter() - started
        if background is None:
            self.sample(prompts, step, seconds)
        else:
            self._begun = BegunRollout(step, prompts, background, seconds)

    def finish(self) -> None:
        """Wait for the rollout that was begun, if one is under way, and score it."""
        begun, self._begun = self._begun, None
        if begun is not None:
            self.sample(begun.prompts, begun.step, begun.seconds + begun.background.seconds)

    def _encode(self, prompts: Sequence[Prompt]) -> list[Optional[Tensor]]:
        """Return the outputs of the frozen vision tower for each prompt, on the first stage."""
        size, embeds = self.settings.generation_batch_size, list[Optional[Tensor]]()
        with self.engine.resident():
            for start in range(0, len(prompts), size):
                part = prompts[start : start + size]
                features = self.sampler.encode_visual(part, self.processor.pad_token_id)
                embeds += features if features is not None else [None] * len(part)
        return embeds
