"""Functions in a process of their own: values, errors, restarts, limits that hold while the interpreter is held."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from megatron_ral.config import load_config
from megatron_ral.config.sections import RewardConfig, RewardFunctionConfig
from megatron_ral.errors import ConfigError
from megatron_ral.rewards.process import CallFailed, CallTimeout, FunctionProcess
from megatron_ral.rewards.score import RewardTimeout, reward_parts, score_response

USER = "tests.unit.user_rewards"
ANSWER_7 = "<think>x</think><answer>7</answer>"


@pytest.fixture(scope="module")
def process():
    return FunctionProcess()


def test_a_call_returns_what_the_function_returns_in_another_process(process):
    assert process.call(f"{USER}:brevity", "ab", "c", "d") == 2 + 100 + 10000
    number = process.call(f"{USER}:process_number", "", "", "")
    assert number != os.getpid() and process.call(f"{USER}:process_number", "", "", "") == number, "one process for all"
    text = "é ∑ \n\t'\"{} \U0001f600" * 5000  # more than a pipe holds at once
    assert process.call(f"{USER}:brevity", text, "", "") == len(text)


@pytest.mark.parametrize("hangs", ["backtracks", "sleeps", "catches_everything"])
def test_a_function_that_hangs_is_ended_and_the_next_call_works(process, hangs):
    before = process.call(f"{USER}:process_number", "", "", "")
    with pytest.raises(CallTimeout, match=r"did not return within 0\.3 s"):
        process.call(f"{USER}:{hangs}", "7", "", "", seconds=0.3)
    with pytest.raises(ProcessLookupError):
        os.kill(int(before), 0)
    assert process.call(f"{USER}:judge", "", "", "", seconds=60.0) == 0.25
    assert process.call(f"{USER}:process_number", "", "", "") != before


def test_a_program_that_a_function_has_started_ends_with_it(process, tmp_path):
    process.call(f"{USER}:judge", "", "", "")
    with pytest.raises(CallTimeout):
        process.call(f"{USER}:waits_for_a_program", str(tmp_path / "number"), "", "", seconds=5.0)
    number, deadline = int((tmp_path / "number").read_text()), time.monotonic() + 60
    while time.monotonic() < deadline:  # until its new parent has noticed
        if not (status := Path(f"/proc/{number}/status")).exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.01)
    raise AssertionError("the program goes on")


def test_processor_time_has_a_limit_of_its_own(process):
    with pytest.raises(CallTimeout, match=r"did not return within 0\.2 s"):
        process.call(f"{USER}:backtracks", "7", "", "", seconds=300.0, cpu_seconds=0.2)
    assert process.call(f"{USER}:judge", "", "", "", seconds=300.0, cpu_seconds=100.0) == 0.25


def test_a_caller_in_a_thread_has_the_same_limit(process):
    found = []

    def ask():
        try:
            process.call(f"{USER}:backtracks", "7", "", "", seconds=0.3)
        except CallTimeout as error:
            found.append(error.seconds)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [0.3]


@pytest.mark.parametrize(
    "path, said",
    [
        ("fails_on_8", "RuntimeError: the judge is out"),
        ("exits", "SystemExit: no judge"),
        ("NOTHING", "TypeError: float() argument must be a string or a real number, not 'NoneType'"),
        ("TEXT", "ValueError: could not convert string to float: 'good'"),
        ("is_killed", "its process ended with signal 9"),
    ],
)
def test_what_fails_is_told(process, path, said):
    with pytest.raises(CallFailed) as error:
        process.call(f"{USER}:{path}", "8", "", "", seconds=60.0)
    assert str(error.value) == said
    assert process.call(f"{USER}:judge", "", "", "") == 0.25


def test_a_function_may_have_an_alarm_of_its_own(process):
    assert process.call(f"{USER}:has_own_alarm", "", "", "", seconds=60.0) == 1.0


def test_a_request_to_stop_is_passed_on_to_the_run(process):
    """Slurm sends SIGUSR1 to every process of a job, and a user's function may ask for the end of the run."""
    asked = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        before = signal.signal(number, lambda number, _: asked.append(number))
        try:
            assert process.call(f"{USER}:asks_to_stop", str(int(number)), "", "", seconds=60.0) == 1.0
        finally:
            signal.signal(number, before)
    assert asked == [signal.SIGUSR1, signal.SIGTERM]


def test_random_numbers_depend_on_the_call_alone(process):
    """A run that is resumed gets the rewards that it would have had, whatever was drawn before."""
    first = [process.call(f"{USER}:draws", text, "", "") for text in "aba"]
    again = FunctionProcess()
    assert first[0] == first[2] != first[1] and again.call(f"{USER}:draws", "b", "", "") == first[1]


def test_a_path_that_cannot_be_used_is_named(process, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"^key = 'nowhere:f' cannot be imported \(ModuleNotFoundError"):
        process.load("key", "nowhere:f")
    (tmp_path / "ends_python.py").write_text("import os\nos._exit(4)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"^key = 'ends_python:f' cannot be imported: its process ended with status 4$"
    ):
        process.load("key", "ends_python:f")
    (tmp_path / "late_module.py").write_text("def f(*texts):\n    return len(texts)\n")
    assert process.call("late_module:f", "", "", "") == 3.0, "folders that joined the path later are searched"


def test_memory_is_limited():
    with pytest.raises(CallFailed, match="MemoryError"):
        FunctionProcess(memory_gib=1).call("tests.unit.user_rewards:fills_memory", "", "", "", seconds=60.0)


# --- as a part of the reward ------------------------------------------------------------------------------------------


def own(path: str) -> RewardConfig:
    return RewardConfig(functions={"mine": RewardFunctionConfig(f"{USER}:{path}", 1.0)})


@pytest.mark.parametrize("hangs", ["backtracks", "sleeps"])
def test_a_reward_that_hangs_is_no_score(hangs):
    parts = reward_parts(own(hangs), time_limit=0.3)
    with pytest.raises(RewardTimeout, match=r"^reward 'mine' did not return within 0\.3 s$"):
        score_response(ANSWER_7, "7", "", parts)
    assert score_response("<answer>8</answer>", "7", "", parts).components["mine"] in (0.0, 1.0)


def test_a_reward_that_ends_its_process_is_an_error_and_the_run_goes_on():
    parts = reward_parts(own("dies"), time_limit=60.0)
    score = score_response(ANSWER_7, "7", "", parts)
    assert score.components["error"] == 1.0 and score.components["mine"] == 0.0
    assert score.problems == ("reward 'mine': its process ended with status 5",)
    assert score_response("<answer>8</answer>", "7", "", parts).components == {
        "unparsed": 0.0,
        "error": 0.0,
        "accuracy": 0.0,
        "format": 0.0,
        "mine": 1.0,
    }


def test_what_a_reward_prints_disturbs_nothing(capfd):
    assert FunctionProcess().call(f"{USER}:prints", "", "", "") == 1.0
    assert "a line of the user's own" in capfd.readouterr().out


@pytest.mark.parametrize("timeout, limit", [(60, 42.0), (10, 7.0), (0, 1800.0)])
def test_the_limit_is_below_the_watchdogs(tmp_path, timeout, limit):
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: somewhere}\ndata: {train: [{shards: a}]}\n")
    watchdog = load_config(path, [f"watchdog.timeout_seconds={timeout}"]).watchdog
    assert watchdog.reward_time_limit == pytest.approx(limit)


def test_a_process_ends_with_its_caller():
    """A process whose caller is gone finds the pipe closed."""
    process = FunctionProcess()
    number = int(process.call(f"{USER}:process_number", "", "", ""))
    os.close(process._requests)
    deadline = time.monotonic() + 60
    while process._process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process._process.poll() == 0 and number == process._process.pid
    os.close(process._replies)
