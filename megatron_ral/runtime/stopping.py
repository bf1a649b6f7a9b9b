"""Requests to end a run before its last step, by a signal or a time limit, at the next step boundary on all ranks."""

import signal
import time
from typing import Optional

from megatron_ral.parallel.collectives import largest_of_all
from megatron_ral.parallel.process_groups import ProcessGroups

_SIGNALS = {signal.SIGUSR1: 2, signal.SIGTERM: 3}


class StopRequests:
    """Requests that ask this process to end.

    A signal may reach one rank only, so `agreed` tells all ranks. Slurm sends SIGUSR1 before a time limit with
    `--signal`, to some or all of its tasks. torchrun sends SIGTERM to its workers and kills them 30 s later. A rank
    whose peer died also gets SIGTERM from torchrun. It never reaches an agreement then, and the watchdog ends it.

    Args:
        time_limit_minutes: minutes after which the run ends; 0 for no limit.
        started: start of the time limit by time.monotonic(); None for now.
    """

    def __init__(self, time_limit_minutes: float = 0.0, started: Optional[float] = None):
        self._limit, self._asked = time_limit_minutes, 0
        self._started = time.monotonic() if started is None else started

    def listen(self) -> None:
        """Turn SIGTERM and SIGUSR1 into requests from now on. Main thread only."""
        for number in _SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self._asked = max(self._asked, _SIGNALS[signal.Signals(number)])

    def agreed(self, process_groups: ProcessGroups) -> Optional[str]:
        """Return the reason for which the run has to end, or None. Every rank calls it at the end of each step.

        Returns:
            The same text on every rank.
        """
        late = bool(self._limit) and time.monotonic() - self._started >= 60.0 * self._limit
        reason = largest_of_all(max(self._asked, int(late)), process_groups)
        return {
            0: None,
            1: f"train.time_limit_minutes = {self._limit:g} have passed",
            2: "SIGUSR1 was received",
            3: "SIGTERM was received",
        }[reason]
