"""The Weights & Biases logger: the scalars of a run, as in TensorBoard.

A run that goes on from a checkpoint continues its record under the same id, which stands in `OUTPUT_DIR/wandb_id`.
Scalars are drawn over `step`, the run's own step, because W&B's counter does not go back for steps that are made again.
"""

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Mapping, Sequence

from megatron_ral.config import RunConfig, flat_settings
from megatron_ral.data.video import VideoSettings
from megatron_ral.errors import ConfigError
from megatron_ral.evaluation.evaluate import Evaluation
from megatron_ral.evaluation.probes import ProbeView
from megatron_ral.rollout.collect import RolloutBatch
from megatron_ral.training.logging.base import evaluation_scalars

STEP = "step"


@dataclass(frozen=True)
class WandbSettings:
    """Settings of the Weights & Biases logger."""

    project: str
    """Project that the run belongs to."""
    folder: str
    """Output folder of the run. W&B keeps its files in the folder `wandb` inside it."""
    run_settings: Mapping[str, Any] = field(repr=False)
    """Settings of the run by dotted name."""


class WandbLogger:
    """Sender of scalars to Weights & Biases. Texts and pictures stay in TensorBoard.

    Args:
        settings: Project, folder and settings of the run.
        first_step: Number of steps done before this start of the run.

    Raises:
        ConfigError: the run cannot be opened, for instance without a login.
    """

    packages = ("wandb",)

    def __init__(self, settings: WandbSettings, first_step: int = 0):
        wandb: Any = import_module("wandb")
        id_file = Path(settings.folder) / "wandb_id"
        known = id_file.read_text().strip() if first_step and id_file.is_file() else None
        try:
            self._run = wandb.init(
                project=settings.project,
                name=Path(settings.folder).name,
                dir=settings.folder,
                config=dict(settings.run_settings),
                id=known,
                resume="allow" if known else None,
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise ConfigError(
                "logging.wandb",
                settings.project,
                f"cannot be opened ({' '.join(str(error).split())}); log in with 'wandb login' or set "
                "WANDB_MODE=offline",
            ) from None
        id_file.write_text(f"{self._run.id}\n")
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    @classmethod
    def from_config(cls, config: RunConfig, first_step: int = 0) -> "WandbLogger":
        """Open the logger of a run that has done `first_step` steps."""
        return cls(WandbSettings(config.logging.wandb, config.train.output_dir, flat_settings(config)), first_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Send scalars by tag."""
        self._run.log({**values, STEP: step})

    def completions(self, rollout: Sequence[RolloutBatch], step: int) -> None:
        """Do nothing."""

    def evaluation(self, result: Evaluation, step: int) -> None:
        """Send the scalars of a held-out evaluation."""
        self.scalars(evaluation_scalars(result), step)

    def probes(self, views: Sequence[ProbeView], video: VideoSettings, step: int) -> None:
        """Do nothing."""

    def close(self, step: int) -> None:
        """Send what is left, end the record, and wait for W&B's own process, which writes the files."""
        self._run.finish()
        wandb: Any = import_module("wandb")
        wandb.teardown()


LOGGER = WandbLogger
