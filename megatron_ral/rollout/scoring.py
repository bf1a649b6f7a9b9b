"""Scores of responses: decoded texts, rewards, and a log of responses that could not be scored as they should be."""

import bisect
import logging
from collections import Counter
from typing import Iterable, Iterator, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from megatron_ral.config.sections import RewardConfig
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine.stage import StageEngine
from megatron_ral.errors import UserError
from megatron_ral.parallel.collectives import from_first_rank
from megatron_ral.rewards.answer_place import answer_start
from megatron_ral.rewards.score import UNPARSED, ResponseScore, RewardPart, RewardTimeout, reward_parts, score_response
from megatron_ral.runtime.progress import progress, tick
from megatron_ral.types import Prompt, ResponseBatch, Sample, Score

logger = logging.getLogger(__name__)

SHOWN_TEXT = 300
"""Number of characters of an offending response that the log shows, counted from its end."""


def decode_responses(responses: ResponseBatch, processor: PromptProcessor) -> tuple[tuple[str, ...], ...]:
    """Return the decoded texts, [B][G]."""
    return tuple(
        tuple(processor.decode(ids[:length]) for ids, length in zip(group, lengths))
        for group, lengths in zip(responses.response_ids, responses.response_lengths.tolist())
    )


def answer_tokens(responses: ResponseBatch, texts: Sequence[Sequence[str]], processor: PromptProcessor) -> Tensor:
    """Return the index of the token with which each response first gives its answer, [B, G] int64; -1: it has none.

    The place in the text is that of `answer_place.answer_start`. A response's text grows with its tokens, so that the
    token is found by bisection over the lengths of decoded prefixes.

    Args:
        responses: Responses.
        texts: Their texts (`decode_responses`).
        processor: Decoder of token ids.
    """
    return torch.tensor(
        [
            [_answer_token(ids[:length], text, processor) for ids, length, text in zip(group, lengths, row)]
            for group, lengths, row in zip(responses.response_ids, responses.response_lengths.tolist(), texts)
        ]
    )


def _answer_token(ids: Tensor, text: str, processor: PromptProcessor) -> int:
    start = answer_start(text)
    if start is None:
        return -1
    return bisect.bisect_right(range(len(ids)), start, key=lambda last: len(processor.decode(ids[: last + 1])))


def score_responses(
    responses: ResponseBatch,
    processor: PromptProcessor,
    reward: RewardConfig,
    engine: Optional[StageEngine] = None,
    time_limit: Optional[float] = None,
) -> Score:
    """Decode responses and compute their rewards. Scoring is cheap beside a pass of the model.

    The project's own reward rules return the same on every rank, so each rank calls them. A user's own function may not
    (a judge over the network, a random choice). With such functions and an `engine`, the first rank of its model copy
    computes the scores and sends them to the other ranks.

    Args:
        responses: Responses of this data-parallel rank, [B, G, R].
        processor: Tokenizer.
        reward: Parts of the reward and their weights.
        engine: Engine whose model copy shares the scores; None computes them on this rank alone.
        time_limit: Seconds that one call of a user's own function may take; None for no limit.

    Raises:
        ConfigError: A user's own function cannot be loaded.
        UserError: A user's own function did not return in time.
        AgreedError: The first rank of the model copy failed to compute the scores.
    """
    if engine is not None and reward.functions:
        return from_first_rank(
            lambda: score_responses(responses, processor, reward, None, time_limit), engine.process_groups.model
        )
    parts, texts = reward_parts(reward, time_limit), decode_responses(responses, processor)
    samples = [prompt.sample for prompt in responses.prompts.prompts]
    scored = []
    for sample, group in zip(samples, texts):
        scored.append([])
        for text in group:
            tick([sample.identity])  # a user's own function may take long
            scored[-1].append(_score_in_time(text, sample, parts))
    components = {
        name: torch.tensor([[score.components[name] for score in row] for row in scored])
        for name in scored[0][0].components
    }
    return Score(
        torch.tensor([[score.reward for score in row] for row in scored]),
        components,
        texts,
        tuple(
            tuple(score.problems + _missing_rule(sample, reward.accuracy) for score in row)
            for sample, row in zip(samples, scored)
        ),
    )


def _score_in_time(text: str, sample: Sample, parts: tuple[RewardPart, ...]) -> ResponseScore:
    try:
        return score_response(text, sample.solution, sample.problem_type, parts, sample.options, sample.problem)
    except RewardTimeout as error:
        step = f" of step {progress.step}" if progress.step else ""
        raise UserError(
            f"reward.functions.{error.name}",
            None,
            f"did not return within {error.seconds:g} s, in phase '{progress.phase}'{step}, on sample "
            f"'{sample.identity}'; give it a time limit of its own, or raise watchdog.timeout_seconds. The response: "
            f"{text[-SHOWN_TEXT:]!r}",
        ) from None


def _missing_rule(sample: Sample, accuracy: str) -> tuple[str, ...]:
    """Return an issue where a sample should be scored by a rule of its problem type but cannot be."""
    if accuracy != "by_type" or not sample.problem_type:
        return ()
    from megatron_ral.rewards.rules import has_rule, is_rouge_blind

    if not has_rule(sample.problem_type):
        return (f"problem_type '{sample.problem_type}': has no rule, so the answer is matched exactly",)
    if is_rouge_blind(sample.solution, sample.problem_type):
        return (
            f"problem_type '{sample.problem_type}': the solution has no letter a-z and no digit, which is all that "
            "ROUGE reads, so that every answer gets 0",
        )
    return ()


def unused_rules(problem_types: Iterable[str], accuracy: str) -> list[str]:
    """Return the problem types whose rules are not used because `accuracy` (reward.accuracy) is `exact`.

    With `exact`, answers are matched as text although these problem types have scoring rules of their own.
    """
    if accuracy == "by_type":
        return []
    from megatron_ral.rewards.rules import RULES, exact, has_rule, rule_name

    return sorted({name for name in problem_types if has_rule(name) and RULES.get(rule_name(name)) is not exact})


class ScoringIssue(NamedTuple):
    """Reason why a response could not be scored as it should be."""

    kind: str
    """`unparsed`, or the name of the reward or problem type at fault."""
    line: str
    """Line for the log: sample, reason and end of the response."""


def scoring_issues(score: Score, prompts: Sequence[Prompt], unparsed: bool = True) -> Iterator[ScoringIssue]:
    """Yield the issues of a score.

    Args:
        score: Score of a batch.
        prompts: Prompts of the same batch.
        unparsed: Whether responses without an answer are reported too.
    """
    for prompt, texts, group in zip(prompts, score.texts, score.problems):
        for text, reasons in zip(texts, group):
            for reason in reasons:
                kind = reason.partition(":")[0]
                if unparsed or kind != UNPARSED:
                    yield ScoringIssue(kind, f"sample '{prompt.sample.identity}': {reason}: {text[-SHOWN_TEXT:]!r}")


class ScoringIssueLog:
    """Log of the first few issues of each kind.

    Args:
        limit: Largest number of issues of each kind.
        max_kinds: Largest number of kinds, so that data with a problem type for every sample cannot fill the log.
    """

    def __init__(self, limit: int = 3, max_kinds: int = 20):
        self.limit, self.max_kinds, self._num_shown = limit, max_kinds, Counter()

    def select(self, issues: Iterable[ScoringIssue]) -> list[ScoringIssue]:
        """Return the issues that are still to be shown, and count them as shown."""
        selected = []
        for issue in issues:
            is_known = issue.kind in self._num_shown or len(self._num_shown) < self.max_kinds
            if is_known and self._num_shown[issue.kind] < self.limit:
                self._num_shown[issue.kind] += 1
                selected.append(issue)
        return selected

    def write(self, issues: Iterable[ScoringIssue], prefix: str = "") -> None:
        """Log the issues that are still to be shown as warnings, each after `prefix`."""
        for issue in self.select(issues):
            logger.warning("%s%s", prefix, issue.line)
