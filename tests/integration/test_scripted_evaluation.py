"""Answers and references of other people through make_shards.py and `megatron_ral.evaluate`."""

import io
import json
import subprocess
import sys
import tarfile

import pytest

from megatron_ral.commands.shards import make as make_shards
from tests.conftest import PROJECT
from tests.integration.cases import RL, write_config

COLOURS = ["green", "red", "blue", "a red and blue ball"]
# problem type -> (reference, answer, accuracy) or (reference, answer, accuracy, options)
ANSWERS = {
    "numerical": [
        ("314", "3,14", 0),
        ("12", "1,2", 0),
        ("15", "1_5", 0),
        ("1234.5", "1,234.5", 1),
        ("1234.5", "1.234,5", 0),
        ("-5", "−5", 1),
        ("1000", "1e3", 1),
        ("12", "١٢", 1),
        ("0.004", "0.001", 0),
        ("0.004", "0.00401", 1),
        ("5", "5 cm", 1),
        ("5", "5k", 0),
        ("5", "5M", 0),
        ("5", "5 bn", 0),
        ("5", "5π", 0),
        ("5", "5!", 0),
        ("5", "5 tenths", 0),
        ("300", "300 K", 1),
        ("5", "9" * 5000, 0),
        ("#### 5", "5", 1),
        (r"so it is $\boxed{5}$", "5", 1),
    ],
    "multiple choice": [
        *(("B", answer, 1, COLOURS) for answer in ("red", "B. red", "(b)", "*B*", "red (B)", "The answer is option B")),
        *(
            ("B", answer, 0, COLOURS)
            for answer in ("C", "B. blue", "B. red, C. blue", "B. red or blue", "B: A", "Not B")
        ),
        ("A, C", "AC", 1, COLOURS),
        ("A, C", "C, A", 1, COLOURS),
        ("A, C", "A", 0, COLOURS),
        ("D", "a red and blue ball", 1, COLOURS),
        ("B", "1,000", 1, ["100", "1000"]),
        ("B", "AC", 1, ["DC", "AC"]),
        ("yes", "Yes.", 1),
    ],
    "math": [
        (r"\frac{1}{2}", "0.5", 1),
        ("5/2", "2 1/2", 1),
        ("3/2", "2 1/2", 0),
        (r"2\sqrt{2}", "√8", 1),
        (r"(3, \infty)", "x > 3", 1),
        ("[1,2)", "[1, 2]", 0),
        ("5", "5x", 0),
        ("5", r"5\pi", 0),
        ("3", "3t", 0),
        ("5", r"5\text{ cm}^2", 1),
        ("120", "5!", 1),
        (r"\sin x", "sin(x)", 1),
    ],
    "": [
        ("42", "42", 1),
        ("42", " 42\u200b", 1),
        ("42", "42.", 0),
        ("<think>6 * 7</think><answer>42</answer>", "42", 1),
    ],
}
# whole response to a sample whose answer is 7 -> accuracy, format, unparsed
RESPONSES = [
    ("<think>?</think><answer>7</answer>", 1, 1, 0),
    ("<think>?</think>\n\n<answer>\n7\n</answer>\n", 1, 1, 0),
    ("<answer>7</answer>", 1, 0, 0),
    ("<think>?<answer>7</answer>", 1, 0, 0),
    ("<think>?</think><answer>7</answer> So it is 7.", 1, 0, 0),
    ("<think>The <answer> is 7.</think><answer>7</answer>", 0, 0, 1),
    ("<think>?</think><answer>7</answer><answer>8</answer>", 0, 0, 1),
    ("<think>?</think><answer><answer>7</answer></answer>", 0, 0, 1),
    ("<think>?</think><ANSWER>7</ANSWER>", 0, 0, 1),
    ("<think>?</think><answer>7", 0, 0, 1),
    ("<think>?</think>7", 0, 0, 1),
    ("<think>?</think><answer></answer>", 0, 1, 0),
    ("", 0, 0, 1),
]
# (reference, problem type) of samples that no response can match
UNUSABLE = [
    ("<answer>42", ""),
    ("<ANSWER>42</ANSWER>", ""),
    ("<answer></answer>", ""),
    ("#### 42\nas said", ""),
    (r"\boxed{42", "math"),
    ("<CONCLUSION>42</CONCLUSION>", ""),
    ("['42', 'forty-two']", ""),
    ("nan", "numerical"),
    ("The answer is 42", "numerical"),
    ("6 * 7 = 42. So it is 42.", "math"),
]
BARE = {"bare": "<think>?</think><answer>7</answer>"}
"""Response to a sample whose solution has no tags."""


def cases():
    """Samples by key: (record, response, expected accuracy, format, unparsed)."""
    for kind, answers in ANSWERS.items():
        for number, (reference, answer, accuracy, *options) in enumerate(answers):
            record = {"solution": reference, "problem_type": kind} | ({"options": options[0]} if options else {})
            key = f"{kind or 'exact'}-{number}".replace(" ", "-")
            yield key, record, f"<think>?</think><answer>{answer}</answer>", (accuracy, 1, 0)
    for number, (response, *expected) in enumerate(RESPONSES):
        yield f"response-{number}", {"solution": "7", "problem_type": ""}, response, tuple(expected)


def write_shard(path, records) -> None:
    """A shard from elsewhere, which no tool has checked."""
    with tarfile.open(path, "w") as shard:
        for key, record in records.items():
            content = json.dumps({"problem": "?", **record}).encode()
            member = tarfile.TarInfo(f"{key}.json")
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def evaluated(material, tmp_path_factory):
    """All cases in one evaluation: its result, and its completions by key."""
    root = tmp_path_factory.mktemp("scripted")
    records = [{"id": key, "problem": "?", "data_type": "text", **record} for key, record, *_ in cases()]
    (root / "records.json").write_text(json.dumps(records))
    (root / "responses.json").write_text(json.dumps({key: text for key, _, text, _ in cases()} | BARE))
    arguments = ["--input", root / "records.json", "--media", root, "--output", root / "out", "--workers", "1"]
    assert make_shards([*map(str, arguments), "--model", str(material["tiny"])]) == 0
    assert (root / "out" / "rejects.jsonl").read_text() == ""
    unusable = {f"unusable-{n}": {"solution": text, "problem_type": kind} for n, (text, kind) in enumerate(UNUSABLE)}
    write_shard(root / "out" / "foreign.tar", {**unusable, "bare": {"solution": "7"}})
    path, overrides = write_config(root, RL, material["tiny"], material["data"], "rl")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("-m", "tests.integration.scripted_evaluation", f"{root}/responses.json"),
            *("--config", path, "--output", f"{root}/e.json", *overrides, f"data.eval_shards={root}/out/*.tar"),
            *("reward.accuracy=by_type", "rollout.max_response_length=1", "logging.num_eval_prompts=500"),
        ],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    completions = [json.loads(line) for line in (root / "e.jsonl").read_text().splitlines()]
    return json.loads((root / "e.json").read_text()), {line["key"]: line["greedy"] for line in completions}


def test_each_answer_gets_its_accuracy(evaluated):
    _, completions = evaluated
    wrong = {}
    for key, record, response, expected in cases():
        parts = completions[key]["parts"]
        if (found := tuple(parts[name] for name in ("accuracy", "format", "unparsed"))) != expected or parts["error"]:
            wrong[key] = record, response, found, expected
    assert not wrong


def test_samples_that_no_response_can_match_are_counted_and_left_out(evaluated):
    result, completions = evaluated
    assert result["left_out"] == {"unusable_answer": len(UNUSABLE)}
    assert set(completions) == {key for key, *_ in cases()} | set(BARE) and result["num_prompts"] == len(completions)
    assert [completions[key]["parts"]["accuracy"] for key in BARE] == [1.0]
