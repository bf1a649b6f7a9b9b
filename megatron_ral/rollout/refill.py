"""Refill of a rollout: groups without signal make room for groups of new prompts (dynamic sampling of DAPO).

A prompt keeps the slot of the global batch that it replaces, so that which prompts are tried does not depend on the
number of ranks, and no group moves from one rank to another.

Departure from DAPO (arXiv 2503.14476, section 3.2): the number of rounds is limited, and what then still has no signal
stays in the batch. DAPO samples whole batches until there are enough groups, and drops what is left over.
"""

from dataclasses import dataclass
from typing import Callable, Mapping, Optional, Sequence

from torch import Tensor

from megatron_ral.engine.pipelined_decoder import PromptResponses
from megatron_ral.functional.advantages import has_signal
from megatron_ral.parallel.collectives import gather_objects
from megatron_ral.parallel.process_groups import ProcessGroups
from megatron_ral.types import Prompt, Score

DrawPrompts = Callable[[Sequence[int]], Mapping[int, Prompt]]
"""Function from ascending slots of all data-parallel ranks to the new prompts of this rank's slots. Slot i belongs to
rank i % data-parallel size."""


@dataclass(frozen=True)
class ScoredGroups:
    """Prompts of this data-parallel rank with their responses, one entry of each field per prompt."""

    prompts: list[Prompt]
    responses: list[PromptResponses]
    visual_embeds: list[Optional[Tensor]]
    """Outputs of the frozen vision tower, on the first stage. None elsewhere."""
    from_teacher: list[bool]
    """True where the responses are the teacher's."""
    versions: list[int]
    """Optimizer updates behind the weights that sampled the responses. -1 where nobody says: those of the teacher, and
    those to partial views."""
    score: Score

    def select(self, rows: Sequence[int]) -> "ScoredGroups":
        """Return some groups, in the given order."""
        return ScoredGroups(
            [self.prompts[row] for row in rows],
            [self.responses[row] for row in rows],
            [self.visual_embeds[row] for row in rows],
            [self.from_teacher[row] for row in rows],
            [self.versions[row] for row in rows],
            self.score.select(rows),
        )

    def replaced(self, rows: Sequence[int], fresh: "ScoredGroups") -> "ScoredGroups":
        """Return these groups with others in the places of some.

        Args:
            rows: Places, one for each group of `fresh`.
            fresh: Groups that take them.
        """
        chosen = list(range(len(self.prompts)))
        for number, row in enumerate(rows):
            chosen[row] = len(self.prompts) + number
        return self._followed_by(fresh).select(chosen)

    def _followed_by(self, other: "ScoredGroups") -> "ScoredGroups":
        return ScoredGroups(
            self.prompts + other.prompts,
            self.responses + other.responses,
            self.visual_embeds + other.visual_embeds,
            self.from_teacher + other.from_teacher,
            self.versions + other.versions,
            Score.join([self.score, other.score]),
        )


def refill(
    groups: ScoredGroups,
    answer: Callable[[Sequence[Prompt]], ScoredGroups],
    draw: DrawPrompts,
    num_rounds: int,
    process_groups: ProcessGroups,
) -> tuple[ScoredGroups, list[Score]]:
    """Replace the groups without signal, those of the new prompts as well, for some rounds.

    Args:
        groups: Groups of this data-parallel rank. Its i-th group has the slot rank + i * data-parallel size.
        answer: Function that samples and scores groups, inside a model copy. It is called for this rank's prompts.
        draw: Source of new prompts.
        num_rounds: Maximum number of rounds.
        process_groups: Process groups of this rank.

    Returns:
        The groups to train on, as many as before and in the order of their slots, and the scores of all new groups.
    """
    rank, size, scores = process_groups.layout.data_rank, process_groups.layout.data_size, []
    for _ in range(num_rounds):
        lacking = [rank + row * size for row in (~has_signal(groups.score.rewards)).nonzero()[:, 0].tolist()]
        slots = sorted(slot for told in gather_objects(lacking, process_groups.data) for slot in told)
        if not slots:
            break
        drawn = draw(slots)
        if not drawn:  # only other ranks have groups to replace
            continue
        fresh = answer([drawn[slot] for slot in lacking])
        scores.append(fresh.score)
        groups = groups.replaced([slot // size for slot in lacking], fresh)
    return groups, scores
