"""Settings of a rollout."""

from dataclasses import dataclass
from typing import Optional

from megatron_ral.attention.exploration import ExplorationSettings
from megatron_ral.attention.targets.base import AttentionTarget
from megatron_ral.attention.targets.load import load_target
from megatron_ral.attention.targets.registry import TARGETS, TargetPass
from megatron_ral.config.sections import AttentionNoiseConfig, RewardConfig, RunConfig, ViewsConfig
from megatron_ral.engine.settings import schedule_factor
from megatron_ral.models.shape import ModelShape


@dataclass(frozen=True)
class RolloutSettings:
    """Settings of a rollout."""

    seed: int
    group_size: int
    max_response_length: int
    temperature: float
    top_p: float
    generation_batch_size: int
    """Largest number of prompts that are generated together."""
    cache_tokens: int
    """Largest number of tokens in the KV cache of one batch. 0: no limit."""
    num_minibatches: int
    """Number of optimizer updates per pass over the rollout."""
    refill_rounds: int
    """Maximum number of rounds in which groups without signal are replaced."""
    reward: RewardConfig
    reward_time_limit: float
    """Seconds that one call of a reward function of the user may take."""
    advantage_scale: str
    """Scale of `group_advantages`."""
    target: AttentionTarget
    """Target of the attention term, which weights the responses."""
    recorded_layers: tuple[int, ...]
    """Layers whose attention rows decoding records, 0-based or negative from the last."""
    noise: AttentionNoiseConfig
    views: Optional[ViewsConfig]
    """Partial views that responses are sampled from. None: the whole picture."""
    num_steps: int
    """Number of rollouts of the run, over which the noise is scheduled."""
    shuffles_attention_advantages: bool
    """True if the attention term gets the advantages of each group in a random order (a control)."""
    teacher_rollouts: float
    """Share of prompts that the teacher answers, 0 without a teacher."""

    @classmethod
    def from_config(cls, config: RunConfig) -> "RolloutSettings":
        rollout, needs = config.rollout, TARGETS[config.loss.attention_target].needs
        return cls(
            seed=config.seed,
            group_size=rollout.group_size,
            max_response_length=rollout.max_response_length,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            generation_batch_size=rollout.generation_batch_size,
            cache_tokens=rollout.cache_tokens,
            num_minibatches=rollout.num_minibatches,
            refill_rounds=rollout.refill_rounds,
            reward=config.reward,
            reward_time_limit=config.watchdog.reward_time_limit,
            advantage_scale=config.loss.advantage_scale,
            target=load_target(config.loss.attention_target),
            recorded_layers=config.loss.attention_layers if needs is TargetPass.ROLLOUT else (),
            noise=rollout.attention_noise,
            views=rollout.views if rollout.has_views else None,
            num_steps=config.train.num_steps,
            shuffles_attention_advantages=config.loss.attention_advantages == "shuffled",
            teacher_rollouts=config.distill.teacher_rollouts if config.distills else 0.0,
        )

    @property
    def explores(self) -> bool:
        """Say whether responses are sampled from another distribution than the policy's on the whole picture."""
        return self.noise.sigma > 0 or self.views is not None

    @property
    def num_resamplings(self) -> int:
        """Return how often a prompt without a right response is sampled again. Without noise there is none to raise."""
        return self.noise.adaptive if self.noise.sigma > 0 else 0

    def exploration(self, shape: ModelShape, step: int, attempt: int = 0) -> ExplorationSettings:
        """Return noise and recording of one rollout.

        Args:
            shape: Shape of the policy.
            step: 0-based rollout number.
            attempt: How often the prompts were sampled before. Each time sigma is twice as large.
        """
        noise = self.noise
        return ExplorationSettings(
            noise.sigma * 2**attempt * schedule_factor(step, self.num_steps, 0, noise.decay),
            frozenset(shape.layer_indices(noise.layers, "rollout.attention_noise.layers") or shape.softmax_layers),
            noise.grids or (noise.grid,),
            is_shared=noise.shared,
            by_lead=noise.scale == "lead",
            recorded_layers=frozenset()
            if self.views is not None
            else frozenset(shape.layer_indices(self.recorded_layers)),
        )
