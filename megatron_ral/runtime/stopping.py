"""Ending a run before its last step: by a signal or a time limit, at the next step boundary, all ranks alike."""

import signal
import time
from typing import Optional

from megatron_ral.parallel.collectives import largest_of_all
from megatron_ral.parallel.process_groups import ProcessGroups

_SIGNALS = {signal.SIGUSR1: 2, signal.SIGTERM: 3}


class StopRequests:
    """What asks this process to end.

    A signal may reach one rank only (Slurm sends SIGUSR1 before a time limit with `--signal`, to some or all of its tasks;
    torchrun sends SIGTERM to its workers, and kills them 30 s later): `agreed` tells all. A rank whose peer died gets
    SIGTERM from torchrun as well; it never comes to an agreement then, and the watchdog ends it.

    Args:
        time_limit_minutes: 0: none.
        started: time.monotonic() from which it counts; None: now.
    """

    def __init__(self, time_limit_minutes: float = 0.0, started: Optional[float] = None):
        self._limit, self._asked = time_limit_minutes, 0
        self._started = time.monotonic() if started is None else started

    def listen(self) -> None:
        """From now on SIGTERM and SIGUSR1 only ask. Main thread only."""
        for number in _SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self._asked = max(self._asked, _SIGNALS[signal.Signals(number)])

    def agreed(self, process_groups: ProcessGroups) -> Optional[str]:
        """Why the run has to end, or None: the same on every rank, which all call it at the end of each step."""
        late = bool(self._limit) and time.monotonic() - self._started >= 60.0 * self._limit
        reason = largest_of_all(max(self._asked, int(late)), process_groups)
        return {
            0: None,
            1: f"train.time_limit_minutes = {self._limit:g} have passed",
            2: "SIGUSR1 was received",
            3: "SIGTERM was received",
        }[reason]
