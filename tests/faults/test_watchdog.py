"""Real ranks of a real training die, are stopped, or stall: the job ends in time and names rank, phase and samples."""

import json
import re

import pytest

from tests.faults.launch import run_job
from tests.integration.cases import RL, write_config

LIMIT = 4


def arguments(tmp_path, model, data, *more):
    path, overrides = write_config(tmp_path, RL, model, data, "rl")
    return [
        "--config",
        path,
        *overrides,
        "logging.probe_interval=0",
        "logging.eval_interval=0",
        f"train.output_dir={tmp_path}/run",
        f"watchdog.timeout_seconds={LIMIT}",
        "watchdog.long_timeout_seconds=8",
        "reward.functions={varied: {path: 'tests.faults.doom:varied', weight: 1.0}}",
        *more,
    ]


def test_all_survivors_of_the_first_rank_hear_its_verdict(material, tmp_path):
    """The first rank hosts the store, so it ends last: all others read its verdict, and none takes it for dead."""
    ended = run_job(
        3,
        tmp_path / "job",
        [*arguments(tmp_path, material["tiny"], material["data"]), "rollout.num_prompts=6"],
        {"rank": 0, "phase": "rollout", "entry": 2, "delay": 0.03, "how": "stall"},
    )
    assert ended.codes == [3, 3, 3]
    assert "watchdog: rank 0 made no progress" in ended.output[0] + ended.output[1]
    assert not any("died" in text or "does not answer" in text for text in ended.output), ended.output
    assert (tmp_path / "run" / "watchdog.log").read_text().count("the job ends") == 1


@pytest.mark.parametrize(
    "how, rank, phase, entry, what",
    [
        ("kill", 1, "rollout", 2, "died"),
        ("kill", 0, "update", 3, "died"),
        ("kill", 1, "checkpoint", 2, "died"),
        ("stop", 1, "update", 3, "sent no heartbeat"),
        ("stop", 0, "rollout", 2, "does not answer"),
        ("stall", 1, "rollout", 2, "made no progress"),
        ("stall", 0, "update", 3, "made no progress"),
    ],
)
def test_rank_that_dies_or_stalls_ends_the_job(material, tmp_path, how, rank, phase, entry, what):
    ended = run_job(
        2,
        tmp_path / "job",
        arguments(tmp_path, material["tiny"], material["data"]),
        {"rank": rank, "phase": phase, "entry": entry, "delay": 0.01 if phase == "checkpoint" else 0.03, "how": how},
    )
    note = json.loads((tmp_path / "job" / "note.json").read_text())
    survivor = 1 - rank
    text = ended.output[survivor]
    if (
        how == "stall" and rank == 0 and "watchdog: rank 0 died" in text
    ):  # it found itself first, and the store ended with it
        assert "watchdog: rank 0 made no progress" in ended.output[0] and ended.codes[0] == 3, ended.output[0]
    else:
        assert f"watchdog: rank {rank} {what}" in text, text
    [(where, step, samples)] = re.findall(
        rf"watchdog: rank {rank} was in phase '(.*)' of step (\d+), last samples? (.*)", text
    )
    assert int(step) == note["step"] and "rl-" in samples, text
    if rank == 1:  # the store ends with rank 0: others know only its heartbeat before
        assert note["before"] == phase or note["phase"] == phase
        assert where == note["phase"] or (note["seconds"] < 0.02 and where == note["before"]), (note, text)
    assert "where every rank was:" in text and "--resume" in text
    assert ended.codes[survivor] == 3 and ended.codes[rank] in ((-9, 3) if how == "stall" else (-9,)), ended.codes
    assert "watchdog: rank" in (tmp_path / "run" / "watchdog.log").read_text()
    if rank == 1:
        assert "watchdog: rank 1" in ended.output[0], "the first rank's log has it too"
