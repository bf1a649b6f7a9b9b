"""The watchdog's judgement by beats alone, and the phases a process tells of."""

from dataclasses import replace

from megatron_ral.runtime.heartbeat import Heartbeat, HealthMonitor, stragglers, describe
from megatron_ral.runtime.progress import Progress

USUAL = Heartbeat(
    phase="rollout",
    is_long=False,
    num_phases=5,
    step=2,
    samples="last sample a",
    place="engine/pipelined_decoder.py:1 in f",
)
LIMITS = (10.0, 100.0)


def told(judge, now, **changes):
    """A beat of every rank; `r1=dict(...)` changes rank 1's."""
    for rank in range(3):
        beat = replace(USUAL, number=int(10 * now), ticks=int(10 * now))
        judge.hear(rank, replace(beat, **changes.get(f"r{rank}", {})), now)


def test_ranks_that_get_on_are_left_alone():
    judge = HealthMonitor(LIMITS, watches_waiting=True)
    for now in range(0, 300, 5):
        told(judge, float(now))
        assert judge.silent(now) is None and judge.stalled(now) is None


def test_a_rank_without_beats_is_named_and_a_long_phase_may_be_quiet():
    for is_long, limit in ((False, 10), (True, 100)):
        judge = HealthMonitor(LIMITS, watches_waiting=True)
        for now in range(0, limit + 12):
            told(judge, float(now), r1={"number": 1, "ticks": 1, "is_long": is_long})
            found = judge.silent(now)
            assert (found is not None) == (now > limit), now
        assert found[0] == [1] and "no sign of life" in found[1]


def test_a_rank_that_does_not_get_on_is_named_unless_it_waits():
    judge = HealthMonitor(LIMITS, watches_waiting=True)
    for now in range(0, 25):
        told(judge, float(now), r1={"ticks": 1}, r2={"ticks": 1, "waits_in": "all_reduce"})
        assert judge.silent(now) is None and (judge.stalled(now) is not None) == (now > 10)
    assert judge.stalled(24)[0] == [1]
    assert judge.stalled(24)[1] == "did not get on for 24 s"


def test_waiting_alone_counts_only_when_nobody_gets_on():
    judge = HealthMonitor(LIMITS, watches_waiting=True)
    for now in range(0, 50):  # rank 2 decodes on while the others wait for it
        told(judge, float(now), r0={"ticks": 1, "waits_in": "barrier"}, r1={"ticks": 1, "waits_in": "barrier"})
        assert judge.stalled(now) is None
    for now in range(50, 70):
        told(
            judge,
            float(now),
            **{f"r{rank}": {"ticks": 1, "waits_in": "barrier", "num_phases": 5 - (rank == 2)} for rank in range(3)},
        )
        assert (judge.stalled(now) is not None) == (now > 60), now
    assert judge.stalled(69) == ([2], "did not get on for 19 s, all ranks waiting for each other")


def test_with_an_accelerator_a_stall_counts_once_nobody_gets_on():
    judge = HealthMonitor(LIMITS, watches_waiting=False)
    for now in range(0, 50):
        told(judge, float(now), r1={"ticks": 1, "num_phases": 4})
        assert judge.stalled(now) is None
    for now in range(50, 62):
        told(judge, float(now), **{f"r{rank}": {"ticks": 1, "num_phases": 5 - (rank == 1)} for rank in range(3)})
    assert judge.stalled(61)[0] == [1]


def test_time_in_which_the_judge_was_held_up_counts_for_nobody():
    judge = HealthMonitor((10.0, 100.0), True)
    told(judge, 0.0)
    judge.skip(60.0)
    assert judge.silent(69.0) is None and judge.stalled(69.0) is None
    assert judge.silent(71.0) is not None and judge.stalled(71.0) is not None


def test_a_rank_that_has_left_may_be_silent():
    judge = HealthMonitor(LIMITS, watches_waiting=True)
    for now in range(0, 30):
        told(judge, float(now), r1={"number": 1, "ticks": 1, "has_left": True})
        assert judge.silent(now) is None and judge.stalled(now) is None


def test_blame_and_description():
    waiting = replace(USUAL, waits_in="all_reduce", num_phases=9)
    beats = {0: waiting, 1: replace(USUAL, num_phases=7), 2: waiting, 3: replace(USUAL, num_phases=8)}
    assert stragglers(beats) == [1]
    assert stragglers({0: waiting, 2: replace(waiting, num_phases=8)}) == [2]
    lines = describe(beats)
    assert len(lines) == 2 and lines[0].startswith(
        "  ranks 0, 2: phase 'rollout' of step 2, last sample a, waits for other"
    )
    assert lines[1].startswith("  ranks 1, 3: phase 'rollout'")


def test_phases_nest_and_only_the_first_of_a_name_is_long():
    progress, heard = Progress(), []
    assert progress.is_long and progress.phase == "start-up"
    progress.listener = heard.append
    with progress.within("training", is_long=False):
        for first in (True, False):
            with progress.within("update"):
                assert (progress.phase, progress.is_long) == ("update", first)
            assert (progress.phase, progress.is_long) == ("training", False)
        with progress.within("checkpoint", is_long=True):
            assert progress.is_long
    assert heard == [False, True, False, False, False, True, False, True]
    ticks = progress.ticks
    progress.tick(["a", "b"])
    progress.tick()
    assert progress.ticks == ticks + 2 and list(progress.samples) == ["a", "b"]
    try:
        with progress.within("rollout"):
            raise KeyError
    except KeyError:
        assert progress.phase == "rollout", "where it happened is what is wanted"
