"""All loggers of a run as one, chosen by settings.

A logger is a module of this folder that is named like its switch, a setting `logging.<name>` that is off when it is
false or empty. The module sets `LOGGER` to a class that has the methods of `RunLogger`, a classmethod
`from_config(config, first_step)`, and `packages`, the packages that it imports. A new logger thus takes two files: its
module, and its switch in `config/watching.py`.
"""

import dataclasses
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Mapping, Sequence

from megatron_ral.config import RunConfig
from megatron_ral.config.watching import LoggingConfig
from megatron_ral.data.video import VideoSettings
from megatron_ral.errors import ConfigError
from megatron_ral.evaluation.evaluate import Evaluation
from megatron_ral.evaluation.probes import ProbeView
from megatron_ral.rollout.collect import RolloutBatch
from megatron_ral.training.logging.base import RunLogger


def logger_names() -> list[str]:
    """Return the names of the settings that switch a logger on: fields of section `logging` that a module is named
    after."""
    modules = {module.name for module in iter_modules([str(Path(__file__).parent)])}
    return [field.name for field in dataclasses.fields(LoggingConfig) if field.name in modules]


def logger_class(name: str) -> Any:
    """Return the class of the logger that the setting `logging.<name>` switches on."""
    return import_module(f"{__package__}.{name}").LOGGER


def check_packages(config: LoggingConfig) -> None:
    """Check that the packages of every logger that is switched on are installed.

    Raises:
        ConfigError: naming the setting and the package.
    """
    for name in logger_names():
        for package in logger_class(name).packages if getattr(config, name) else ():
            spec = find_spec(package)
            if spec is None or spec.origin is None:  # without origin: a folder of that name, not the package
                raise ConfigError(
                    f"logging.{name}",
                    getattr(config, name),
                    f"needs the package {package}, which is not installed; install it, or leave the setting out",
                )


class Loggers:
    """Several loggers that are called as one. Ranks that do not log hold none, so that their calls do nothing."""

    def __init__(self, loggers: Sequence[RunLogger] = ()):
        self.loggers = tuple(loggers)

    @classmethod
    def from_config(cls, config: RunConfig, first_step: int = 0) -> "Loggers":
        """Open every logger that is switched on.

        Args:
            config: Configuration of the run.
            first_step: Number of steps done before this start of the run.
        """
        names = [name for name in logger_names() if getattr(config.logging, name)]
        return cls([logger_class(name).from_config(config, first_step) for name in names])

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for logger in self.loggers:
            logger.scalars(values, step)

    def completions(self, rollout: Sequence[RolloutBatch], step: int) -> None:
        for logger in self.loggers:
            logger.completions(rollout, step)

    def evaluation(self, result: Evaluation, step: int) -> None:
        for logger in self.loggers:
            logger.evaluation(result, step)

    def probes(self, views: Sequence[ProbeView], video: VideoSettings, step: int) -> None:
        for logger in self.loggers:
            logger.probes(views, video, step)

    def close(self, step: int) -> None:
        for logger in self.loggers:
            logger.close(step)
