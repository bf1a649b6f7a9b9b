"""Small objects between all processes of a job before there are process groups: a key-value store, no device, no memory."""

import json
import os
import time
from datetime import timedelta
from typing import Any, Optional

import torch.distributed as dist


_OPEN_STORES: list[dist.Store] = []
"""Kept to the end of the process: without a launcher's agent the first rank holds the store, and the process groups meet
on the same port. A store that closed in between would reset whoever connected early."""


class RendezvousError(RuntimeError):
    """Somebody did not come."""


class Rendezvous:
    """All processes that the launcher started (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); a lone one meets itself.

    Args:
        timeout_seconds: how long anybody is waited for.

    Raises:
        RendezvousError: the first rank cannot be reached.
    """

    def __init__(self, timeout_seconds: float):
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self._timeout, self._store = timeout_seconds, None
        if self.world_size == 1:
            return
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        try:
            store, _, _ = next(
                dist.rendezvous("env://", self.rank, self.world_size, timeout=timedelta(seconds=timeout_seconds))
            )
        except (RuntimeError, ValueError) as error:  # c10d's errors are both
            raise RendezvousError(
                f"MASTER_ADDR:MASTER_PORT = {where} cannot be used for a meeting of {self.world_size} ranks "
                f"({' '.join(str(error).split())[:200]}); is the port free, and open between the nodes?"
            ) from None
        _OPEN_STORES.append(store)
        self._store = dist.PrefixStore("meeting", store)

    def gather(self, name: str, value: Any) -> Optional[list[Any]]:
        """Every rank's value (JSON), in rank order, on the first rank; None on the others. A name is used once.

        Raises:
            RendezvousError: naming the ranks that did not come in time (first rank only).
        """
        if self._store is None:
            return [value]
        self._store.set(f"{name}/{self.rank}", json.dumps(value))
        if self.rank:
            return None
        deadline = time.monotonic() + self._timeout
        missing = [
            rank
            for rank in range(self.world_size)
            if not self._wait(f"{name}/{rank}", max(deadline - time.monotonic(), 0.01))
        ]
        if missing:
            raise RendezvousError(
                f"ranks {missing} of {self.world_size} did not report within {self._timeout:g} s (at '{name}')"
            )
        return [json.loads(self._store.get(f"{name}/{rank}")) for rank in range(self.world_size)]

    def announce(self, name: str, value: Any = None) -> Any:
        """The first rank's value (JSON) on every rank.

        Raises:
            RendezvousError: the first rank did not announce it in time.
        """
        if self._store is None:
            return value
        if self.rank == 0:
            self._store.set(name, json.dumps(value))
            return value
        if not self._wait(name, 2 * self._timeout):
            raise RendezvousError(f"rank 0 did not announce '{name}' within {2 * self._timeout:g} s")
        return json.loads(self._store.get(name))

    def _wait(self, key: str, seconds: float) -> bool:
        try:
            self._store.wait([key], timedelta(seconds=seconds))
        except dist.DistStoreError:  # the time is up
            return False
        except RuntimeError as error:
            raise RendezvousError(
                f"the connection to MASTER_ADDR:MASTER_PORT was lost while waiting for '{key}' "
                f"({' '.join(str(error).split())[:200]}); did the first rank or the launcher end?"
            ) from None
        return True
