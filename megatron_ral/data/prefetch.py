"""Decoding ahead of the consumer in a few threads, at most so many prompts at a time.

Threads suffice: Pillow, PyAV, the tokenizer and torch let go of the interpreter while they work. What was begun for
nothing is thrown away, so that looking ahead never changes a result.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Callable, Hashable, Mapping, Sequence, TypeVar

from megatron_ral.runtime.progress import tick

Place = TypeVar("Place", bound=Hashable)
Result = TypeVar("Result")
Slot = TypeVar("Slot")


class Prefetcher:
    """Runs `decode` on places, some of them before they are asked for.

    Args:
        decode: what to run; may be called from several threads at once.
        workers: threads; 0: everything is decoded when it is asked for, by the consumer.
        limit: most places that are held decoded or being decoded ahead.
    """

    def __init__(self, decode: Callable[[Place], Result], workers: int, limit: int):
        self._decode = decode
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode") if workers else None
        self.limit = limit if workers else 0
        self._begun: dict[Hashable, Future] = {}

    def begin(self, places: Sequence[Place]) -> None:
        """Start on the first `limit` of these places; whatever else was begun is dropped."""
        wanted = places[: self.limit]
        for place in [place for place in self._begun if place not in wanted]:
            self._begun.pop(place).cancel()
        for place in wanted:
            if place not in self._begun:
                self._begun[place] = self._pool.submit(self._decode, place)

    def get(self, places: Mapping[Slot, Place]) -> dict[Slot, Result]:
        """Results of these places. Raises what `decode` raises."""
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
