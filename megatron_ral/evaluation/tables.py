"""Results of an evaluation prompt by prompt: gathered over ranks, tabled by category, written as JSON lines.

The category of a sample is its field `category` (a task of MuirBench or MVBench, a question kind of V*, the human and
augmented halves of ChartQA), else its `problem_type`. Some samples name a `question_group` (MME asks two questions
about a picture). For them the table also has the share of question groups in which every question is answered
correctly. This share is MME's accuracy+; the MME score of a category is 100 times the sum of accuracy and accuracy+.
"""

import json
import math
import statistics
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Optional, Sequence

from megatron_ral.parallel.collectives import gather_objects
from megatron_ral.parallel.process_groups import ProcessGroups
from megatron_ral.types import Prompt, ResponseBatch, Sample, Score

UNCATEGORISED = "(none)"
"""Category of samples that name neither a category nor a problem type."""


@dataclass(frozen=True)
class ScoredResponse:
    """One response and its reward."""

    text: str
    finished: bool
    """True if the response ended by itself rather than at the length limit."""
    reward: float
    parts: Mapping[str, float]
    """Parts of the reward by name before weighting: accuracy, format, unparsed, ..."""


@dataclass(frozen=True)
class PromptResult:
    """One prompt with its responses."""

    sample: Sample
    """Sample without its pictures and videos."""
    prompt_tokens: int
    """Number of prompt tokens, visual tokens included."""
    visual_tokens: int
    greedy: ScoredResponse
    sampled: tuple[ScoredResponse, ...] = ()

    @property
    def category(self) -> str:
        """Row of the table that this prompt counts in."""
        return self.sample.category or self.sample.problem_type or UNCATEGORISED

    def record(self) -> dict[str, Any]:
        """Return the JSON object of this prompt."""
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
    """A mean and its standard error (None for a single value)."""

    mean: float
    error: Optional[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        """Return the mean of n >= 1 values and its error s / sqrt(n), with s^2 = sum (v - mean)^2 / (n - 1)."""
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error)

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.error is None else f" +- {self.error:.3f}")

    def record(self, name: str) -> dict[str, Optional[float]]:
        """Return the JSON fields of this figure: the mean under `name`, its standard error under `<name>_error`."""
        return {name: self.mean, f"{name}_error": self.error}


@dataclass(frozen=True)
class SampledFigures:
    """Figures of sampled responses, over prompts."""

    accuracy: Figure
    """Mean accuracy of a prompt's sampled responses."""
    best_of_n: Figure
    """Best accuracy of a prompt's sampled responses: pass@n where accuracy is 0 or 1."""

    @classmethod
    def of(cls, results: Sequence[PromptResult]) -> Optional["SampledFigures"]:
        """Return the figures of the prompts that have sampled responses, None where no prompt has."""
        accuracies = [[response.parts["accuracy"] for response in result.sampled] for result in results]
        accuracies = [values for values in accuracies if values]
        if not accuracies:
            return None
        return cls(
            Figure.of([statistics.fmean(values) for values in accuracies]),
            Figure.of([max(values) for values in accuracies]),
        )


@dataclass(frozen=True)
class QuestionGroupFigures:
    """Figures of question groups: questions that are asked about the same picture."""

    num_groups: int
    all_right: Figure
    """Share of question groups in which every question is answered correctly."""

    @classmethod
    def of(cls, results: Sequence[PromptResult]) -> Optional["QuestionGroupFigures"]:
        """Return the figures of the question groups among the results, None where there is no question group."""
        all_right: dict[str, bool] = {}
        for result in results:
            if name := result.sample.question_group:
                all_right[name] = all_right.get(name, True) and result.greedy.parts["accuracy"] >= 1.0
        return cls(len(all_right), Figure.of([float(right) for right in all_right.values()])) if all_right else None


@dataclass(frozen=True)
class CategoryRow:
    """Figures of one category."""

    num_prompts: int
    accuracy: Figure
    """Accuracy of the greedy responses, over prompts."""
    format_rate: float
    """Share of greedy responses in the required format."""
    unparsed_rate: float
    """Share of greedy responses without exactly one answer tag."""
    sampled: Optional[SampledFigures] = None
    """Figures of sampled responses, where there are any."""
    question_groups: Optional[QuestionGroupFigures] = None
    """Figures of question groups, where there are any."""

    @classmethod
    def of(cls, results: Sequence[PromptResult]) -> "CategoryRow":
        """Return the figures of at least one result."""
        return cls(
            num_prompts=len(results),
            accuracy=Figure.of([result.greedy.parts["accuracy"] for result in results]),
            format_rate=statistics.fmean(result.greedy.parts["format"] for result in results),
            unparsed_rate=statistics.fmean(result.greedy.parts["unparsed"] for result in results),
            sampled=SampledFigures.of(results),
            question_groups=QuestionGroupFigures.of(results),
        )

    def record(self) -> dict[str, Any]:
        """Return the JSON object of this row, without the figures that it does not have."""
        record = {
            "num_prompts": self.num_prompts,
            **self.accuracy.record("accuracy"),
            "format_rate": self.format_rate,
            "unparsed_rate": self.unparsed_rate,
        }
        if self.sampled is not None:
            record |= self.sampled.accuracy.record("sampled_accuracy") | self.sampled.best_of_n.record("best_of_n")
        if self.question_groups is not None:
            record |= {"num_groups": self.question_groups.num_groups}
            record |= self.question_groups.all_right.record("all_right")
        return record


@dataclass(frozen=True)
class BenchmarkTable:
    """Figures of all prompts and of each category."""

    overall: CategoryRow
    categories: Mapping[str, CategoryRow] = field(default_factory=dict)
    """Figures by category, in alphabetical order."""

    @classmethod
    def of(cls, results: Sequence[PromptResult]) -> "BenchmarkTable":
        """Return the table of at least one result."""
        names = sorted({result.category for result in results})
        return cls(
            CategoryRow.of(results),
            {name: CategoryRow.of([result for result in results if result.category == name]) for name in names},
        )

    @property
    def mean_of_categories(self) -> Figure:
        """Mean of the categories' greedy accuracies, each category weighted alike: error = sqrt(sum error_c^2) / C."""
        figures = [row.accuracy for row in self.categories.values()]
        errors = [figure.error for figure in figures if figure.error is not None]
        known = len(errors) == len(figures)
        error = math.sqrt(sum(value**2 for value in errors)) / len(figures) if known else None
        return Figure(statistics.fmean(figure.mean for figure in figures), error)

    def record(self) -> dict[str, Any]:
        """Return the fields of the evaluation's JSON object that come from this table."""
        return {
            "overall": self.overall.record(),
            **self.mean_of_categories.record("mean_of_categories"),
            "categories": {name: row.record() for name, row in self.categories.items()},
        }

    def __str__(self) -> str:
        """Return one line per category, then all prompts and, with several categories, their mean."""
        has_samples, has_groups = self.overall.sampled is not None, self.overall.question_groups is not None
        heads = ["n", "accuracy", "format", "unparsed"]
        heads += ["sampled", "best of n"] * has_samples + ["groups", "all right"] * has_groups
        lines = [
            (name, _cells(row, has_samples, has_groups))
            for name, row in {**self.categories, "all prompts": self.overall}.items()
        ]
        if len(self.categories) > 1:
            lines.append(("mean of categories", ["", str(self.mean_of_categories)]))
        first = max(len(name) for name, _ in lines)
        widths = [
            max(len(cells[index]) for cells in [heads, *(cells for _, cells in lines)] if index < len(cells)) + 2
            for index in range(len(heads))
        ]
        return "\n".join(
            name.ljust(first) + "".join(cell.rjust(width) for cell, width in zip(cells, widths))
            for name, cells in [("", heads), *lines]
        )


def _cells(row: CategoryRow, has_samples: bool, has_groups: bool) -> list[str]:
    """Return the cells of a table's line."""
    cells = [str(row.num_prompts), str(row.accuracy), f"{row.format_rate:.3f}", f"{row.unparsed_rate:.3f}"]
    if has_samples:
        cells += [str(row.sampled.accuracy), str(row.sampled.best_of_n)] if row.sampled is not None else ["-"] * 2
    if has_groups:
        groups = row.question_groups
        cells += [str(groups.num_groups), str(groups.all_right)] if groups is not None else ["0", "-"]
    return cells


def scored_responses(responses: ResponseBatch, score: Score) -> Iterator[tuple[Prompt, tuple[ScoredResponse, ...]]]:
    """Yield each prompt of a batch with its responses."""
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


class ResultCollector:
    """Results of this rank's prompts: the greedy responses to all of them, then sampled ones in the same order."""

    def __init__(self) -> None:
        self._results: list[PromptResult] = []
        self._num_sampled = 0

    def add_greedy(self, responses: ResponseBatch, score: Score) -> None:
        """Add a batch of greedy responses, one per prompt, without the pictures of their samples."""
        for prompt, [response] in scored_responses(responses, score):
            self._results.append(
                PromptResult(
                    replace(prompt.sample, images=(), videos=()),
                    len(prompt.input_ids),
                    int(prompt.visual_mask.sum()),
                    response,
                )
            )

    def add_sampled(self, responses: ResponseBatch, score: Score) -> None:
        """Add a batch of sampled responses to the results of the same prompts."""
        for prompt, sampled in scored_responses(responses, score):
            result = self._results[self._num_sampled]
            assert result.sample.identity == prompt.sample.identity
            self._results[self._num_sampled] = replace(result, sampled=sampled)
            self._num_sampled += 1

    def gather(self, process_groups: ProcessGroups) -> list[PromptResult]:
        """Return the results of all ranks on every rank, sorted by shard and key whatever the layout."""
        everything = [result for rank in gather_objects(self._results, process_groups.data) for result in rank]
        return sorted(everything, key=lambda result: (result.sample.shard, result.sample.key))


def write_completions(path: Path, results: Sequence[PromptResult]) -> None:
    """Write one JSON object per line and prompt; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as stream:
        for result in results:
            stream.write(json.dumps(result.record(), ensure_ascii=False) + "\n")
