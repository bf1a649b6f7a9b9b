"""Responses -> Score: decode, reward, and which responses could not be scored."""

import logging
from collections import Counter
from typing import Iterable, Iterator, NamedTuple, Optional, Sequence

import torch

from megatron_ral.config.sections import RewardConfig
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine.stage import StageEngine
from megatron_ral.parallel.collectives import from_first_rank
from megatron_ral.rewards.score import UNPARSED, reward_parts, score_response
from megatron_ral.runtime.progress import tick
from megatron_ral.types import Prompt, ResponseBatch, Score

logger = logging.getLogger(__name__)

SHOWN_TEXT = 300
"""Characters of an offending response in the log, from its end."""


def decode_responses(responses: ResponseBatch, processor: PromptProcessor) -> tuple[tuple[str, ...], ...]:
    """Texts [B][G]."""
    return tuple(
        tuple(processor.decode(ids[:length]) for ids, length in zip(group, lengths))
        for group, lengths in zip(responses.response_ids, responses.response_lengths.tolist())
    )


def score_responses(
    responses: ResponseBatch, processor: PromptProcessor, reward: RewardConfig, engine: Optional[StageEngine] = None
) -> Score:
    """Decode and score (strings in, floats out; cheap beside a pass of the model).

    The project's own rules give every rank the same, so each rank calls them. Functions of the user's own need not (a
    judge over the network, a random choice): with `engine` the first rank of its model copy calls them for all.
    """
    if engine is not None and reward.functions:
        return from_first_rank(lambda: score_responses(responses, processor, reward), engine.process_groups.model)
    parts, texts = reward_parts(reward), decode_responses(responses, processor)
    samples = [prompt.sample for prompt in responses.prompts.prompts]
    scored = []
    for sample, group in zip(samples, texts):
        scored.append([])
        for text in group:
            tick([sample.identity])  # a function of the user's own may take long
            scored[-1].append(score_response(text, sample.solution, sample.problem_type, parts))
    components = {
        name: torch.tensor([[score.components[name] for score in row] for row in scored])
        for name in scored[0][0].components
    }
    return Score(
        torch.tensor([[score.reward for score in row] for row in scored]),
        components,
        texts,
        tuple(
            tuple(score.problems + _type_problem(sample.problem_type, reward.accuracy) for score in row)
            for sample, row in zip(samples, scored)
        ),
    )


def _type_problem(problem_type: str, accuracy: str) -> tuple[str, ...]:
    if accuracy == "by_type" and problem_type:
        from megatron_ral.rewards.rules import has_rule

        if not has_rule(problem_type):
            return (f"problem_type '{problem_type}': has no rule, so the answer is matched exactly",)
    return ()


def unused_rules(problem_types: Iterable[str], accuracy: str) -> list[str]:
    """Problem types that have a rule of their own while reward.accuracy = exact matches their answers as text."""
    if accuracy == "by_type":
        return []
    from megatron_ral.rewards.rules import RULES, exact, has_rule, rule_name

    return sorted({name for name in problem_types if has_rule(name) and RULES.get(rule_name(name)) is not exact})


class ScoringIssue(NamedTuple):
    """A response that could not be scored as it should be."""

    kind: str
    """`unparsed`, or which reward failed."""
    line: str


def scoring_issues(score: Score, prompts: Sequence[Prompt], unparsed: bool = True) -> Iterator[ScoringIssue]:
    """The problems of a score with the sample and the end of the text.

    Args:
        unparsed: with responses that have no answer.
    """
    for prompt, texts, group in zip(prompts, score.texts, score.problems):
        for text, problems in zip(texts, group):
            for problem in problems:
                kind = problem.partition(":")[0]
                if unparsed or kind != UNPARSED:
                    yield ScoringIssue(kind, f"sample '{prompt.sample.identity}': {problem}: {text[-SHOWN_TEXT:]!r}")


class ScoringIssueLog:
    """Writes the first few problems of each kind to the log.

    Args:
        limit: of each kind.
        kinds: that are shown at all; data with a problem type for every sample must not fill the log.
    """

    def __init__(self, limit: int = 3, kinds: int = 20):
        self.limit, self.kinds, self._shown = limit, kinds, Counter()

    def select(self, problems: Iterable[ScoringIssue]) -> list[ScoringIssue]:
        """Those that are still to be shown; they count as shown."""
        chosen = []
        for problem in problems:
            known = problem.kind in self._shown or len(self._shown) < self.kinds
            if known and self._shown[problem.kind] < self.limit:
                self._shown[problem.kind] += 1
                chosen.append(problem)
        return chosen

    def write(self, problems: Iterable[ScoringIssue], prefix: str = "") -> None:
        for problem in self.select(problems):
            logger.warning("%s%s", prefix, problem.line)
