"""Where this process is: phase, step, samples, and a count that grows while its main thread gets on.

The main thread writes (a phase now and then, an integer in every loop that takes long), the thread of
`runtime/watchdog.py` reads. Nothing here waits or sends, and without a watchdog nothing reads it.
"""

from contextlib import contextmanager
from typing import Callable, Iterator, Optional, Sequence


class Progress:
    """Of one process."""

    def __init__(self) -> None:
        self.ticks = 0
        """Grows with every sign of life of the main thread."""
        self.phase, self.is_long = "start-up", True
        self.num_phases = 0
        """Phases entered so far: ranks do the same ones in the same order, so it says who is behind."""
        self.step = 0
        """1-based step in work; 0 before the first."""
        self.samples: Sequence[str] = ()
        """Identities of the samples last touched."""
        self.listener: Optional[Callable[[bool], None]] = None
        """Called by the main thread when a phase begins or ends, with whether it may be long."""
        self._known: set[str] = set()

    def tick(self, samples: Optional[Sequence[str]] = None) -> None:
        """The main thread got on; `samples`: now with these."""
        self.ticks += 1
        if samples is not None:
            self.samples = samples

    @contextmanager
    def within(self, phase: str, is_long: Optional[bool] = None) -> Iterator[None]:
        """A phase, maybe inside another one.

        Args:
            is_long: it may do without a tick for long (loading, writing); None: the first phase of this name may, because
                kernels are compiled and memory is mapped then.
        """
        before = self.phase, self.is_long
        self._enter(phase, phase not in self._known if is_long is None else is_long)
        self._known.add(phase)
        yield  # not in a `finally`: after an error the phase in which it happened is what is wanted
        self._enter(*before)

    def _enter(self, phase: str, is_long: bool) -> None:
        self.ticks += 1
        self.num_phases += 1
        self.phase, self.is_long = phase, is_long
        if self.listener is not None:
            self.listener(is_long)


progress = Progress()
"""Of this process."""
tick = progress.tick
phase = progress.within
