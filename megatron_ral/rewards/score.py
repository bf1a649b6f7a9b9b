"""Score responses: the parts of the reward, their weighted sum, and what went wrong in scoring."""

from dataclasses import dataclass
from typing import Mapping, Protocol

from megatron_ral.errors import ConfigError
from megatron_ral.rewards.answer import accuracy_reward, extract_answer, format_reward
from megatron_ral.rewards.functions import RewardFunction, load_function

UNPARSED, ERROR = "unparsed", "error"
"""Components that count responses and carry no weight."""
RESERVED = ("accuracy", "format", UNPARSED, ERROR)
LARGEST = 1.0e30
"""Values beyond it, before or after weighting, overflow float32 when they are summed; they count as not finite."""


class OwnFunction(Protocol):
    """One entry of reward.functions."""

    path: str
    weight: float


class RewardSettings(Protocol):
    """The `reward` section of a configuration."""

    accuracy: str
    accuracy_weight: float
    format_weight: float
    require_think: bool
    functions: Mapping[str, OwnFunction]


@dataclass(frozen=True)
class RewardPart:
    """One summand of the reward."""

    name: str
    function: RewardFunction
    weight: float


@dataclass(frozen=True)
class ResponseScore:
    """What one response got."""

    reward: float
    components: Mapping[str, float]
    """Before weighting, and `unparsed` and `error`, 0 or 1."""
    problems: tuple[str, ...]
    """What went wrong, each as `kind: detail`."""


def reward_parts(settings: RewardSettings) -> tuple[RewardPart, ...]:
    """The parts of the reward that a configuration asks for.

    Raises:
        ConfigError: a function of the user's own cannot be used.
    """
    accuracy = accuracy_reward
    if settings.accuracy == "by_type":
        # Only here, because ROUGE's package takes two seconds to import.
        from megatron_ral.rewards.rules import accuracy_by_type as accuracy
    parts = [
        RewardPart("accuracy", accuracy, settings.accuracy_weight),
        RewardPart(
            "format", lambda response, *_: format_reward(response, settings.require_think), settings.format_weight
        ),
    ]
    for name, own in settings.functions.items():
        if name in RESERVED:
            raise ConfigError(f"reward.functions.{name}: the name '{name}' is taken; choose another")
        if not name.isidentifier():
            raise ConfigError(
                f"reward.functions: the name '{name}' must be letters, digits and _, and begin "
                "with no digit; it becomes the tag rewards/<name>/mean"
            )
        parts.append(RewardPart(name, load_function(f"reward.functions.{name}.path", own.path), own.weight))
    return tuple(parts)


def score_response(response: str, solution: str, problem_type: str, parts: tuple[RewardPart, ...]) -> ResponseScore:
    """Reward of one response: the sum over parts of weight * value. A part that raises or returns no finite number is 0
    and counted as an error."""
    values, problems = {}, []
    if extract_answer(response) is None:
        problems.append(f"{UNPARSED}: not exactly one <answer>..</answer>")
    values[UNPARSED], values[ERROR] = float(bool(problems)), 0.0
    reward = 0.0
    for part in parts:
        values[part.name], problem = _value(part, response, solution, problem_type)
        reward += part.weight * values[part.name]
        if problem:
            values[ERROR] = 1.0
            problems.append(f"reward '{part.name}': {problem}")
    return ResponseScore(reward, values, tuple(problems))


def _value(part: RewardPart, response: str, solution: str, problem_type: str) -> tuple[float, str]:
    """(value of a part, what went wrong)"""
    try:
        returned = part.function(response, solution, problem_type)
        value = float(returned)
    except (Exception, SystemExit) as error:  # whatever a reward function does, the run goes on
        return 0.0, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if not max(abs(value), abs(value * part.weight)) <= LARGEST:
        return 0.0, f"returned {value}, which with weight {part.weight} is not a finite number of float32"
    return value, ""
