"""Form of the rules about combinations of settings; the rules are in `rules.py`."""

import re
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, Callable, Iterator, Optional, Union

from megatron_ral.config.sections import RunConfig
from megatron_ral.errors import ConfigError, show_value


class Severity(Enum):
    """Consequence of a rule that fires."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True)
class Launch:
    """A configuration and the number of processes that are to run it."""

    config: RunConfig
    world_size: int
    training: bool = True
    """False where nothing is trained, so that batch sizes do not matter."""

    @property
    def model_ranks(self) -> int:
        """Number of ranks of one copy of the policy."""
        parallel = self.config.parallel
        return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size

    @property
    def teacher_ranks(self) -> int:
        """Number of ranks of one copy of the teacher."""
        return self.config.teacher_layout[0] * self.config.teacher_layout[1]

    @property
    def data_ranks(self) -> int:
        """Data-parallel size of the policy."""
        return self.world_size // self.model_ranks

    @property
    def updates(self) -> int:
        """Number of parts into which each rank's prompts are divided, one per optimizer step."""
        return 1 if self.config.train.algorithm == "sft" else self.config.rollout.num_minibatches

    @property
    def batch_key(self) -> str:
        """Setting that holds the number of prompts."""
        return "train.batch_size" if self.config.train.algorithm == "sft" else "rollout.num_prompts"

    @property
    def groups_per_rank(self) -> int:
        """Prompt groups that one rank handles per optimizer step."""
        return setting(self.config, self.batch_key) // (self.data_ranks * self.updates)


Subject = Union[RunConfig, Launch]
Text = Union[str, Callable[[Any], str]]


@dataclass(frozen=True)
class Rule:
    """One combination of settings and what to say of it."""

    severity: Severity
    key: Text
    """Setting at fault, by dotted key, or a function that finds it."""
    applies: Callable[[Any], bool]
    """Condition over the configuration, or over a `Launch`."""
    remedy: Text
    """Rest of the sentence `key = value remedy`. `{dotted.key}` stands for another setting and its value."""
    value: Optional[Callable[[Any], object]] = None
    """Value at fault; None for the one at `key`."""

    def error(self, subject: Subject) -> ConfigError:
        """Return the sentence that this rule says of a configuration to which it applies."""
        config = subject.config if isinstance(subject, Launch) else subject
        key = self.key if isinstance(self.key, str) else self.key(subject)
        remedy = self.remedy if isinstance(self.remedy, str) else self.remedy(subject)
        value = self.value(subject) if self.value else setting(config, key)
        named = re.sub(r"\{([\w.]+)\}", lambda match: f"{match[1]} = {show_value(setting(config, match[1]))}", remedy)
        return ConfigError(key, value, named)


def setting(config: RunConfig, key: str) -> Any:
    """Return the value at a dotted key; a number in it is the index of a list item."""
    value: Any = config
    for name in key.split("."):
        value = value[int(name)] if name.isdigit() else getattr(value, name)
    return value


def changed(config: RunConfig, key: str) -> bool:
    """Return True if the setting at a dotted key differs from its default."""
    return setting(config, key) != setting(type(config)(), key)


def keys_of(section: str, settings: type, but: str = "") -> str:
    """Return the keys of a section of settings but one, as `without_effect` takes them."""
    return " ".join([section, *(field.name for field in fields(settings) if field.name != but)])


def without_effect(keys: str, applies: Callable[[RunConfig], bool], reason: Text) -> Iterator[Rule]:
    """Return a warning for each of `keys`, a section and names, that is changed from its default where `applies`."""
    section, *names = keys.split()
    for name in names:
        key = f"{section}.{name}"

        def fires(config: RunConfig, key: str = key) -> bool:
            return changed(config, key) and applies(config)

        def remedy(config: RunConfig) -> str:
            return f"has no effect {reason if isinstance(reason, str) else reason(config)}"

        yield Rule(Severity.WARNING, key, fires, remedy)
