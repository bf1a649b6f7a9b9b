"""Push of weights to a sampler's server, through memory that both processes share, a bucket at a time."""

import contextlib
import mmap
import os
import shutil
import tempfile
import zlib
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from megatron_ral.rollout.served.channel import Message
from megatron_ral.rollout.served.errors import RequestRefused

_SHARED_MEMORY = "/dev/shm"
_ALIGNMENT = 64
_SECONDS, _BYTES_PER_SECOND = 60.0, 1e7
"""Time that a server has for a request, beside that for reading its bytes at this rate."""


class WeightPush:
    """Push of weights.

    Args:
        ask: Function that sends a request (kind, seconds, fields) and returns its reply, see `SamplerClient.ask`.
        version: Number of the new weights.
        whole: True if every weight is pushed.
        bucket_bytes: Bytes that are handed over at a time. A larger tensor gets a bucket of its own.

    Raises:
        ServerLost, RequestRefused: the server does not take weights, here and in every method.
    """

    def __init__(self, ask: Callable[..., Message], version: int, whole: bool, bucket_bytes: int):
        self._ask, self._tensors, self._used = ask, list[list[Any]](), 0
        self._num_tensors = self._num_bytes = self._size = 0
        self._map: Optional[mmap.mmap] = None
        roomy = os.path.isdir(_SHARED_MEMORY) and shutil.disk_usage(_SHARED_MEMORY).free > 2 * bucket_bytes
        descriptor, path = tempfile.mkstemp(prefix="sampler-", dir=_SHARED_MEMORY if roomy else None)
        self._file = os.fdopen(descriptor, "r+b")
        try:
            self._grow(bucket_bytes)
            ask("push_begin", _SECONDS, version=version, whole=whole, memory=path)
        except BaseException:
            self.close()
            raise
        finally:
            os.unlink(path)  # both processes hold it open, and it ends with them

    def add(self, name: str, value: Tensor) -> None:
        """Add a tensor. It may change when this returns."""
        size = value.numel() * value.element_size()
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if self._tensors and start + size > self._size:
            self.flush()
            start = 0
        if start + size > self._size:
            self._grow(start + size)
        assert self._map is not None
        place = torch.frombuffer(self._map, dtype=torch.uint8, count=size, offset=start)
        place.copy_(value.detach().contiguous().reshape(-1).view(torch.uint8))
        with memoryview(self._map)[start : start + size] as view:
            checksum = zlib.crc32(view)
        dtype = str(value.dtype).removeprefix("torch.")
        self._tensors.append([name, dtype, list(value.shape), start, size, checksum])
        self._used = start + size
        self._num_tensors += 1
        self._num_bytes += size

    def flush(self) -> None:
        """Hand over the tensors of the bucket, and wait until the server has read them."""
        if self._tensors:
            self._ask("bucket", _SECONDS + self._size / _BYTES_PER_SECOND, size=self._size, tensors=self._tensors)
        self._tensors, self._used = [], 0

    def finish(self) -> int:
        """Hand over the rest, and return the version that the server then has."""
        try:
            self.flush()
            seconds = _SECONDS + self._num_bytes / _BYTES_PER_SECOND
            reply = self._ask("push_end", seconds, num_tensors=self._num_tensors, num_bytes=self._num_bytes)
            return int(reply.header["version"])
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the memory."""
        self._unmap()
        self._file.close()

    def _grow(self, size: int) -> None:
        self._unmap()
        try:
            os.posix_fallocate(self._file.fileno(), 0, size)  # a file that only seems to be there ends the process
        except OSError as error:
            raise RequestRefused(f"there is no room for a bucket of {size} bytes of weights ({error})") from None
        self._map, self._size = mmap.mmap(self._file.fileno(), size), size

    def _unmap(self) -> None:
        if self._map is not None:
            with contextlib.suppress(BufferError):  # a tensor over it is alive; it ends with that
                self._map.close()
        self._map = None
