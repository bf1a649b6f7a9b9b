"""Heartbeats of all ranks, and the ranks that died or stalled according to them: the pure half of the watchdog."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Mapping, Optional, Sequence


@dataclass(frozen=True)
class Heartbeat:
    """State that a rank reports about itself."""

    number: int = 0
    """Number of heartbeats sent so far."""
    ticks: int = 0
    """Count that grows while the main thread makes progress (`Progress.ticks`)."""
    phase: str = "start-up"
    """Name of the current phase."""
    is_long: bool = True
    """Permission of the phase to last long without a tick."""
    num_phases: int = 0
    """Number of phases entered so far."""
    step: int = 0
    """1-based step in work, 0 before the first."""
    samples: str = ""
    """Names of the samples last touched, as text for people."""
    waits_in: str = ""
    """Collective in which the main thread waits for other ranks, or empty."""
    place: str = ""
    """Innermost line of this package that the main thread executes."""
    has_left: bool = False
    """Announcement that the rank has finished its work and ends normally."""

    def where(self) -> str:
        """Return phase, step and samples as one phrase."""
        step = f" of step {self.step}" if self.step else ""
        return f"phase '{self.phase}'{step}, {self.samples or 'no sample yet'}"


def stragglers(heartbeats: Mapping[int, Heartbeat]) -> list[int]:
    """Return the ranks that hold up a job in which no rank makes progress.

    Candidates are the ranks that do not wait in a collective, or all ranks if every rank waits. The stragglers are the
    candidates in the earliest phase.
    """
    candidates = [rank for rank, heartbeat in heartbeats.items() if not heartbeat.waits_in] or list(heartbeats)
    earliest = min(heartbeats[rank].num_phases for rank in candidates)
    return [rank for rank in candidates if heartbeats[rank].num_phases == earliest]


def describe(heartbeats: Mapping[int, Heartbeat]) -> list[str]:
    """Return lines of text, one for all ranks that are at the same place."""
    places: dict[str, list[int]] = defaultdict(list)
    for rank, heartbeat in sorted(heartbeats.items()):
        state = f"waits for other ranks ({heartbeat.waits_in}) " if heartbeat.waits_in else ""
        places[f"{heartbeat.where()}, {state}at {heartbeat.place or 'no line of this package'}"].append(rank)
    return [f"  {name_ranks(ranks)}: {place}" for place, ranks in places.items()]


def name_ranks(ranks: Sequence[int]) -> str:
    """Return "rank 3" or "ranks 3, 5"."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


class HealthMonitor:
    """Judgement of the health of all ranks, from their heartbeats in the order of arrival.

    Args:
        limits: seconds without a heartbeat or tick after which a rank counts as dead or stalled, in (a usual, a long)
            phase.
        watches_waiting: whether a heartbeat shows that its main thread waits for other ranks. With an accelerator it
            does not, because the wait is in the queue of the device. A stall then counts only once no rank makes
            progress.
    """

    def __init__(self, limits: tuple[float, float], watches_waiting: bool):
        self.limits, self.watches_waiting = limits, watches_waiting
        self.heartbeats: dict[int, Heartbeat] = {}
        self._last_heartbeat: dict[int, float] = {}
        self._last_progress: dict[int, float] = {}

    def record(self, rank: int, heartbeat: Heartbeat, now: float) -> None:
        """Take note of a rank's newest heartbeat at time `now` in seconds."""
        known = self.heartbeats.get(rank)
        if known is None or known.number != heartbeat.number:
            self._last_heartbeat[rank] = now
        if known is None or known.ticks != heartbeat.ticks:
            self._last_progress[rank] = now
        self.heartbeats[rank] = heartbeat

    def exclude(self, seconds: float) -> None:
        """Exclude seconds from all counts, because the monitor itself was suspended, perhaps with all ranks."""
        for times in (self._last_heartbeat, self._last_progress):
            for rank in times:
                times[rank] += seconds

    def silent(self, now: float) -> Optional[tuple[list[int], str]]:
        """Return the ranks that send no heartbeat and a description of their state, or None."""
        ranks = [
            rank
            for rank, heartbeat in self._present()
            if now - self._last_heartbeat[rank] > self.limits[heartbeat.is_long]
        ]
        if not ranks:
            return None
        seconds = now - max(self._last_heartbeat[rank] for rank in ranks)
        return ranks, f"sent no heartbeat for {seconds:.0f} s (stopped, or its machine is lost)"

    def stalled(self, now: float) -> Optional[tuple[list[int], str]]:
        """Return the stragglers of a stalled job and a description of their state, or None."""
        present = dict(self._present())
        ranks = [
            rank
            for rank, heartbeat in present.items()
            if self.watches_waiting
            and not heartbeat.waits_in
            and now - self._last_progress[rank] > self.limits[heartbeat.is_long]
        ]
        if (
            not ranks
            and present
            and (
                now - max(self._last_progress[rank] for rank in present)
                > max(self.limits[heartbeat.is_long] for heartbeat in present.values())
            )
        ):
            ranks = list(present)
        if not ranks:
            return None
        ranks = stragglers({rank: present[rank] for rank in ranks})
        waiting = ", all ranks waiting for each other" if all(present[rank].waits_in for rank in ranks) else ""
        return ranks, f"made no progress for {now - max(self._last_progress[rank] for rank in ranks):.0f} s{waiting}"

    def _present(self) -> list[tuple[int, Heartbeat]]:
        return [(rank, heartbeat) for rank, heartbeat in self.heartbeats.items() if not heartbeat.has_left]
