"""Channel between two processes of two Python environments: messages of JSON and bytes over a Unix socket.

A message is 12 bytes (lengths of header and body), a JSON header, and the bytes of the arrays that the header lists.
Nothing is pickled. The file is imported by the training process and, by its path, in the sampler's environment, where
this package is not installed. It therefore imports the standard library and numpy alone.
"""

import json
import math
import select
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any, Callable, Mapping, Optional, Sequence, cast

import numpy as np

_LENGTHS = struct.Struct(">IQ")
_MOST_HEADER, _MOST_BODY = 1 << 26, 1 << 36
_ARRAY_TYPES = ("uint8", "int32", "int64", "uint64", "float32")
_PIECE = 1 << 20


class ChannelClosed(ConnectionError):
    """The other side has closed the connection, or sends what is no message."""


@dataclass(frozen=True)
class Message:
    """One message."""

    header: Mapping[str, Any]
    arrays: Sequence[np.ndarray]

    @property
    def kind(self) -> str:
        """Name of the request or reply."""
        return self.header["kind"]


class Channel:
    """One side of a connection.

    Args:
        connection: Connected socket.
        tick: Function that is called about twice a second while this side waits.
    """

    def __init__(self, connection: socket.socket, tick: Callable[[], None] = lambda: None):
        connection.setblocking(False)
        self._socket, self._tick, self._received = connection, tick, bytearray()

    def send(self, kind: str, arrays: Sequence[np.ndarray] = (), seconds: float = 60.0, **fields: Any) -> None:
        """Send a message.

        Raises:
            ChannelClosed: the other side is gone, or took too little of the message in `seconds`.
        """
        parts = [np.ascontiguousarray(array) for array in arrays]
        shapes = [[part.dtype.name, list(part.shape)] for part in parts]
        header = json.dumps({"kind": kind, "arrays": shapes, **fields}).encode()
        head = _LENGTHS.pack(len(header), sum(part.nbytes for part in parts)) + header
        deadline = time.monotonic() + seconds
        for piece in (head, *(part.reshape(-1).view(np.uint8) for part in parts if part.nbytes)):
            rest = memoryview(cast(Any, piece))
            while rest:
                if time.monotonic() > deadline:
                    raise ChannelClosed(f"nobody reads: a message of kind {kind} was not taken in {seconds:g} s")
                if select.select([], [self._socket], [], 0.5)[1]:
                    try:
                        rest = rest[self._socket.send(rest[:_PIECE]) :]
                    except BlockingIOError:
                        pass
                    except OSError as error:
                        raise ChannelClosed(f"the connection broke ({error})") from None
                else:
                    self._tick()

    def receive(self, seconds: float) -> Optional[Message]:
        """Return the next message, or None if none is complete after `seconds`.

        Raises:
            ChannelClosed: the other side is gone, or sent no message of this protocol.
        """
        deadline = time.monotonic() + seconds
        while True:
            message = self._take()
            if message is not None:
                return message
            left = deadline - time.monotonic()
            if select.select([self._socket], [], [], min(max(left, 0.0), 0.5))[0]:
                try:
                    data = self._socket.recv(_PIECE)
                except BlockingIOError:
                    continue
                except OSError as error:
                    raise ChannelClosed(f"the connection broke ({error})") from None
                if not data:
                    raise ChannelClosed("the other side has ended")
                self._received += data
            elif left <= 0:
                return None
            else:
                self._tick()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _take(self) -> Optional[Message]:
        """Return the first message of the bytes that are there. None: it is not complete."""
        if len(self._received) < _LENGTHS.size:
            return None
        header_size, body_size = _LENGTHS.unpack_from(self._received)
        if header_size > _MOST_HEADER or body_size > _MOST_BODY:
            raise ChannelClosed(f"a message of {header_size} + {body_size} bytes is none of this protocol")
        start = _LENGTHS.size + header_size
        if len(self._received) < start + body_size:
            return None
        raw = bytes(memoryview(self._received)[_LENGTHS.size : start + body_size])
        del self._received[: start + body_size]
        try:
            header = json.loads(raw[:header_size])
            arrays, place = [], header_size
            for name, shape in header["arrays"]:
                if name not in _ARRAY_TYPES or min(shape, default=0) < 0:
                    raise ValueError(f"arrays of type {name} and shape {shape}")
                count = math.prod(shape)
                arrays.append(np.frombuffer(raw, np.dtype(name), count, place).reshape(shape))
                place += arrays[-1].nbytes
            if place != len(raw) or not isinstance(header["kind"], str):
                raise ValueError("sizes that do not fit")
        except (ValueError, KeyError, TypeError) as error:
            raise ChannelClosed(f"a message cannot be read ({error})") from None
        return Message(header, arrays)
