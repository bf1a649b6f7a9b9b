"""Issues of a preflight: parts of an error, one sentence, or a table of several."""

from megatron_ral.errors import ConfigError, DataError
from megatron_ral.planning.launch_issues import LaunchIssue, describe_issues, name_ranks


def test_an_issue_takes_the_parts_of_an_error():
    error = DataError("data.train.0.shards", "a/rl-*.tar", ": matches no file;\n  name another")
    issue = LaunchIssue.of(error)
    assert issue == LaunchIssue("data.train.0.shards", "'a/rl-*.tar'", ": matches no file; name another")
    assert issue.sentence() == "data.train.0.shards = 'a/rl-*.tar': matches no file; name another"
    flag = LaunchIssue.of(ConfigError("model.train_vision", True, "has no effect"))
    assert flag.value == "true" and flag.sentence() == "model.train_vision = true has no effect"
    assert LaunchIssue.of(ConfigError("model.path", None, "is empty")).sentence() == "model.path is empty"


def test_another_error_is_a_sentence():
    assert LaunchIssue.of(OSError("disk\nlost")) == LaunchIssue("", "", "disk lost")


def test_ranks_are_named_by_spans_and_hosts():
    hosts = ["a", "a", "b", "b", "c"]
    assert name_ranks(range(5), hosts) == "all ranks"
    assert name_ranks([1], hosts) == "rank 1 (a)"
    assert name_ranks([0, 1, 2, 4], hosts) == "ranks 0-2, 4 (a, b, c)"


def test_one_issue_is_a_sentence_and_several_are_a_table():
    lr = LaunchIssue("optimizer.learning_rate", "0.1", "is not that of rank 0, 0.2")
    clock = LaunchIssue("clock", "+9 s", ", away from that of rank 0")
    assert describe_issues({lr: [1]}, ["a", "b"]) == (
        "rank 1 (b): optimizer.learning_rate = 0.1 is not that of rank 0, 0.2"
    )
    head, columns, *rows = describe_issues({lr: [1], clock: [0, 1]}, ["a", "b"]).splitlines()
    assert head == "2 things are wrong; nothing was started"
    assert columns.split("  ")[0] == "where" and columns.endswith("what is wrong, and the way out")
    assert rows[0].split()[:4] == ["rank", "1", "(b)", "optimizer.learning_rate"]
    assert rows[1].startswith("all ranks") and rows[1].endswith("+9 s   away from that of rank 0")
