"""Scores of responses: the parts of the reward, their weighted sum, and the problems in scoring."""

from dataclasses import dataclass
from typing import Callable, Mapping, Optional, Protocol, Sequence

from megatron_ral.errors import ConfigError
from megatron_ral.rewards.answer import accuracy_reward, extract_answer, format_reward
from megatron_ral.rewards.process import CallFailed, CallTimeout, FunctionProcess

UNPARSED, ERROR = "unparsed", "error"
"""Components that count responses without a readable answer and failures of a part; neither has a weight."""
RESERVED = ("accuracy", "format", UNPARSED, ERROR)
"""Names that a reward function of the user cannot have."""
LARGEST = 1.0e30
"""Largest value, before or after weighting, that counts as finite, because larger ones overflow float32 in a sum."""
_OWN = FunctionProcess()

PartFunction = Callable[[str, str, str, Sequence[str], str], float]
"""Function of a response, the solution, the problem type, the options and the question of the sample."""


class RewardTimeout(Exception):
    """A function of the user did not return within its time limit.

    Args:
        name: Name of the function in `reward.functions`.
        seconds: Time limit.
    """

    def __init__(self, name: str, seconds: float):
        super().__init__(f"reward '{name}' did not return within {seconds:g} s")
        self.name, self.seconds = name, seconds


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
    function: PartFunction
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


def reward_parts(settings: RewardSettings, time_limit: Optional[float] = None) -> tuple[RewardPart, ...]:
    """Return the parts of the reward that a configuration asks for.

    Functions of the user are imported and called in a process of their own (`process.py`), which all of them share.

    Args:
        settings: The `reward` section.
        time_limit: Seconds that one call of a function of the user may take; None for no limit.

    Raises:
        ConfigError: a function of the user cannot be used.
    """

    def accuracy(response: str, solution: str, problem_type: str, options: Sequence[str], _: str) -> float:
        if settings.accuracy == "exact":
            return accuracy_reward(response, solution)
        # A late import, because ROUGE's package takes two seconds to load.
        from megatron_ral.rewards.rules import decided_accuracy

        return decided_accuracy(response, solution, problem_type, options)

    def format_value(response: str, *_: object) -> float:
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
        _OWN.load(f"reward.functions.{name}.path", own.path)
        parts.append(RewardPart(name, _own_function(name, own.path, time_limit), own.weight))
    return tuple(parts)


def _own_function(name: str, path: str, time_limit: Optional[float]) -> PartFunction:
    def call(response: str, solution: str, problem_type: str, _: Sequence[str], problem: str) -> float:
        try:
            return _OWN.call(path, response, solution, problem_type, problem=problem, seconds=time_limit)
        except CallTimeout as error:
            raise RewardTimeout(name, error.seconds) from None

    return call


def score_response(
    response: str,
    solution: str,
    problem_type: str,
    parts: tuple[RewardPart, ...],
    options: Sequence[str] = (),
    problem: str = "",
) -> ResponseScore:
    """Return the score of one response. The reward is the sum over parts of weight * value.

    A part that raises or returns no finite number has the value 0 and counts as an error.

    Args:
        response: generated text.
        solution: `<answer>..</answer>`, once or several times, or the bare answer.
        problem_type: problem type of the sample; may be empty.
        parts: parts of the reward.
        options: contents of the sample's options; empty where it has none.
        problem: text of the question, for functions of the user that read it.

    Raises:
        RewardTimeout: a function of the user did not return in time.
    """
    values: dict[str, float] = {}
    problems: list[str] = []
    if extract_answer(response) is None:
        problems.append(f"{UNPARSED}: not exactly one <answer>..</answer>")
    values[UNPARSED], values[ERROR] = float(bool(problems)), 0.0
    reward = 0.0
    for part in parts:
        values[part.name], fault = _value(part, response, solution, problem_type, options, problem)
        reward += part.weight * values[part.name]
        if fault:
            values[ERROR] = 1.0
            problems.append(f"reward '{part.name}': {fault}")
    return ResponseScore(reward, values, tuple(problems))


def _value(
    part: RewardPart, response: str, solution: str, problem_type: str, options: Sequence[str], problem: str
) -> tuple[float, str]:
    """Return (value of a part, fault); an empty fault: none."""
    try:
        value = part.function(response, solution, problem_type, options, problem)
    except RewardTimeout:
        raise
    except (CallFailed, CallTimeout) as error:
        return 0.0, str(error)
    except Exception as error:  # no failure of a reward may end the run
        return 0.0, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if not max(abs(value), abs(value * part.weight)) <= LARGEST:
        return 0.0, f"returned {value}, which with weight {part.weight} is not a finite number of float32"
    return value, ""
