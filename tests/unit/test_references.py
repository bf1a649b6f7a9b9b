"""Solutions as data sets have them: read like a response, or rejected with the reason, by every tool."""

import json

import pytest

from megatron_ral.commands import shards
from megatron_ral.config.sections import RewardConfig
from megatron_ral.data.issues import SampleError
from megatron_ral.data.shards import parse_sample
from megatron_ral.rewards.answer import accuracy_reward, format_reward, reference_answers, taught_response
from megatron_ral.rewards.references import outside_options, reference_problem
from megatron_ral.rewards.score import reward_parts, score_response

WORKED = "Each box holds 6 eggs.\n6 * 7 = 42.\n#### 42"
BOXED = r"First, $6 \cdot 7 = 42$. So the answer is $\boxed{42}$."
CAPTION = "A red bus stands at the kerb. Two people wait, and one of them holds an umbrella."

# solution -> (answer that is right, text that supervised training learns)
READ = [
    ("<answer>42</answer>", "42", "<answer>42</answer>"),
    ("so <answer> 42 </answer>", "42", "<think>so</think><answer> 42 </answer>"),
    ("<think>so</think> <answer>42</answer>", "42", "<think>so</think> <answer>42</answer>"),
    ("<think>a</think><think>b</think><answer>42</answer>", "42", "<think>a  b</think><answer>42</answer>"),
    ("<answer>42</answer> I hope that helps.", "42", "<answer>42</answer>"),
    ("42", "42", "<answer>42</answer>"),
    ("\ufeff42\u200b", "42", "<answer>42</answer>"),
    ("<answer>\u200b42\n</answer>", "42", "<answer>\u200b42\n</answer>"),
    ("#### 42", "42", "<answer>42</answer>"),
    ("####42", "42", "<answer>42</answer>"),
    (WORKED, "42", "<answer>42</answer>"),
    (WORKED + " \n\n", "42", "<answer>42</answer>"),
    (f"<answer>{WORKED}</answer>", "42", "<answer>42</answer>"),
    ("<answer>#### 1,234</answer>", "1,234", "<answer>1,234</answer>"),
    ("#### first #### 7", "7", "<answer>7</answer>"),
    (BOXED, "42", "<answer>42</answer>"),
    (f"<answer>{BOXED}</answer>", "42", "<answer>42</answer>"),
    (r"\boxed{42}", "42", r"<answer>\boxed{42}</answer>"),
    (r"<answer>\boxed{\frac{1}{2}}</answer>", r"\frac{1}{2}", r"<answer>\boxed{\frac{1}{2}}</answer>"),
    (r"$\boxed{\{x : \sqrt{x} > {1}\}}$", r"\{x : \sqrt{x} > {1}\}", None),
    (f"<answer>{CAPTION}</answer>", CAPTION, f"<answer>{CAPTION}</answer>"),
    ("y = 2x + 3", "y = 2x + 3", "<answer>y = 2x + 3</answer>"),
    ("St. John's, N.L.", "St. John's, N.L.", "<answer>St. John's, N.L.</answer>"),
    ("#hash", "#hash", "<answer>#hash</answer>"),
    ("<b>bold", "<b>bold", None),
    ("<answer><b>bold</b></answer>", "<b>bold</b>", "<answer><b>bold</b></answer>"),
    ("[1, 2]", "[1, 2]", None),
    ("<answer>7</answer><answer>seven</answer>", "seven", "<answer>7</answer>"),
    (f"{CAPTION} It is the result of rain.", f"{CAPTION} It is the result of rain.", None),
]
# (solution, problem type) -> how the reason begins
PAIRS = "has the tags {}, which do not pair; write <answer>..</answer> around each answer"
ODD = "has the tag {}, which is not read; write <answer>..</answer>"
REJECTED = [
    ("<answer>42", "", PAIRS.format("<answer>")),
    ("42</answer>", "", PAIRS.format("</answer>")),
    ("<answer>42<answer>", "", PAIRS.format("<answer> <answer>")),
    ("</answer>42<answer>", "", PAIRS.format("</answer> <answer>")),
    ("<answer>4<answer>2</answer></answer>", "", PAIRS.format("<answer> <answer> </answer> </answer>")),
    ("<answer>4</answer><answer>2", "", PAIRS.format("<answer> </answer> <answer>")),
    ("<ANSWER>42</ANSWER>", "", ODD.format("<ANSWER>")),
    ("<Answer>42</answer>", "", ODD.format("<Answer>")),
    ("<answer >42</answer>", "", ODD.format("<answer >")),
    ("< answer>42</ answer>", "", ODD.format("< answer>")),
    ("<answer/>42", "", ODD.format("<answer/>")),
    ("<answer id='1'>42</answer>", "", ODD.format("<answer id='1'>")),
    ("&lt;answer&gt;42&lt;/answer&gt;", "", ODD.format("&lt;answer&gt;")),
    ("<answer></answer>", "", "has an empty answer; write <answer>..</answer> around the answer"),
    ("<answer> \n </answer>", "ocr", "has an empty answer; write"),
    ("", "", "has an empty answer; write"),
    ("  ", "free-form", "has an empty answer; write"),
    ("<answer>7</answer><answer></answer>", "", "has an empty answer; write"),
    ("working\n####", "", r"has an empty answer: 'working\n####'; write"),
    (r"\boxed{}", "", r"has an empty answer: '\\boxed{}'; write"),
    ("<think>7 * 6</think>42", "", "has a thought inside its answer; put <think>..</think> into 'process'"),
    ("<answer><think>7 * 6</think>42</answer>", "", "has a thought inside its answer; put"),
    (
        r"\boxed{1} and \boxed{2}",
        "",
        r"has several boxes, of which none is the answer: '\\boxed{1} and \\boxed{2}'; write",
    ),
    *(
        (solution, kind, f"has a {mark} that is not read: {solution!r}; write <answer>..</answer> around the answer")
        for solution, mark in [
            ("6 * 7\n#### 42\nEnd.", "####"),
            (r"\boxed{42", r"\boxed"),
            (r"\boxed 42", r"\boxed"),
            (r"It is \fbox{42}", r"\fbox"),
        ]
        for kind in ("", "math")
    ),
    *(
        (f"<{name}>42</{name}>", "numerical", f"has the tag <{name}>, which is not read; write the answer alone")
        for name in ("solution", "final_answer", "ans", "output", "CONCLUSION")
    ),
    *(
        (solution, "", f"is a list written as a text: {solution!r}; write <answer>..</answer> around each right")
        for solution in ("['42', 'forty-two']", '["42"]', "['A', 'C']")
    ),
    *((solution, "", "has an empty answer; write") for solution in ("\u200b", "<answer>\ufeff</answer>")),
    *(
        (solution, kind, f"is no number but a text: {solution!r}; write the number alone")
        for solution in ("nan", "None", "N/A", "five", "A", "inf", "[5]")
        for kind in ("numerical", "regression")
    ),
    *(
        (solution, kind, "is a worked text that no response can equal")
        for solution in ("The answer is 42", "Answer: 42", "So the final answer is 42")
        for kind in ("", "numerical", "math", "chartqa")
    ),
    (
        "We have x = 3, so that x + 1 = 4",
        "math",
        "is no expression but a text: 'We have x = 3, so that x + 1 = 4'; write",
    ),
    (r"\frac{1}{", "math", r"has braces that do not pair: '\\frac{1}{'; write the whole expression"),
    (
        "7 * 6 = 42. So it is 42.",
        "",
        "is a worked text that no response can equal: '7 * 6 = 42. So it is 42.'; write the",
    ),
    ("Step 1: multiply.\nStep 2: add.", "", "is a worked text that no response can equal"),
    ("Six boxes of seven make 42, so the answer is 42.", "", "is a worked text that no response can equal"),
    (f"<answer>{CAPTION} Therefore, the answer is B.</answer>", "", "is a worked text that no response can equal"),
    ("We add both. Answer: 42", "exact", "is a worked text that no response can equal"),
    ("It rains, so the answer is yes", "yes/no", "is a worked text that no response can equal"),
    ("x = 42", "numerical", "is no number but a text: 'x = 42'; write the number alone in <answer>..</answer>"),
    (
        "Each side is 4 long so that it is 16",
        "numerical",
        "is no number but a text: 'Each side is 4 long so that it is 16'",
    ),
    ("<answer>It is far. About 7 km</answer>", "regression", "is no number but a text: 'It is far. About 7 km'; write"),
]


@pytest.mark.parametrize("solution, answer, taught", READ)
def test_the_final_answer_of_a_solution_is_its_reference(solution, answer, taught):
    assert reference_problem(solution) is None
    response = f"<think>?</think><answer>{answer}</answer>"
    assert accuracy_reward(response, solution) == 1.0
    assert accuracy_reward("<answer>43</answer>", solution) == 0.0
    assert taught_response("", solution) == (taught or f"<answer>{answer}</answer>")
    for accuracy in ("exact", "by_type"):
        parts = reward_parts(RewardConfig(accuracy=accuracy))
        assert score_response(response, solution, "", parts).components["accuracy"] == 1.0


@pytest.mark.parametrize("solution, problem_type, reason", REJECTED)
def test_a_solution_that_no_response_can_match_is_rejected_with_the_reason(solution, problem_type, reason):
    found = reference_problem(solution, problem_type)
    assert found is not None and found.startswith(reason)
    record = {"problem": "?", "solution": solution, "problem_type": problem_type}
    with pytest.raises(SampleError) as error:
        parse_sample({"__key__": "k", "__url__": "s.tar", "json": json.dumps(record).encode()})
    assert str(error.value) == f"sample 'k': field 'solution' {found}" and error.value.reason == "unusable_answer"


def test_texts_of_any_length_are_references_of_text_types():
    for kind in ("free-form", "OCR", "vizwiz", "consensus"):
        assert reference_problem("7 * 6 = 42. So it is 42.", kind) is None
    for kind, text in [("numerical", "1/2"), ("numerical", "5 million"), ("regression", "10:30"), ("chartqa", "7")]:
        assert reference_problem(text, kind) is None
    assert reference_answers("a#### b") == ("a#### b",), "the mark stands alone"


def test_reading_takes_no_time_whatever_the_text():
    for text in (
        "answer is " * 3000,
        "<" + " " * 30000,
        "#### " * 5000,
        r"\boxed{" * 3000,
        "a. " * 9000,
        "=1" * 9000,
        "<a>" * 9000,
    ):
        reference_problem(text, "numerical")
        reference_answers(text)
        taught_response(text, text)


@pytest.mark.parametrize("process", ["<think>6 * 7</think>", " <think>\n6 * 7</think>\n", "6 * 7", "6 * 7</think>"])
@pytest.mark.parametrize("solution", [solution for solution, *_ in READ])
def test_supervised_training_teaches_the_format(process, solution):
    """The thought is that of `process`; one in the solution would be a second."""
    taught = taught_response(process, solution)
    assert format_reward(taught) == 1.0 and accuracy_reward(taught, solution) == 1.0
    assert taught.startswith(
        process if process.rstrip().endswith("</think>") and "<t" in process else "<think>6 * 7</think>"
    )
    alone = taught_response(process, solution, include_process=False)
    assert format_reward(alone, require_think=False) == 1.0 and accuracy_reward(alone, solution) == 1.0


def sample(**changes):
    record = {"problem": "Which colour?", "solution": "B", "problem_type": "multiple choice", **changes}
    return parse_sample({"__key__": "k", "__url__": "s.tar", "json": json.dumps(record).encode()})


def test_every_reference_has_to_be_among_the_options():
    options = ["green", "red", "blue"]
    for solution in (
        "B",
        "(b)",
        "red",
        "B. red",
        "A, C",
        "AC",
        "<answer>A</answer><answer>blue</answer>",
        r"\boxed{B}",
    ):
        assert sample(solution=solution, options=options).options == tuple(options)
    for solution, named in [
        ("D", "D"),
        ("pink", "pink"),
        ("A, D", "A, D"),
        ("<answer>A</answer><answer>pink</answer>", "pink"),
        ("B. blue", "B. blue"),
        ("bac", "bac"),
    ]:
        assert outside_options(solution, options) == named
        with pytest.raises(SampleError, match=f"^sample 'k': its answer '{named}' is none of the 3 options$") as error:
            sample(solution=solution, options=options)
        assert error.value.reason == "answer_not_in_options"


def test_options_reach_the_reward_from_the_field_and_from_the_question():
    listed = "Which colour?\n(A) green\n(B) red"
    parts = reward_parts(RewardConfig(accuracy="by_type"))
    for found in (sample(options=["green", "red"]), sample(problem=listed)):
        score = score_response("<answer>red</answer>", found.solution, found.problem_type, parts, found.options)
        assert found.options == ("green", "red") and score.components["accuracy"] == 1.0
    assert sample().options == () and sample(problem=listed, problem_type="").options == ()


def test_tools_read_and_reject_alike(tmp_path, material):
    """Records through `make_shards`: each solution that is rejected is listed with its reason, the others are read."""
    accepted = [(f"good-{number}", solution, "") for number, (solution, *_) in enumerate(READ)]
    accepted += [("options-list", "A, C", "multiple choice")]
    rejected = [(f"bad-{number}", *case) for number, case in enumerate(REJECTED) if case[0].strip()]
    records = [
        {"id": key, "problem": "?", "solution": solution, "problem_type": kind, "data_type": "text"}
        | ({"options": ["green", "red", "blue"]} if key == "options-list" else {})
        for key, solution, kind in [*accepted, *(case[:3] for case in rejected)]
    ]
    (tmp_path / "records.json").write_text(json.dumps(records))
    arguments = ["--input", tmp_path / "records.json", "--media", tmp_path, "--output", tmp_path / "out"]
    assert shards.make([*map(str, arguments), "--model", str(material["tiny"]), "--workers", "1"]) == 0
    summary = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert summary["num_samples"] == len(accepted)
    found = {
        reject["key"]: reject
        for reject in map(json.loads, (tmp_path / "out" / "rejects.jsonl").read_text().splitlines())
    }
    assert set(found) == {key for key, *_ in rejected}
    for key, solution, _, reason in rejected:
        assert found[key]["reason"] == "unusable_answer", solution
        assert f"field 'solution' {reason.partition('<')[0][:18]}" in found[key]["text"], solution
