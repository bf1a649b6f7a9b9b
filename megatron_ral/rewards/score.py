"""Scores of responses: the parts of the reward, their weighted sum, and the problems in scoring."""

from dataclasses import dataclass
from typing import Mapping, Protocol

from megatron_ral.errors import ConfigError
from megatron_ral.rewards.answer import accuracy_reward, extract_answer, format_reward
from megatron_ral.rewards.functions import RewardFunction, load_function

UNPARSED, ERROR = "unparsed", "error"
"""Components that count responses without a readable answer and failures of a part; neither has a weight."""
RESERVED = ("accuracy", "format", UNPARSED, ERROR)
"""Names that a reward function of the user cannot have."""
LARGEST = 1.0e30
"""Largest value, before or after weighting, that counts as finite, because larger ones overflow float32 in a sum."""


class FunctionSettings(Protocol):
    """One entry of `reward.functions`."""

    @property
    def path(self) -> str:
        """Import path, `package.module:function`."""
        ...

    @property
    def weight(self) -> float:
        """Factor of the function's value in the reward."""
        ...


class RewardSettings(Protocol):
    """The `reward` section of a configuration."""

    @property
    def accuracy(self) -> str:
        """Kind of the accuracy: `exact` or `by_type`."""
        ...

    @property
    def accuracy_weight(self) -> float:
        """Factor of the accuracy."""
        ...

    @property
    def format_weight(self) -> float:
        """Factor of the format."""
        ...

    @property
    def require_think(self) -> bool:
        """Presence of a think block in the format."""
        ...

    @property
    def functions(self) -> Mapping[str, FunctionSettings]:
        """Functions of the user by name."""
        ...


@dataclass(frozen=True)
class RewardPart:
    """One summand of the reward."""

    name: str
    """Name in the log."""
    function: RewardFunction
    """Value of a response."""
    weight: float
    """Factor of the value in the reward."""


@dataclass(frozen=True)
class ResponseScore:
    """Score of one response."""

    reward: float
    """Weighted sum of the parts."""
    components: Mapping[str, float]
    """Value of each part before weighting, and `unparsed` and `error`, 0 or 1."""
    problems: tuple[str, ...]
    """Problems in scoring, each as `kind: detail`."""


def reward_parts(settings: RewardSettings) -> tuple[RewardPart, ...]:
    """Return the parts of the reward that a configuration asks for.

    Raises:
        ConfigError: a function of the user cannot be used.
    """
    accuracy = accuracy_reward
    if settings.accuracy == "by_type":
        # A late import, because ROUGE's package takes two seconds to load.
        from megatron_ral.rewards.rules import accuracy_by_type as accuracy

    def format_value(response: str, *_: str) -> float:
        return format_reward(response, settings.require_think)

    parts = [
        RewardPart("accuracy", accuracy, settings.accuracy_weight),
        RewardPart("format", format_value, settings.format_weight),
    ]
    for name, own in settings.functions.items():
        if name in RESERVED:
            raise ConfigError(f"reward.functions.{name}", None, f": the name '{name}' is taken; choose another")
        if not name.isidentifier():
            raise ConfigError(
                "reward.functions",
                None,
                f": the name '{name}' must be letters, digits and _, and begin with no digit; it becomes the tag "
                "rewards/<name>/mean",
            )
        parts.append(RewardPart(name, load_function(f"reward.functions.{name}.path", own.path), own.weight))
    return tuple(parts)


def score_response(response: str, solution: str, problem_type: str, parts: tuple[RewardPart, ...]) -> ResponseScore:
    """Return the score of one response. The reward is the sum over parts of weight * value.

    A part that raises or returns no finite number has the value 0 and counts as an error.

    Args:
        response: generated text.
        solution: `<answer>..</answer>`, once or several times, or the bare answer.
        problem_type: problem type of the sample; may be empty.
        parts: parts of the reward.
    """
    values: dict[str, float] = {}
    problems: list[str] = []
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
    """Return (value of a part, problem); an empty problem: none."""
    try:
        returned = part.function(response, solution, problem_type)
        value = float(returned)
    except (Exception, SystemExit) as error:  # no failure of a reward function may end the run
        return 0.0, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if not max(abs(value), abs(value * part.weight)) <= LARGEST:
        return 0.0, f"returned {value}, which with weight {part.weight} is not a finite number of float32"
    return value, ""
