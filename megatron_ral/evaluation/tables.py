"""An evaluation prompt by prompt: kept, gathered over ranks, tabled by category, written as JSON lines.

A category is a sample's field `category` (a task of MuirBench or MVBench, a question kind of V*, the human and augmented
halves of ChartQA), else its `problem_type`. Where samples name a `question_group` (MME asks two questions of a picture),
the share of groups in which every question is right is tabled too (MME: accuracy+; a category's MME score is 100 times
the sum of both).
"""

import json
import math
import statistics
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Optional, Sequence

from megatron_ral.config import RunConfig
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine.pipelined_decoder import SamplingSettings, sample_responses
from megatron_ral.engine.stage import StageEngine
from megatron_ral.parallel.collectives import gather_objects
from megatron_ral.parallel.process_groups import ProcessGroups
from megatron_ral.rollout.scoring import score_responses
from megatron_ral.types import Prompt, ResponseBatch, Sample, Score

UNCATEGORISED = "(none)"


@dataclass(frozen=True)
class ScoredResponse:
    """One response with what the reward made of it."""

    text: str
    finished: bool
    """Ended by itself rather than at the length limit."""
    reward: float
    parts: Mapping[str, float]
    """Parts of the reward before weighting: accuracy, format, unparsed, ..."""


@dataclass(frozen=True)
class PromptResult:
    """One prompt with its responses."""

    sample: Sample
    prompt_tokens: int
    visual_tokens: int
    greedy: ScoredResponse
    sampled: tuple[ScoredResponse, ...] = ()

    @property
    def category(self) -> str:
        return self.sample.category or self.sample.problem_type or UNCATEGORISED

    def record(self) -> dict[str, Any]:
        """What is written of it as JSON."""
        sample = self.sample
        record = {
            "key": sample.key,
            "shard": sample.identity.partition("/")[0],
            "category": self.category,
            "problem": sample.problem,
            "solution": sample.solution,
            "prompt_tokens": self.prompt_tokens,
            "visual_tokens": self.visual_tokens,
            "greedy": asdict(self.greedy),
            "sampled": [asdict(response) for response in self.sampled],
        }
        return record | ({"question_group": sample.question_group} if sample.question_group else {})


class Figure(NamedTuple):
    """A mean and its standard error (None from a single value)."""

    mean: float
    error: Optional[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        """s = sqrt(sum (v - mean)^2 / (n - 1)), error = s / sqrt(n)."""
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error)

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.error is None else f" +- {self.error:.3f}")


@dataclass(frozen=True)
class CategoryRow:
    """Figures of one category."""

    num_prompts: int
    accuracy: Figure
    """Greedy, over prompts."""
    format_rate: float
    unparsed_rate: float
    sampled_accuracy: Optional[Figure] = None
    """Over prompts, of the mean of a prompt's sampled responses."""
    best_of_n: Optional[Figure] = None
    """Over prompts, of the best of a prompt's sampled responses: pass@n where accuracy is 0 or 1."""
    num_groups: int = 0
    all_right: Optional[Figure] = None
    """Over question groups, whether every question of the group is right."""

    @classmethod
    def of(cls, results: Sequence[PromptResult]) -> "CategoryRow":
        """Figures of at least one result."""
        sampled = [[response.parts["accuracy"] for response in result.sampled] for result in results if result.sampled]
        groups: dict[str, bool] = {}
        for result in results:
            if name := result.sample.question_group:
                groups[name] = groups.get(name, True) and result.greedy.parts["accuracy"] >= 1.0
        return cls(
            num_prompts=len(results),
            accuracy=Figure.of([result.greedy.parts["accuracy"] for result in results]),
            format_rate=statistics.fmean(result.greedy.parts["format"] for result in results),
            unparsed_rate=statistics.fmean(result.greedy.parts["unparsed"] for result in results),
            sampled_accuracy=Figure.of([statistics.fmean(row) for row in sampled]) if sampled else None,
            best_of_n=Figure.of([max(row) for row in sampled]) if sampled else None,
            num_groups=len(groups),
            all_right=Figure.of([float(right) for right in groups.values()]) if groups else None,
        )

    def record(self) -> dict[str, Any]:
        """What is written of it as JSON: each figure under its name and, with _error, its standard error."""
        record: dict[str, Any] = {}
        for name in (
            "num_prompts",
            "accuracy",
            "format_rate",
            "unparsed_rate",
            "sampled_accuracy",
            "best_of_n",
            "num_groups",
            "all_right",
        ):
            value = getattr(self, name)
            if isinstance(value, Figure):
                record |= {name: value.mean, f"{name}_error": value.error}
            elif value is not None and not (name == "num_groups" and not value):
                record[name] = value
        return record


@dataclass(frozen=True)
class BenchmarkTable:
    """All figures of an evaluation."""

    overall: CategoryRow
    categories: Mapping[str, CategoryRow] = field(default_factory=dict)

    @classmethod
    def of(cls, results: Sequence[PromptResult]) -> "BenchmarkTable":
        """Table of at least one result, categories in alphabetical order."""
        names = sorted({result.category for result in results})
        return cls(
            CategoryRow.of(results),
            {name: CategoryRow.of([result for result in results if result.category == name]) for name in names},
        )

    @property
    def mean_of_categories(self) -> Figure:
        """Greedy accuracy with every category alike: error = sqrt(sum error_c^2) / C."""
        rows = [row.accuracy for row in self.categories.values()]
        errors = [row.error for row in rows]
        error = None if None in errors else math.sqrt(sum(value**2 for value in errors)) / len(rows)
        return Figure(statistics.fmean(row.mean for row in rows), error)

    def record(self) -> dict[str, Any]:
        """Parts of the evaluation's JSON that are by category."""
        mean = self.mean_of_categories
        return {
            "overall": self.overall.record(),
            "mean_of_categories": mean.mean,
            "mean_of_categories_error": mean.error,
            "categories": {name: row.record() for name, row in self.categories.items()},
        }

    def __str__(self) -> str:
        """One line per category, then all prompts and, with several categories, their mean."""
        lines, rows = [], {**self.categories, "all prompts": self.overall}
        sampled, grouped = self.overall.sampled_accuracy is not None, self.overall.all_right is not None
        heads = (
            ["n", "accuracy", "format", "unparsed"]
            + ["sampled", "best of n"] * sampled
            + ["groups", "all right"] * grouped
        )
        for name, row in rows.items():
            cells = [row.num_prompts, row.accuracy, f"{row.format_rate:.3f}", f"{row.unparsed_rate:.3f}"]
            cells += [row.sampled_accuracy, row.best_of_n] * sampled
            cells += [row.num_groups, "-" if row.all_right is None else row.all_right] * grouped
            lines.append((name, [str(cell) for cell in cells]))
        if len(self.categories) > 1:
            lines.append(("mean of categories", ["", str(self.mean_of_categories)]))
        first = max(len(name) for name, _ in lines)
        widths = [
            max(len(row[index]) for row in [heads, *(cells for _, cells in lines)] if index < len(row)) + 2
            for index in range(len(heads))
        ]
        return "\n".join(
            [
                " " * first + "".join(head.rjust(width) for head, width in zip(heads, widths)),
                *(
                    name.ljust(first) + "".join(cell.rjust(width) for cell, width in zip(cells, widths))
                    for name, cells in lines
                ),
            ]
        )


def scored(responses: ResponseBatch, score: Score) -> Iterator[tuple[Prompt, tuple[ScoredResponse, ...]]]:
    """Each prompt of a batch with its responses."""
    for b, prompt in enumerate(responses.prompts.prompts):
        yield (
            prompt,
            tuple(
                ScoredResponse(
                    text,
                    bool(responses.finished[b, g]),
                    float(score.rewards[b, g]),
                    {name: float(values[b, g]) for name, values in score.components.items()},
                )
                for g, text in enumerate(score.texts[b])
            ),
        )


class ResultKeeper:
    """Collects the results of this rank's prompts: the greedy responses to all of them, then the sampled ones in the same
    order."""

    def __init__(self) -> None:
        self._results: list[PromptResult] = []
        self._num_sampled = 0

    def greedy(self, responses: ResponseBatch, score: Score) -> None:
        """Keep a batch of greedy responses, one per prompt; of a sample not its pictures."""
        for prompt, [response] in scored(responses, score):
            self._results.append(
                PromptResult(
                    replace(prompt.sample, images=(), videos=()),
                    len(prompt.input_ids),
                    int(prompt.visual_mask.sum()),
                    response,
                )
            )

    def sampled(self, responses: ResponseBatch, score: Score) -> None:
        """Keep a batch of sampled responses."""
        for prompt, group in scored(responses, score):
            kept = self._results[self._num_sampled]
            assert kept.sample.identity == prompt.sample.identity
            self._results[self._num_sampled] = replace(kept, sampled=group)
            self._num_sampled += 1

    def gather(self, process_groups: ProcessGroups) -> list[PromptResult]:
        """Results of all ranks, on every rank, in the order of shard and key whatever the layout."""
        everything = [result for rank in gather_objects(self._results, process_groups.data) for result in rank]
        return sorted(everything, key=lambda result: (result.sample.shard, result.sample.key))


def sample_prompts(
    engine: StageEngine,
    prompts: Iterable[Prompt],
    processor: PromptProcessor,
    config: RunConfig,
    num_samples: int,
    keep: Callable[[ResponseBatch, Score], None],
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """`num_samples` responses to each of this rank's prompts at rollout.temperature and top_p, handed to `keep` batch by
    batch. The draw of a prompt depends on config.seed and its identity alone."""
    settings = SamplingSettings(
        num_samples,
        config.rollout.max_response_length,
        processor.end_token_id,
        processor.pad_token_id,
        config.rollout.temperature,
        config.rollout.top_p,
    )
    with engine.resident():
        for responses, _ in sample_responses(
            engine, prompts, settings, config.rollout.generation_batch_size, "evaluation", config.seed
        ):
            keep(responses, score_responses(responses, processor, config.reward, engine))
            progress(len(responses.prompts))


def write_completions(path: Path, results: Sequence[PromptResult]) -> None:
    """One JSON object per line and prompt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as stream:
        for result in results:
            stream.write(json.dumps(result.record(), ensure_ascii=False) + "\n")
