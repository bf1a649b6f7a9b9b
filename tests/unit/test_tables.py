"""Tables of an evaluation: hand figures, standard errors, groups of questions, what is written."""

import json
import math

import numpy as np
import pytest

from megatron_ral.evaluation.tables import (
    BenchmarkTable,
    CategoryRow,
    Figure,
    PromptResult,
    ScoredResponse,
    write_completions,
)
from megatron_ral.types import Sample


def response(accuracy: float, text: str = "<answer>1</answer>") -> ScoredResponse:
    return ScoredResponse(text, True, 0.9 * accuracy + 0.1, {"accuracy": accuracy, "format": 1.0, "unparsed": 0.0})


def result(key: str, accuracy: float, sampled=(), category="", problem_type="", group="") -> PromptResult:
    sample = Sample(
        key,
        "folder/a.tar",
        f"Which digit is {key}?",
        "<answer>1</answer>",
        "",
        problem_type,
        (),
        (),
        category=category,
        question_group=group,
    )
    return PromptResult(sample, 30, 16, response(accuracy), tuple(response(value) for value in sampled))


def test_figure_is_the_mean_and_its_standard_error():
    assert Figure.of([1, 0, 0, 1]) == (0.5, pytest.approx(math.sqrt(1 / 3) / 2))
    assert Figure.of([0.25]) == (0.25, None) and str(Figure.of([0.25])) == "0.250"
    assert str(Figure.of([1, 0, 0, 1])) == "0.500 +- 0.289"
    # what it is for: the spread of means of many draws of 50
    draws = np.random.default_rng(0).random((4000, 50)) < 0.3
    assert np.mean([Figure.of(row).error for row in draws.astype(float).tolist()]) == pytest.approx(
        draws.mean(axis=1).std(), rel=0.03
    )


def test_rows_of_a_category():
    row = CategoryRow.of([result("a", 1, (1, 1, 0, 0)), result("b", 0, (0, 0, 0, 1)), result("c", 0, (0, 0, 0, 0))])
    assert row.accuracy == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert row.sampled.accuracy.mean == pytest.approx((0.5 + 0.25 + 0) / 3)
    assert row.sampled.accuracy.error == pytest.approx(0.25 / math.sqrt(3)), "between prompts, not between samples"
    assert row.sampled.best_of_n.mean == pytest.approx(2 / 3)
    assert row.question_groups is None
    graded = CategoryRow.of([result("a", 0.4, (0.2, 0.6))])
    assert graded.sampled.best_of_n == (0.6, None) and graded.accuracy == (0.4, None)
    assert CategoryRow.of([result("a", 1)]).sampled is None


def test_question_groups_are_right_where_every_question_is():
    """MME: two questions of a picture."""
    rows = [
        result("a", 1, group="1"),
        result("b", 1, group="1"),
        result("c", 1, group="2"),
        result("d", 0, group="2"),
        result("e", 0, group="3"),
        result("f", 1, group="3"),
    ]
    row = CategoryRow.of(rows)
    assert row.accuracy.mean == pytest.approx(4 / 6)
    assert row.question_groups.num_groups == 3 and row.question_groups.all_right.mean == pytest.approx(1 / 3)
    assert row.record()["all_right"] == pytest.approx(1 / 3)
    assert "all_right" not in CategoryRow.of([result("a", 1)]).record()


def test_categories_and_their_mean():
    rows = [
        result("a", 1, category="colour"),
        result("b", 0, category="colour"),
        *(result(f"c{index}", 1, problem_type="numerical") for index in range(3)),
        result("d", 0),
    ]
    table = BenchmarkTable.of(rows)
    assert list(table.categories) == ["(none)", "colour", "numerical"]
    assert [row.num_prompts for row in table.categories.values()] == [1, 2, 3]
    assert table.overall.accuracy.mean == pytest.approx(4 / 6)
    assert table.mean_of_categories == (pytest.approx((0 + 0.5 + 1) / 3), None), "one category of a single prompt"
    two = BenchmarkTable.of(rows[:-1])
    assert two.mean_of_categories == (0.75, pytest.approx(math.sqrt(0.5**2 + 0**2) / 2))
    record = json.loads(json.dumps(two.record(), allow_nan=False))
    assert record["categories"]["colour"] == {
        "num_prompts": 2,
        "accuracy": 0.5,
        "accuracy_error": 0.5,
        "format_rate": 1.0,
        "unparsed_rate": 0.0,
    }
    assert record["overall"]["accuracy"] == 0.8 and record["mean_of_categories"] == 0.75


def test_table_as_text():
    rows = [
        result("a", 1, (1, 0), category="scene 1"),
        result("b", 0, (0, 0), category="scene 2"),
        result("c", 1, (1, 1), category="scene 2", group="g"),
    ]
    lines = str(BenchmarkTable.of(rows)).splitlines()
    assert lines[0].split() == [
        "n",
        "accuracy",
        "format",
        "unparsed",
        "sampled",
        "best",
        "of",
        "n",
        "groups",
        "all",
        "right",
    ]
    assert lines[1].split() == ["scene", "1", "1", "1.000", "1.000", "0.000", "0.500", "1.000", "0", "-"]
    assert lines[2].split() == [
        "scene",
        "2",
        "2",
        "0.500",
        "+-",
        "0.500",
        "1.000",
        "0.000",
        "0.500",
        "+-",
        "0.500",
        "0.500",
        "+-",
        "0.500",
        "1",
        "1.000",
    ]
    assert lines[3].startswith("all prompts") and lines[4].split() == ["mean", "of", "categories", "0.750"]
    assert len({len(line) for line in lines[:4]}) == 1, "columns stand under one another"
    assert len(str(BenchmarkTable.of(rows[:1])).splitlines()) == 3


def test_completions_are_one_object_per_line(tmp_path):
    odd = PromptResult(
        Sample("k", "x/b.tar", "zwei\nZeilen \u2028 \u00fc?", "1", "", "OCR", (), ()), 5, 0, response(0, 'a\n"b"')
    )
    write_completions(tmp_path / "new" / "c.jsonl", [result("a", 1, (1, 0), group="7"), odd])
    text = (tmp_path / "new" / "c.jsonl").read_text(encoding="utf-8")
    first, second = (json.loads(line) for line in text.strip("\n").split("\n"))
    assert first["key"] == "a" and first["shard"] == "a.tar" and first["problem"] == "Which digit is a?"
    assert first["question_group"] == "7" and [sample["parts"]["accuracy"] for sample in first["sampled"]] == [1, 0]
    assert first["greedy"] == {
        "text": "<answer>1</answer>",
        "finished": True,
        "reward": 1.0,
        "parts": {"accuracy": 1, "format": 1.0, "unparsed": 0.0},
    }
    assert second["problem"] == "zwei\nZeilen \u2028 \u00fc?" and second["greedy"]["text"] == 'a\n"b"'
    assert second["category"] == "OCR" and second["sampled"] == [] and "question_group" not in second
