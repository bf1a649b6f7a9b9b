"""The TensorBoard logger: event files of one run under <output_dir>/tensorboard."""

import html
from collections import defaultdict, deque
from dataclasses import dataclass, field, replace
from typing import Any, Mapping, Sequence

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from megatron_ral.config import RunConfig, dump_config, flat_settings
from megatron_ral.data.video import VideoSettings
from megatron_ral.evaluation.attention_pictures import attention_picture
from megatron_ral.evaluation.evaluate import Evaluation
from megatron_ral.evaluation.probes import ProbeView
from megatron_ral.rollout.collect import RolloutBatch
from megatron_ral.training.logging.base import evaluation_scalars
from megatron_ral.training.logging.dashboard import FINAL, LAYOUT, hyperparameters, method_name


@dataclass(frozen=True)
class TensorBoardSettings:
    """Settings of the TensorBoard logger."""

    folder: str
    """Folder of the event files."""
    num_completions: int
    """Number of prompts of a rollout that are shown with their responses."""
    config_text: str = field(repr=False)
    """Configuration of the run as YAML."""
    hyperparameters: Mapping[str, bool | int | float | str] = field(repr=False)
    """Settings by which runs are compared in HPARAMS."""

    @classmethod
    def from_config(cls, config: RunConfig) -> "TensorBoardSettings":
        """Return the settings of a run's configuration."""
        method = method_name(
            config.train.algorithm,
            config.loss.policy_loss,
            trains_attention=config.attention_acts,
            distills=config.distills,
        )
        return cls(
            folder=f"{config.train.output_dir}/tensorboard",
            num_completions=config.logging.num_completions,
            config_text=dump_config(config),
            hyperparameters=hyperparameters(flat_settings(config), method),
        )


class TensorBoardLogger:
    """Writer of scalars, pictures and texts, of a page of charts, and of the settings with the run's final figures.

    The charts are TensorBoard's page CUSTOM SCALARS. Settings and final figures are its page HPARAMS, on which the runs
    under one --logdir are compared.

    Args:
        settings: Folder, configuration and number of completions.
        first_step: Number of steps done before this start of the run. Events that an earlier start wrote after it are
            hidden, because the resumed run writes these steps again.
    """

    packages = ("tensorboard",)

    def __init__(self, settings: TensorBoardSettings, first_step: int = 0):
        self.settings = settings
        self._recent: dict[str, deque[float]] = defaultdict(deque)
        """Last values of each tag in FINAL."""
        self._writer = SummaryWriter(settings.folder, purge_step=first_step + 1 if first_step else None)
        self._writer.add_text("config", f"<pre>{html.escape(settings.config_text)}</pre>", first_step)
        self._writer.add_custom_scalars(LAYOUT)
        *start, self._end = hparams(dict(settings.hyperparameters), {f"final/{tag}": 0.0 for tag in FINAL})
        for summary in start:
            self._add_summary(summary)

    @classmethod
    def from_config(cls, config: RunConfig, first_step: int = 0) -> "TensorBoardLogger":
        """Open the logger of a run that has done `first_step` steps."""
        return cls(TensorBoardSettings.from_config(config), first_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars by tag."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
            if name in FINAL:
                self._recent[name] = deque([*self._recent[name], value], FINAL[name])

    def completions(self, rollout: Sequence[RolloutBatch], step: int) -> None:
        """Write a table of responses and rewards for each of a few prompts.

        The prompts are spread over the micro-batches of the rollout, because these are ordered by length.
        """
        everything = [(batch, b, prompt) for batch in rollout for b, prompt in enumerate(batch.groups.prompts.prompts)]
        count = min(self.settings.num_completions, len(everything))
        for index in range(count):
            batch, b, prompt = everything[index * len(everything) // count]
            parts = batch.score.components
            rows = [
                f"**{html.escape(prompt.sample.problem)}** — {html.escape(prompt.sample.solution)} "
                f"(key {html.escape(prompt.sample.key)})",
                "",
                f"| reward | {' | '.join(parts)} | response |",
                "|---" * (2 + len(parts)) + "|",
            ]
            for g, (text, reward) in enumerate(zip(batch.score.texts[b], batch.score.rewards[b].tolist())):
                values = " | ".join(f"{values[b, g]:.2f}" for values in parts.values())
                one_line = " ".join(html.escape(text).replace("|", "&#124;").split())  # a line break would end the row
                rows.append(f"| {reward:.2f} | {values} | {one_line} |")
            self._writer.add_text(f"completions/{index}", "\n".join(rows), step)

    def evaluation(self, result: Evaluation, step: int) -> None:
        """Write the scalars of a held-out evaluation."""
        self.scalars(evaluation_scalars(result), step)

    def probes(self, views: Sequence[ProbeView], video: VideoSettings, step: int) -> None:
        """Write the attention over the images or video of each probe as pictures, and its response as text.

        One picture shows the mean over all response tokens, the other the deciding row alone, where there is one.
        """
        for index, view in enumerate(views):
            if len(view.prompt.grid_thw):
                shown = {f"attention/probe_{index}": view}
                if view.deciding_attention is not None:
                    shown[f"attention/probe_{index}_deciding"] = replace(
                        view, visual_attention=view.deciding_attention, teacher_attention=None
                    )
                for tag, picture in shown.items():
                    self._writer.add_image(tag, attention_picture(picture, video), step, dataformats="HWC")
            self._writer.add_text(
                f"probes/{index}",
                f"**{html.escape(view.prompt.sample.problem)}** — "
                f"{html.escape(view.prompt.sample.solution)}: {html.escape(view.text)}",
                step,
            )

    def close(self, step: int) -> None:
        """Write the final figures of this start of the run and close the files."""
        for tag, values in self._recent.items():
            self._writer.add_scalar(f"final/{tag}", sum(values) / len(values), step)
        self._add_summary(self._end)
        self._writer.close()

    def _add_summary(self, summary: Any) -> None:
        assert self._writer.file_writer is not None
        self._writer.file_writer.add_summary(summary)


LOGGER = TensorBoardLogger
