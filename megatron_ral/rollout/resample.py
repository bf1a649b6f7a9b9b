"""Adaptive noise: a prompt that no response answers correctly is sampled again with more noise on its attention.

A model that is sure of the wrong place needs more noise than one that is not, and how sure it is differs from prompt to
prompt. So the noise of a prompt rises until a response is right, for some attempts. Which prompts are sampled again
does not depend on the number of ranks.
"""

from dataclasses import dataclass
from typing import Callable, Sequence

from torch import Tensor

from megatron_ral.functional.advantages import is_right
from megatron_ral.rollout.refill import ScoredGroups
from megatron_ral.types import Prompt


@dataclass
class Resampling:
    """Count of this rank's groups in a rollout."""

    tried: int = 0
    """Groups of the policy, those that were later replaced by other prompts included."""
    failed: int = 0
    """Groups of these without a right response at their first attempt, if there were more."""
    rescued: int = 0
    """Failed groups with a right response at a later attempt."""


def resample(
    groups: ScoredGroups,
    attempt: Callable[[Sequence[Prompt], int], ScoredGroups],
    num_attempts: int,
    resampling: Resampling,
) -> ScoredGroups:
    """Sample the groups without a right response again, until they have one.

    Data-parallel ranks make unequal numbers of attempts, so that an attempt must not wait for other ranks than those of
    its copy of the model.

    Args:
        groups: Groups of the first attempt. Those of a teacher stay.
        attempt: Function of prompts and the number of an attempt, which samples and scores groups.
        num_attempts: Largest number of further attempts. Each replaces the groups of the one before.
        resampling: Count to add to.

    Returns:
        As many groups as before, in the same order.
    """
    resampling.tried += groups.from_teacher.count(False)
    for number in range(1, num_attempts + 1):
        right = _has_right(groups)
        failed = [row for row, taught in enumerate(groups.from_teacher) if not taught and not right[row]]
        if number == 1:
            resampling.failed += len(failed)
        if not failed:
            break
        fresh = attempt([groups.prompts[row] for row in failed], number)
        resampling.rescued += int(_has_right(fresh).sum())
        groups = groups.replaced(failed, fresh)
    return groups


def _has_right(groups: ScoredGroups) -> Tensor:
    """Return which groups have a right response, [groups] bool."""
    return is_right(groups.score.components["accuracy"]).any(dim=1)
