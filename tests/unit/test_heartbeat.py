"""Judgement of the health of ranks from heartbeats alone, and the phases that a process reports."""

from dataclasses import replace

from megatron_ral.runtime.heartbeat import HealthMonitor, Heartbeat, describe, stragglers
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


def send_all(monitor, now, **changes):
    """Record a heartbeat of every rank; `r1=dict(...)` changes that of rank 1."""
    for rank in range(3):
        heartbeat = replace(USUAL, number=int(10 * now), ticks=int(10 * now))
        monitor.record(rank, replace(heartbeat, **changes.get(f"r{rank}", {})), now)


def test_ranks_that_make_progress_are_left_alone():
    monitor = HealthMonitor(LIMITS, watches_waiting=True)
    for now in range(0, 300, 5):
        send_all(monitor, float(now))
        assert monitor.silent(now) is None and monitor.stalled(now) is None


def test_a_rank_without_heartbeats_is_named_and_a_long_phase_may_be_quiet():
    for is_long, limit in ((False, 10), (True, 100)):
        monitor = HealthMonitor(LIMITS, watches_waiting=True)
        for now in range(limit + 12):
            send_all(monitor, float(now), r1={"number": 1, "ticks": 1, "is_long": is_long})
            found = monitor.silent(now)
            assert (found is not None) == (now > limit), now
        assert found[0] == [1] and "sent no heartbeat" in found[1]


def test_a_rank_without_progress_is_named_unless_it_waits():
    monitor = HealthMonitor(LIMITS, watches_waiting=True)
    for now in range(25):
        send_all(monitor, float(now), r1={"ticks": 1}, r2={"ticks": 1, "waits_in": "all_reduce"})
        assert monitor.silent(now) is None and (monitor.stalled(now) is not None) == (now > 10)
    assert monitor.stalled(24)[0] == [1]
    assert monitor.stalled(24)[1] == "made no progress for 24 s"


def test_waiting_alone_counts_only_when_no_rank_makes_progress():
    monitor = HealthMonitor(LIMITS, watches_waiting=True)
    for now in range(50):  # rank 2 decodes on while the others wait for it
        send_all(monitor, float(now), r0={"ticks": 1, "waits_in": "barrier"}, r1={"ticks": 1, "waits_in": "barrier"})
        assert monitor.stalled(now) is None
    for now in range(50, 70):
        send_all(
            monitor,
            float(now),
            **{f"r{rank}": {"ticks": 1, "waits_in": "barrier", "num_phases": 5 - (rank == 2)} for rank in range(3)},
        )
        assert (monitor.stalled(now) is not None) == (now > 60), now
    assert monitor.stalled(69) == ([2], "made no progress for 19 s, all ranks waiting for each other")


def test_with_an_accelerator_a_stall_counts_once_no_rank_makes_progress():
    monitor = HealthMonitor(LIMITS, watches_waiting=False)
    for now in range(50):
        send_all(monitor, float(now), r1={"ticks": 1, "num_phases": 4})
        assert monitor.stalled(now) is None
    for now in range(50, 62):
        send_all(monitor, float(now), **{f"r{rank}": {"ticks": 1, "num_phases": 5 - (rank == 1)} for rank in range(3)})
    assert monitor.stalled(61)[0] == [1]


def test_time_in_which_the_monitor_was_suspended_counts_for_no_rank():
    monitor = HealthMonitor((10.0, 100.0), True)
    send_all(monitor, 0.0)
    monitor.exclude(60.0)
    assert monitor.silent(69.0) is None and monitor.stalled(69.0) is None
    assert monitor.silent(71.0) is not None and monitor.stalled(71.0) is not None


def test_a_rank_that_has_left_may_be_silent():
    monitor = HealthMonitor(LIMITS, watches_waiting=True)
    for now in range(30):
        send_all(monitor, float(now), r1={"number": 1, "ticks": 1, "has_left": True})
        assert monitor.silent(now) is None and monitor.stalled(now) is None


def test_stragglers_and_their_description():
    waiting = replace(USUAL, waits_in="all_reduce", num_phases=9)
    heartbeats = {0: waiting, 1: replace(USUAL, num_phases=7), 2: waiting, 3: replace(USUAL, num_phases=8)}
    assert stragglers(heartbeats) == [1]
    assert stragglers({0: waiting, 2: replace(waiting, num_phases=8)}) == [2]
    lines = describe(heartbeats)
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
        assert progress.phase == "rollout", "the phase in which the error happened"
