"""A user's reward function hangs on one rank of a real training: the job ends in time and names reward, rank, phase and
sample."""

import re

import pytest

from tests.faults.launch import run_job
from tests.integration.cases import RL, write_config

LIMIT = 5


@pytest.mark.parametrize("rank, how", [(1, "backtracks"), (0, "backtracks"), (1, "sleeps")])
def test_reward_that_hangs_on_one_rank_ends_the_job(material, tmp_path, rank, how):
    path, overrides = write_config(tmp_path, RL, material["tiny"], material["data"], "rl")
    ended = run_job(
        2,
        tmp_path / "job",
        [
            *("--config", path, *overrides),
            *("logging.probe_interval=0", "logging.eval_interval=0", f"train.output_dir={tmp_path}/run"),
            *(f"watchdog.timeout_seconds={LIMIT}", "watchdog.long_timeout_seconds=600"),
            f"reward.functions={{mine: {{path: 'tests.faults.hanging:{how}_on_{rank}', weight: 1.0}}}}",
        ],
    )
    told = (
        r"reward\.functions\.mine did not return within 3\.5 s, in phase 'rollout' of step 1, on sample "
        r"'rl-\S+/\w+'; give it a time limit of its own, or raise watchdog\.timeout_seconds"
    )
    assert re.search(f"error: rank {rank}: {told}", ended.output[rank]), ended.output
    assert re.search(f"watchdog: rank {rank} ended with an error: {told}", ended.output[1 - rank]), ended.output
    assert re.search(
        rf"watchdog: rank {rank} was in phase 'rollout' of step 1, last sample rl-\S+/", ended.output[1 - rank]
    )
    assert ended.codes[rank] == 2 and ended.codes[1 - rank] == 3
