# As torch.distributed lists no exports:
# pyright: reportPrivateImportUsage=false
"""Exchange of small objects between all processes of a job before process groups exist.

It uses a key-value store only: no device and no memory of the model.
"""

import json
import os
import time
from datetime import timedelta
from typing import Any, Optional

import torch.distributed as dist

from megatron_ral.errors import UserError

_ADDRESS = "MASTER_ADDR:MASTER_PORT"
_OPEN_STORES: list[dist.Store] = []
"""Stores that stay open to the end of the process. Without a launcher's agent the first rank hosts the store, and the
process groups connect to the same port later. A store that closed in between would reset the ranks that connected
early."""


class RendezvousError(UserError):
    """A rank that cannot be reached, or that did not answer in time."""


class Rendezvous:
    """Meeting point of all processes that the launcher started (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    A job of one process needs no store and no address.

    Args:
        timeout_seconds: limit of every wait for other ranks.

    Raises:
        RendezvousError: the first rank cannot be reached.
    """

    def __init__(self, timeout_seconds: float):
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self._timeout = timeout_seconds
        self._store: Optional[dist.Store] = None
        if self.world_size == 1:
            return
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        try:
            store, _, _ = next(
                dist.rendezvous("env://", self.rank, self.world_size, timeout=timedelta(seconds=timeout_seconds))
            )
        except (RuntimeError, ValueError) as error:  # errors of c10d are one or the other
            raise RendezvousError(
                _ADDRESS,
                where,
                f"cannot be used for a rendezvous of {self.world_size} ranks ({' '.join(str(error).split())[:200]}); "
                "is the port free, and open between the nodes?",
            ) from None
        _OPEN_STORES.append(store)
        self._store = dist.PrefixStore("rendezvous", store)

    def gather(self, name: str, value: Any) -> Optional[list[Any]]:
        """Return every rank's value in rank order on the first rank, and None on the others.

        Args:
            name: name of the exchange, used once per rendezvous.
            value: this rank's value, as JSON.

        Raises:
            RendezvousError: some ranks did not report in time. Raised on the first rank, with their numbers.
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
            if not self._wait(self._store, f"{name}/{rank}", max(deadline - time.monotonic(), 0.01))
        ]
        if missing:
            raise RendezvousError(
                f"ranks {missing} of {self.world_size}",
                None,
                f"did not report within {self._timeout:g} s (at '{name}'); look at their logs for an earlier error",
            )
        return [json.loads(self._store.get(f"{name}/{rank}")) for rank in range(self.world_size)]

    def announce(self, name: str, value: Any = None) -> Any:
        """Return the first rank's value (JSON) on every rank.

        Raises:
            RendezvousError: the first rank did not announce it in time.
        """
        if self._store is None:
            return value
        if self.rank == 0:
            self._store.set(name, json.dumps(value))
            return value
        if not self._wait(self._store, name, 2 * self._timeout):
            raise RendezvousError(
                "rank 0",
                None,
                f"did not announce '{name}' within {2 * self._timeout:g} s; look at its log for an earlier error",
            )
        return json.loads(self._store.get(name))

    @staticmethod
    def _wait(store: dist.Store, key: str, seconds: float) -> bool:
        try:
            store.wait([key], timedelta(seconds=seconds))
        except dist.DistStoreError:  # the time limit
            return False
        except RuntimeError as error:
            raise RendezvousError(
                f"the connection to {_ADDRESS}",
                None,
                f"was lost while waiting for '{key}' ({' '.join(str(error).split())[:200]}); did the first rank or the "
                "launcher end?",
            ) from None
        return True
