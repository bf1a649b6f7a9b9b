"""TensorBoard, written by rank 0 alone; the same calls do nothing elsewhere."""

import html
from collections import defaultdict, deque
from typing import Mapping, Sequence

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from megatron_ral.config import RunConfig, dump_config
from megatron_ral.data.video import VideoSettings
from megatron_ral.evaluation.attention_pictures import attention_picture
from megatron_ral.evaluation.evaluate import Evaluation, ProbeView
from megatron_ral.rollout.collect import RolloutBatch
from megatron_ral.training.logging.dashboard import FINAL, LAYOUT, hyperparameters


class RunLog:
    """Event files of one run under <output_dir>/tensorboard: scalars, pictures and text, a page of charts (CUSTOM
    SCALARS), and the settings with the run's last figures, by which runs under one --logdir compare (HPARAMS)."""

    def __init__(self, config: RunConfig, active: bool, first_step: int = 0):
        self.config = config
        self._writer = None
        self._recent: dict[str, deque[float]] = defaultdict(deque)
        """Tag -> the last values of what a run is compared by."""
        if active and config.logging.tensorboard:
            # purge_step hides what a killed run wrote after the checkpoint it is resumed from
            self._writer = SummaryWriter(
                f"{config.train.output_dir}/tensorboard", purge_step=first_step + 1 if first_step else None
            )
            self._writer.add_text("config", f"<pre>{html.escape(dump_config(config))}</pre>", first_step)
            self._writer.add_custom_scalars(LAYOUT)
            *start, self._end = hparams(hyperparameters(config), {f"final/{tag}": 0.0 for tag in FINAL})
            for summary in start:
                self._writer.file_writer.add_summary(summary)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
                if name in FINAL:
                    self._recent[name] = deque([*self._recent[name], value], FINAL[name])

    def completions(self, rollout: Sequence[RolloutBatch], step: int) -> None:
        """Some prompts of a rollout, spread over its micro-batches (which are in order of length), with all their responses
        and rewards."""
        if self._writer is None:
            return
        everything = [
            (scored, b, prompt) for scored in rollout for b, prompt in enumerate(scored.groups.prompts.prompts)
        ]
        count = min(self.config.logging.num_completions, len(everything))
        for shown in range(count):
            scored, b, prompt = everything[shown * len(everything) // count]
            parts = scored.score.components
            rows = [
                f"**{html.escape(prompt.sample.problem)}** — {html.escape(prompt.sample.solution)} "
                f"(key {html.escape(prompt.sample.key)})",
                "",
                f"| reward | {' | '.join(parts)} | response |",
                "|---" * (2 + len(parts)) + "|",
            ]
            for g, (text, reward) in enumerate(zip(scored.score.texts[b], scored.score.rewards[b].tolist())):
                values = " | ".join(f"{values[b, g]:.2f}" for values in parts.values())
                shown_text = " ".join(html.escape(text).replace("|", "&#124;").split())  # a line break ends a row
                rows.append(f"| {reward:.2f} | {values} | {shown_text} |")
            self._writer.add_text(f"completions/{shown}", "\n".join(rows), step)

    def evaluation(self, result: Evaluation, step: int) -> None:
        self.scalars(
            {
                "eval/accuracy": result.accuracy,
                "eval/format_rate": result.format_rate,
                "eval/unparsed_rate": result.unparsed_rate,
                "eval/error_rate": result.error_rate,
                "eval/target_attention": result.target_attention,
                "eval/visual_mass": result.visual_mass,
            },
            step,
        )

    def probes(self, views: Sequence[ProbeView], settings: VideoSettings, step: int) -> None:
        """Attention over the images or video of each probe, and the responses as text."""
        if self._writer is None:
            return
        for index, view in enumerate(views):
            if len(view.prompt.grid_thw):
                self._writer.add_image(
                    f"attention/probe_{index}", attention_picture(view, settings), step, dataformats="HWC"
                )
            self._writer.add_text(
                f"probes/{index}",
                f"**{html.escape(view.prompt.sample.problem)}** — "
                f"{html.escape(view.prompt.sample.solution)}: {html.escape(view.text)}",
                step,
            )

    def close(self, step: int) -> None:
        """What the run is compared by, after its last step (of this start), and the end of the files."""
        if self._writer is not None:
            for tag, values in self._recent.items():
                self._writer.add_scalar(f"final/{tag}", sum(values) / len(values), step)
            self._writer.file_writer.add_summary(self._end)
            self._writer.close()
