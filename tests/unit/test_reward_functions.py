"""Reward functions by import path, and scoring of decoded responses: counts, log lines, and errors of a function."""

import json
import logging
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from megatron_ral.config import dump_config, load_config
from megatron_ral.config.sections import RewardConfig, RewardFunctionConfig
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.errors import ConfigError, show_value
from megatron_ral.rewards.functions import load_function
from megatron_ral.rewards.score import reward_parts, score_response
from megatron_ral.rollout.scoring import ScoringIssue, ScoringIssueLog, score_responses, scoring_issues
from megatron_ral.types import ResponseBatch, Sample, pad_prompts
from tests.unit import user_rewards

HERE = user_rewards.__name__
GOOD = "<think>red</think><answer>7</answer>"


def settings(**paths_and_weights) -> RewardConfig:
    return RewardConfig(
        functions={
            name: RewardFunctionConfig(path=f"{HERE}:{path}", weight=weight)
            for name, (path, weight) in paths_and_weights.items()
        }
    )


# --- refused before training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, said",
    [
        ("brevity", "package.module:function"),
        (f"{HERE}.brevity", "package.module:function"),
        ("", "package.module:function"),
        (f"{HERE}:", "package.module:function"),
        (":brevity", "package.module:function"),
        ("../mine:brevity", "package.module:function"),
        ("no_such_module_here:f", "No module named 'no_such_module_here'"),
        (f"{HERE}.more:f", "ModuleNotFoundError"),
        (f"{HERE}:brevty", "has no 'brevty'"),
        (f"{HERE}:GOOD", "is a str"),
        (f"{HERE}:Judge", "is a class"),
        (f"{HERE}:two_arguments", "(completion, solution)"),
        (f"{HERE}:needs_keyword", "model"),
        (f"{HERE}:asynchronous", "coroutine"),
        (f"{HERE}:generator", "generator"),
        ("math:log", "signature"),
        (f"{HERE}:Judge.method", "cannot be called as"),
    ],
)
def test_path_that_cannot_be_used_is_named(path, said):
    with pytest.raises(ConfigError) as error:
        load_function("reward.functions.mine.path", path)
    sentence = str(error.value)
    assert (
        sentence.startswith(f"reward.functions.mine.path = {show_value(path)} ")
        and said in sentence
        and "\n" not in sentence
    )


@pytest.mark.parametrize(
    "code, said",
    [
        ("raise RuntimeError('no\\nkey')", "RuntimeError: no key"),
        ("import sys; sys.exit(3)", "SystemExit"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_module_that_fails_is_named(code, said, tmp_path, monkeypatch):
    name = f"broken_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=f"key = '{name}:f' cannot be imported .*{said}"):
        load_function("key", f"{name}:f")


@pytest.mark.parametrize("name", ["accuracy", "format", "unparsed", "error"])
def test_names_of_the_project_are_taken(name):
    with pytest.raises(ConfigError, match=f"reward.functions.{name}: the name '{name}' is taken"):
        reward_parts(settings(**{name: ("brevity", 1.0)}))


@pytest.mark.parametrize("name", ["", "a/b", "two words", "2nd", "x-y"])
def test_names_that_make_no_tag_are_refused(name):
    with pytest.raises(ConfigError, match=f"reward.functions: the name '{name}' must be letters"):
        reward_parts(settings(**{name: ("brevity", 1.0)}))


def test_configuration_names_key_and_value(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {path: somewhere}\ndata: {train: [{shards: a}]}\n"
        f"reward: {{accuracy: by_type, functions: {{mine: {{path: '{HERE}:brevity', weight: 2}}}}}}\n"
    )
    config = load_config(path, ["reward.functions.mine.weight=-0.5"])
    assert config.reward.functions == {"mine": RewardFunctionConfig(f"{HERE}:brevity", -0.5)}
    assert config.reward.accuracy == "by_type" and RewardConfig().accuracy == "exact" and not RewardConfig().functions
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config
    for override, named in [
        ("reward.accuracy=by_types", ["reward.accuracy", "by_types", "'by_type'"]),
        ("reward.functions.mine.weight=much", ["reward.functions.mine.weight", "much"]),
        ("reward.functions.mine.weight=.nan", ["reward.functions.mine.weight"]),
        ("reward.functions.mine.wait=1", ["reward.functions.mine.wait"]),
        ("reward.functions.other.weight=1", ["reward.functions.other.path"]),
        ("reward.functions.mine=x", ["reward.functions.mine", "x"]),
    ]:
        with pytest.raises(ConfigError) as error:
            load_config(path, [override])
        assert all(part in str(error.value) for part in named), str(error.value)


def test_entry_points_refuse_before_anything_is_built(tmp_path):
    from megatron_ral.commands.common import read_config

    path = tmp_path / "run.yaml"
    path.write_text("model: {path: somewhere}\ndata: {train: [{shards: a}]}\n")
    overrides = [f"reward.functions.mine={json.dumps({'path': f'{HERE}:brevity', 'weight': 1.0})}"]
    assert read_config(SimpleNamespace(config=path, overrides=overrides)).reward.functions["mine"].weight == 1.0
    with pytest.raises(ConfigError, match=r"reward.functions.mine.path = 'nowhere:f' cannot be imported"):
        read_config(SimpleNamespace(config=path, overrides=[*overrides, "reward.functions.mine.path=nowhere:f"]))


# --- what functions give ----------------------------------------------------------------------------------------------


def test_own_functions_are_called_and_weighed():
    parts = reward_parts(
        settings(
            brevity=("brevity", -0.001),
            judge=("judge", 2.0),
            method=("judge.method", 0.0),
            defaults=("with_defaults", 1.0),
            tensor=("TENSOR", 4.0),
        )
    )
    score = score_response(GOOD, "<answer>7</answer>", "numerical", parts)
    value = len(GOOD) + 100 * 18 + 10000 * 9
    assert score.components == {
        "unparsed": 0,
        "error": 0,
        "accuracy": 1,
        "format": 1,
        "brevity": value,
        "judge": 0.25,
        "method": 0.5,
        "defaults": 1,
        "tensor": 0.75,
    }
    assert score.reward == pytest.approx(0.9 + 0.1 - 0.001 * value + 0.5 + 1 + 3) and not score.problems


def test_a_function_that_reads_the_question_gets_it():
    parts = reward_parts(settings(mine=("reads_question", 1.0)))
    for problem, value in (("Which digit is red", 1.0), ("Which digit is blue", 0.0)):
        score = score_response(GOOD, "<answer>7</answer>", "numerical", parts, problem=problem)
        assert score.components["mine"] == value and not score.problems


@pytest.mark.parametrize(
    "path",
    [
        "third_is_named_problem",
        "first_is_named_problem",
        "decorated",
        "decorated_twice",
        "bound",
        "bound_first",
    ],
)
def test_a_function_that_cannot_take_the_question_is_called_without_it(path):
    parts = reward_parts(settings(mine=(path, 1.0)))
    score = score_response(GOOD, "<answer>7</answer>", "numerical", parts, problem="Which digit is red")
    assert score.components["mine"] == 1.0 and not score.problems


def test_a_decorated_function_that_takes_the_question_gets_it():
    paths = {"with_default": 0.0, "transparent": 0.0, "cached": 1.0}
    parts = reward_parts(settings(**{path: (path, 1.0) for path in paths}))
    score = score_response(GOOD, "<answer>7</answer>", "numerical", parts, problem="Which digit is red")
    assert {path: score.components[path] for path in paths} == paths and not score.problems


@pytest.mark.parametrize(
    "path, said",
    [
        ("NAN", "returned nan"),
        ("INFINITE", "returned -inf"),
        ("HUGE", "returned 1e+300"),
        ("NOTHING", "TypeError"),
        ("TEXT", "ValueError"),
        ("exits", "SystemExit: no judge"),
    ],
)
def test_what_is_no_finite_number_is_an_error_and_counts_nothing(path, said):
    score = score_response(GOOD, "7", "", reward_parts(settings(mine=(path, 5.0))))
    assert score.reward == pytest.approx(1.0) and score.components["mine"] == 0.0 and score.components["error"] == 1.0
    [problem] = score.problems
    assert problem.startswith("reward 'mine': ") and said in problem


def test_a_weight_that_overflows_float32_is_an_error():
    score = score_response(GOOD, "7", "", reward_parts(settings(mine=("judge", 1e31))))
    assert score.reward == pytest.approx(1.0) and "with weight 1e+31" in score.problems[0]
    assert score_response(GOOD, "7", "", reward_parts(settings(mine=("judge", -1e29)))).reward == pytest.approx(-2.5e28)


# --- on a real tokenizer ----------------------------------------------------------------------------------------------

TEXTS = [
    [GOOD, "<think>red</think><answer>8</answer>", "<answer>7</answer><answer>8</answer>", "7"],
    ["<think>x</think><answer>(b) red</answer>", "<think>8</think>", GOOD, "<think>x</think><answer>B</answer>"],
]


@pytest.fixture(scope="module")
def processor(material):
    return PromptProcessor(str(material["tiny"]), 128)


def batch(processor, types=("numerical", "multiple choice"), solutions=("<answer>7.0</answer>", "<answer>B</answer>")):
    prompts = [
        processor(
            Sample(
                key=f"key {index}",
                shard="a/shard.tar",
                problem="?",
                solution=solution,
                process="",
                problem_type=kind,
                images=(),
                target_boxes=(),
            )
        )
        for index, (kind, solution) in enumerate(zip(types, solutions))
    ]
    ids = [[processor.tokenizer(text)["input_ids"] + [processor.end_token_id] for text in group] for group in TEXTS]
    lengths = torch.tensor([[len(row) for row in group] for group in ids])
    padded = torch.full((2, 4, int(lengths.max()) + 3), processor.tokenizer("9")["input_ids"][0])
    for b, group in enumerate(ids):
        for g, row in enumerate(group):
            padded[b, g, : len(row)] = torch.tensor(row)
    return ResponseBatch(
        pad_prompts(prompts, processor.pad_token_id),
        padded,
        lengths,
        torch.zeros(padded.shape),
        torch.ones(2, 4, dtype=torch.bool),
    )


def test_unparsed_and_errors_are_counted_apart_from_wrong(processor):
    reward = settings(judge=("fails_on_8", 2.0))
    responses = batch(processor)
    score = score_responses(responses, processor, reward)
    assert [list(group) for group in score.texts] == TEXTS
    assert score.components["accuracy"].tolist() == [[0, 0, 0, 0], [0, 0, 0, 1]]
    assert score.components["unparsed"].tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]
    assert score.components["error"].tolist() == [[0, 1, 1, 0], [0, 1, 0, 0]]
    assert score.components["judge"].tolist() == [[0.5, 0, 0, 0.5], [0.5, 0, 0.5, 0.5]]
    wanted = 0.9 * score.components["accuracy"] + 0.1 * score.components["format"] + 2 * score.components["judge"]
    assert torch.allclose(score.rewards, wanted) and score.rewards.dtype == torch.float32
    asked = score_responses(responses, processor, settings(question=("reads_question", 1.0)))  # "?" is in no response
    assert not asked.components["question"].any() and not asked.components["error"].any()
    by_type = score_responses(responses, processor, RewardConfig(accuracy="by_type"))
    assert by_type.components["accuracy"].tolist() == [[1, 0, 0, 0], [1, 0, 0, 1]]
    assert not by_type.components["error"].any()


def test_log_shows_the_first_of_each_kind_with_sample_and_text(processor, caplog):
    responses = batch(processor, types=("numerical", "multiple choise"))
    reward = RewardConfig(accuracy="by_type", functions=settings(judge=("fails_on_8", 2.0)).functions)
    score = score_responses(responses, processor, reward)
    found = list(scoring_issues(score, responses.prompts.prompts))
    assert Counter(problem.kind for problem in found) == {
        "problem_type 'multiple choise'": 4,
        "reward 'judge'": 3,
        "unparsed": 3,
    }
    log = ScoringIssueLog(limit=2)
    with caplog.at_level(logging.WARNING):
        log.write(found, "step 3: ")
        log.write(found, "step 4: ")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 6 and all(line.startswith("step 3: sample 'shard.tar/key ") for line in lines)
    assert sum("key 0" in line and "unparsed" in line and repr(TEXTS[0][2]) in line for line in lines) == 1
    failed = "reward 'judge': RuntimeError: the judge is out: "
    assert sum("key 0" in line and failed + repr(TEXTS[0][1]) in line for line in lines) == 1
    assert sum("key 1" in line and "problem_type 'multiple choise': has no rule" in line for line in lines) == 2
    assert {problem.kind for problem in scoring_issues(score, responses.prompts.prompts, unparsed=False)} == {
        "problem_type 'multiple choise'",
        "reward 'judge'",
    }


def test_a_reference_that_rouge_cannot_read_is_told(processor):
    responses = batch(processor, types=("free-form", "exact"), solutions=("红", "红"))
    score = score_responses(responses, processor, RewardConfig(accuracy="by_type"))
    kinds = [issue.kind for issue in scoring_issues(score, responses.prompts.prompts, unparsed=False)]
    assert kinds == ["problem_type 'free-form'"] * 4


def test_a_step_shows_what_any_rank_found(processor, monkeypatch, caplog):
    """Two data-parallel ranks that found the same; each tells the first few, and the main rank writes the first few."""
    from megatron_ral.training import trainer

    responses = batch(processor)
    score = score_responses(responses, processor, settings(judge=("fails_on_8", 2.0)))
    scored = SimpleNamespace(score=score, groups=SimpleNamespace(prompts=responses.prompts))
    told = []
    monkeypatch.setattr(trainer, "gather_objects", lambda value, group: told.append(value) or [value, value])
    for is_main, lines in ((False, 0), (True, 6)):
        run = SimpleNamespace(process_groups=SimpleNamespace(data=None), is_main=is_main, problems=ScoringIssueLog())
        with caplog.at_level(logging.WARNING):
            trainer.Trainer._show_problems(run, SimpleNamespace(rollout=[scored]), 4)
            trainer.Trainer._show_problems(run, SimpleNamespace(rollout=[]), 5)
        assert len(caplog.records) == lines and all("step 5: sample" in each.getMessage() for each in caplog.records)
    assert [len(value) for value in told] == [6, 6]


def test_log_shows_no_more_kinds_than_it_should(caplog):
    log = ScoringIssueLog(limit=1, max_kinds=3)
    with caplog.at_level(logging.WARNING):
        log.write(ScoringIssue(f"problem_type '{number % 7}'", str(number)) for number in range(50))
    assert [record.getMessage() for record in caplog.records] == ["0", "1", "2"]


def test_ten_answers_are_scored_by_consensus_and_taught_as_one(processor):
    ten = "".join(f"<answer>{answer}</answer>" for answer in ["7"] * 2 + ["8"] * 5 + ["B", "b.", "x"])
    responses = batch(processor, types=("vizwiz", "VizWiz"), solutions=(ten, ten))
    score = score_responses(responses, processor, RewardConfig(accuracy="by_type"))
    assert score.components["accuracy"].flatten().tolist() == pytest.approx([0.6, 1, 0, 0, 0, 0, 0.6, 0.6])
    for prompt in responses.prompts.prompts:
        assert processor.decode(prompt.response_ids) == "<answer>8</answer>"
