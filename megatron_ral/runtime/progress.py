"""Progress of this process: phase, step, samples, and a count that grows while the main thread makes progress.

The main thread writes: a phase now and then, and an integer in every loop that takes long. The thread of
`runtime/watchdog.py` reads. Nothing here waits or sends, and without a watchdog nothing reads it.
"""

from contextlib import contextmanager
from typing import Callable, Iterator, Optional, Sequence


class Progress:
    """Progress of one process."""

    def __init__(self) -> None:
        self.ticks = 0
        """Count that grows with every sign of progress of the main thread."""
        self.phase, self.is_long = "start-up", True
        self.num_phases = 0
        """Number of phases entered so far. It orders ranks, because all enter the same phases in the same order."""
        self.step = 0
        """1-based step in work, 0 before the first."""
        self.samples: Sequence[str] = ()
        """Identities of the samples last touched."""
        self.listener: Optional[Callable[[bool], None]] = None
        """Function that the main thread calls when a phase begins or ends. Its argument is `is_long` of the phase."""
        self._known: set[str] = set()

    def tick(self, samples: Optional[Sequence[str]] = None) -> None:
        """Record that the main thread made progress, and the samples it works on where they are given."""
        self.ticks += 1
        if samples is not None:
            self.samples = samples

    @contextmanager
    def within(self, phase: str, is_long: Optional[bool] = None) -> Iterator[None]:
        """Enter a phase, possibly inside another one, and return to the phase before at the end.

        Args:
            phase: name of the phase.
            is_long: whether the phase may last long without a tick (loading, writing). None for the first phase of this
                name only, in which kernels are compiled and memory is mapped.
        """
        before = self.phase, self.is_long
        self._enter(phase, phase not in self._known if is_long is None else is_long)
        self._known.add(phase)
        yield  # not in a `finally`: after an error, the report must name the phase in which it happened
        self._enter(*before)

    def _enter(self, phase: str, is_long: bool) -> None:
        self.ticks += 1
        self.num_phases += 1
        self.phase, self.is_long = phase, is_long
        if self.listener is not None:
            self.listener(is_long)


progress = Progress()
"""Progress of this process."""
tick = progress.tick
