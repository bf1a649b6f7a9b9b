"""Decoding ahead of the consumer in a few threads, with a bound on the prompts that are held.

Threads suffice, because Pillow, PyAV, the tokenizer and torch release the interpreter's lock while they work. Results
that are not asked for are dropped, so that decoding ahead never changes a result.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Callable, Generic, Hashable, Mapping, Sequence, TypeVar

from megatron_ral.runtime.progress import tick

Place = TypeVar("Place", bound=Hashable)
Result = TypeVar("Result")
Slot = TypeVar("Slot")


class Prefetcher(Generic[Place, Result]):
    """Threads that run `decode` on places, some of them before they are asked for.

    Args:
        decode: function of a place; several threads may call it at once.
        workers: number of threads; 0: the consumer decodes each place when it asks for it.
        limit: most places that are decoded, or being decoded, ahead.
    """

    def __init__(self, decode: Callable[[Place], Result], workers: int, limit: int):
        self._decode = decode
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode") if workers else None
        self.limit = limit if workers else 0
        self._begun: dict[Hashable, Future] = {}

    def begin(self, places: Sequence[Place]) -> None:
        """Start to decode the first `limit` of these places and drop all others that were started."""
        wanted = places[: self.limit]
        for place in [place for place in self._begun if place not in wanted]:
            self._begun.pop(place).cancel()
        for place in wanted:
            if place not in self._begun:
                assert self._pool is not None  # without threads the limit is 0
                self._begun[place] = self._pool.submit(self._decode, place)

    def get(self, places: Mapping[Slot, Place]) -> dict[Slot, Result]:
        """Return the results of these places.

        Raises:
            Exception: any error of `decode`.
        """
        results = {}
        if self._pool is None:
            for slot, place in places.items():
                results[slot] = self._decode(place)
                tick()
            return results
        futures = {
            slot: self._begun.pop(place, None) or self._pool.submit(self._decode, place)
            for slot, place in places.items()
        }
        for slot, future in futures.items():
            results[slot] = future.result()
            tick()
        return results
