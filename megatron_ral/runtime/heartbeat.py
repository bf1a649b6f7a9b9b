"""What ranks tell of themselves, and who died or stalled by it: the pure half of the watchdog."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Mapping, Optional, Sequence


@dataclass(frozen=True)
class Heartbeat:
    """What a rank says of itself."""

    number: int = 0
    ticks: int = 0
    phase: str = "start-up"
    is_long: bool = True
    num_phases: int = 0
    step: int = 0
    samples: str = ""
    waits_in: str = ""
    """Collective in which the main thread waits for other ranks; empty: in none."""
    place: str = ""
    """Innermost line of this package that the main thread is at."""
    has_left: bool = False
    """It has nothing more to do and ends as it should."""

    def where(self) -> str:
        step = f" of step {self.step}" if self.step else ""
        return f"phase '{self.phase}'{step}, {self.samples or 'no sample yet'}"


def stragglers(beats: Mapping[int, Heartbeat]) -> list[int]:
    """Ranks that are behind, of a job in which nothing gets on: those that wait for nobody, or else all; of these, those
    in the earliest phase."""
    free = [rank for rank, beat in beats.items() if not beat.waits_in] or list(beats)
    earliest = min(beats[rank].num_phases for rank in free)
    return [rank for rank in free if beats[rank].num_phases == earliest]


def describe(beats: Mapping[int, Heartbeat]) -> list[str]:
    """One line for all ranks that are at the same place."""
    places: dict[str, list[int]] = defaultdict(list)
    for rank, beat in sorted(beats.items()):
        state = f"waits for other ranks ({beat.waits_in}) " if beat.waits_in else ""
        places[f"{beat.where()}, {state}at {beat.place or 'no line of this package'}"].append(rank)
    return [f"  {name_ranks(ranks)}: {place}" for place, ranks in places.items()]


def name_ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


class HealthMonitor:
    """Who died or stalled, from the beats of all ranks as they arrive.

    Args:
        limits: seconds without a sign of life in (a usual, a long) phase.
        watches_waiting: whether a beat shows that its main thread waits for others. With an accelerator it does not (the
            wait is in the device's queue), so that a stall counts only once no rank gets on.
    """

    def __init__(self, limits: tuple[float, float], watches_waiting: bool):
        self.limits, self.watches_waiting = limits, watches_waiting
        self.beats: dict[int, Heartbeat] = {}
        self._heard: dict[int, float] = {}
        self._moved: dict[int, float] = {}

    def hear(self, rank: int, beat: Heartbeat, now: float) -> None:
        known = self.beats.get(rank)
        if known is None or known.number != beat.number:
            self._heard[rank] = now
        if known is None or known.ticks != beat.ticks:
            self._moved[rank] = now
        self.beats[rank] = beat

    def skip(self, seconds: float) -> None:
        """So many seconds counted for nobody: the judge itself was held up, maybe with all ranks."""
        for times in (self._heard, self._moved):
            for rank in times:
                times[rank] += seconds

    def silent(self, now: float) -> Optional[tuple[list[int], str]]:
        """(ranks that send no beats, what to say of them), or None."""
        ranks = [rank for rank, beat in self._present() if now - self._heard[rank] > self.limits[beat.is_long]]
        if not ranks:
            return None
        seconds = now - max(self._heard[rank] for rank in ranks)
        return ranks, f"gave no sign of life for {seconds:.0f} s (stopped, or its machine is lost)"

    def stalled(self, now: float) -> Optional[tuple[list[int], str]]:
        """(ranks whose main thread keeps the others waiting, what to say of them), or None."""
        present = dict(self._present())
        ranks = [
            rank
            for rank, beat in present.items()
            if self.watches_waiting and not beat.waits_in and now - self._moved[rank] > self.limits[beat.is_long]
        ]
        if (
            not ranks
            and present
            and (
                now - max(self._moved[rank] for rank in present)
                > max(self.limits[beat.is_long] for beat in present.values())
            )
        ):
            ranks = list(present)
        if not ranks:
            return None
        ranks = stragglers({rank: present[rank] for rank in ranks})
        waiting = ", all ranks waiting for each other" if all(present[rank].waits_in for rank in ranks) else ""
        return ranks, f"did not get on for {now - max(self._moved[rank] for rank in ranks):.0f} s{waiting}"

    def _present(self) -> list[tuple[int, Heartbeat]]:
        return [(rank, beat) for rank, beat in self.beats.items() if not beat.has_left]
