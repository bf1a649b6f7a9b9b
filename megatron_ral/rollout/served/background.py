"""Requests that a server answers while the policy is trained: a thread sends them and reads the answers."""

import threading
import time
from typing import Callable, Optional, Sequence

from megatron_ral.rollout.served.request import SampledGroup, SamplingRequest

AskServer = Callable[[SamplingRequest, dict[int, SampledGroup]], None]
"""Function that sends a request and adds the answers, by number of the prompt, as they come."""


class BackgroundRequests:
    """Requests of one rollout, sent one after the other.

    A thread reads the answers, because a server ends when nobody takes what it sends. It stops at the first failure:
    what can be done about one is for the main thread, because the other ranks of the copy take part in it.

    Args:
        names: Identities of the prompts of each request.
        requests: Requests. Empty on the ranks without a client, where nothing is started.
        ask: Function that the thread calls for each request.
    """

    def __init__(self, names: Sequence[tuple[str, ...]], requests: Sequence[SamplingRequest], ask: AskServer):
        self._names, self._num_collected = list(names), 0
        self._answers: list[dict[int, SampledGroup]] = [{} for _ in requests]
        self._is_over = [threading.Event() for _ in requests]
        self._error: Optional[Exception] = None
        self._started, self._ended = time.perf_counter(), 0.0
        self._thread = threading.Thread(target=self._run, args=(requests, ask), daemon=True, name="sampler")
        if requests:
            self._thread.start()

    @property
    def seconds(self) -> float:
        """Seconds for which the thread has worked so far. 0 without one."""
        return (self._ended or time.perf_counter()) - self._started if self._is_over else 0.0

    @property
    def is_running(self) -> bool:
        """True while the server may be at a request."""
        return self._thread.is_alive()

    @property
    def is_collected(self) -> bool:
        """True after the last call of `collect`. It is the same on every rank of the copy."""
        return self._num_collected == len(self._names)

    def next(self, names: tuple[str, ...]) -> int:
        """Return the number of the request for the given prompts, which has to be the next one. Every rank calls it."""
        number = self._num_collected
        assert self._names[number] == names, "asked for other prompts than were begun"
        self._num_collected += 1
        return number

    def collect(self, number: int, groups: dict[int, SampledGroup], tick: Callable[[], None]) -> None:
        """Wait until a request is over, and add the answers that came. There are none after an earlier failure.

        Args:
            number: Result of `next`.
            groups: Mapping that gets the responses by number of the prompt.
            tick: Function that is called about twice a second while this thread waits.

        Raises:
            Exception: The failure that stopped the thread, once.
        """
        while not self._is_over[number].wait(0.5):
            tick()
        groups.update(self._answers[number])
        if self._error is not None or number == len(self._names) - 1:
            self._thread.join()  # it is about to end, and the next user of the connection is the caller
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, requests: Sequence[SamplingRequest], ask: AskServer) -> None:
        try:
            for request, groups, is_over in zip(requests, self._answers, self._is_over):
                ask(request, groups)
                is_over.set()
        except Exception as error:
            self._error = error
        finally:
            self._ended = time.perf_counter()
            for is_over in self._is_over:
                is_over.set()
