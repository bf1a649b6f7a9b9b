"""The interface of a run's loggers."""

from typing import Mapping, Protocol, Sequence

from megatron_ral.data.video import VideoSettings
from megatron_ral.evaluation.evaluate import Evaluation
from megatron_ral.evaluation.probes import ProbeView
from megatron_ral.rollout.collect import RolloutBatch


class RunLogger(Protocol):
    """Receiver of what a run reports. Step numbers are 1-based; step 0 is before the first update."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars by tag."""

    def completions(self, rollout: Sequence[RolloutBatch], step: int) -> None:
        """Log a few prompts of a rollout with all their responses and rewards."""

    def evaluation(self, result: Evaluation, step: int) -> None:
        """Log the results of a held-out evaluation."""

    def probes(self, views: Sequence[ProbeView], video: VideoSettings, step: int) -> None:
        """Log the attention picture and the response of each probe prompt."""

    def close(self, step: int) -> None:
        """Log the final figures of the run and close the logger. No other method is called afterwards."""


def evaluation_scalars(result: Evaluation) -> dict[str, float]:
    """Return the scalars of an evaluation by tag."""
    return {
        "eval/accuracy": result.accuracy,
        "eval/format_rate": result.format_rate,
        "eval/unparsed_rate": result.unparsed_rate,
        "eval/error_rate": result.error_rate,
        "eval/target_attention": result.target_attention,
        "eval/visual_mass": result.visual_mass,
        **{
            f"eval/{name}/layer_{layer}": share
            for name, shares in (
                ("target_attention", result.target_attention_by_layer),
                ("target_deciding", result.target_deciding_by_layer),
                ("target_peak", result.target_peak_by_layer),
            )
            for layer, share in enumerate(shares)
            if share is not None
        },
    }
