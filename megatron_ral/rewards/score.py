"""Score decoded responses: components, then their weighted sum."""

from typing import Callable, Mapping, Sequence

from megatron_ral.rewards.answer import accuracy_reward, extract_answer, format_reward

Components = Mapping[str, Callable[[str, str], float]]


def reward_components(require_think: bool) -> Components:
    """Name -> function(response, solution) -> float. `unparsed` is counted apart from wrong and carries no weight."""
    return {
        "accuracy": accuracy_reward,
        "format": lambda response, solution: format_reward(response, require_think),
        "unparsed": lambda response, solution: float(extract_answer(response) is None),
    }


def score_response(response: str, solution: str, components: Components,
                   weights: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """(weighted reward, components) of one response."""
    values = {name: function(response, solution) for name, function in components.items()}
    return sum(weights.get(name, 0.0) * value for name, value in values.items()), values


def score_group(responses: Sequence[str], solution: str, components: Components,
                weights: Mapping[str, float]) -> list[tuple[float, dict[str, float]]]:
    """`score_response` for the G responses of one prompt."""
    return [score_response(response, solution, components, weights) for response in responses]
