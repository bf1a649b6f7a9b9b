"""Inputs of a run on disk: model folder, shards and checkpoint."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence

from megatron_ral.config import RunConfig
from megatron_ral.data.loader import Source, open_sources
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.models.folder import config_folder
from megatron_ral.training.checkpoint.restore import find_checkpoint
from megatron_ral.training.checkpoint.settings import CheckpointSettings
from megatron_ral.training.logging.loggers import check_packages


@dataclass(frozen=True)
class Inputs:
    """Inputs of a run on disk, checked before anything is built."""

    processor: PromptProcessor
    sources: Sequence[Source]
    eval_shards: Sequence[str]
    checkpoint: Optional[Path]
    """Checkpoint to resume from. None: the run starts anew."""

    @classmethod
    def open(cls, config: RunConfig, resume: bool) -> "Inputs":
        """Open every path of the configuration.

        Raises:
            DataError: Shards are missing or hold no sample.
            ConfigError: Tokenizer or processor cannot be used, teacher and student disagree, or a logger's package is
                not installed.
            CheckpointError: The run cannot go on from the checkpoint found, or may not start beside it.
        """
        check_packages(config.logging)
        sources = open_sources([(source.shards, source.num_samples) for source in config.data.train], "data.train")
        eval_shards: Sequence[str] = ()
        if config.data.eval_shards:
            eval_shards = open_sources([(config.data.eval_shards, 0)], "data.eval_shards")[0].shards
        processor = PromptProcessor.from_config(config)
        if config.distills:
            processor.check_same(str(config_folder(config.teacher.path)), "model.path", "teacher.path")
        is_main = int(os.environ.get("RANK", 0)) == 0
        checkpoint = find_checkpoint(CheckpointSettings.from_config(config), resume, warn=is_main)
        return cls(processor, sources, eval_shards, checkpoint)
