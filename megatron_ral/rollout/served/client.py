"""Client of a sampler's server: start and end of its process, pushes of weights, requests for responses.

One rank of each copy of the model has a client and a server of its own. The server dies with this process. Nothing here
retries: a failure is an exception, and `sampler.py` decides what is done about it.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Mapping, Optional, Sequence

import numpy as np

from megatron_ral.rollout.served.channel import Channel, ChannelClosed, Message
from megatron_ral.rollout.served.errors import RequestRefused, RequestTimeout, ServerLost
from megatron_ral.rollout.served.push import WeightPush
from megatron_ral.rollout.served.request import SampledGroup, SamplingRequest

SERVER = Path(__file__).with_name("server.py")
_GRACE = 20.0
"""Seconds in which a server must take a message, or give up a request, before it is ended."""
_NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
"""Variables of the training process that mean something else in the sampler's environment."""


@dataclass(frozen=True)
class ServerProgram:
    """Program that is started as a server."""

    python: str
    """Interpreter of the sampler's environment."""
    engine: str
    """Python file with the class `Engine`, see `server.py`."""
    options: Mapping[str, Any]
    """Options of the engine, as JSON values."""
    log: Path
    """File that gets what the server prints."""
    start_seconds: float
    """Seconds within which the engine must be ready."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that the server gets beside those of this process."""


class SamplerClient:
    """Client of one server, which it starts.

    Args:
        program: What is started.
        tick: Function that is called about twice a second while this process waits.
    """

    def __init__(self, program: ServerProgram, tick: Callable[[], None] = lambda: None):
        self.program, self._tick = program, tick
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._channel: Optional[Channel] = None
        self._number = 0
        self.description: Mapping[str, Any] = {}
        """Description that the engine gives of itself: `engine` and `version` at least."""
        self.is_fresh = False
        """True while the server has the random weights that it started with."""

    @property
    def pid(self) -> int:
        """Process number of the server, 0 without one."""
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Start the server and wait until its engine is ready.

        Raises:
            ServerLost: it ended, or was not ready in time.
        """
        self.end()
        folder, token, program = tempfile.mkdtemp(prefix="sampler-"), secrets.token_hex(32), self.program
        address = f"{folder}/socket"
        try:
            program.log.parent.mkdir(parents=True, exist_ok=True)
            with program.log.open("ab") as log:
                self._process = subprocess.Popen(
                    [
                        *(program.python, str(SERVER), "--socket", address, "--engine", program.engine),
                        *("--parent", str(os.getpid()), "--options", json.dumps(dict(program.options))),
                    ],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=self._environment(),
                    start_new_session=True,  # Ctrl-C is for the run, which ends the server itself
                )
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
                pipe.write(f"{token}\n".encode())
            self._channel = self._connect(address)
            self._send("hello", token=token)
            reply = self._receive(program.start_seconds, f"was not ready after {program.start_seconds:g} s")
            self.description = {name: value for name, value in reply.header.items() if name not in ("kind", "arrays")}
            self.is_fresh = True
        except OSError as error:
            raise self._lost(f"cannot be started ({error})") from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def end(self) -> None:
        """End the server, whatever it does."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._channel = self._process = None

    # --- weights ------------------------------------------------------------------------------------------------------

    def push(self, version: int, whole: bool, bucket_bytes: int) -> WeightPush:
        """Begin a push of weights. The server samples again once it has ended.

        Args:
            version, whole, bucket_bytes: As for `WeightPush`.

        Raises:
            ServerLost, RequestRefused: the server does not take them.
        """
        self.is_fresh = False
        return WeightPush(self.ask, version, whole, bucket_bytes)

    def ask(self, kind: str, seconds: float, **fields: Any) -> Message:
        """Send a request without arrays and return its reply.

        Raises:
            ServerLost: the server ended or did not answer.
            RequestRefused: it says no.
        """
        self._send(kind, **fields)
        reply = self._receive(seconds, f"did not answer a request of kind {kind} in {seconds:g} s")
        if reply.kind == "refused":
            raise RequestRefused(reply.header["reason"])
        return reply

    # --- responses ----------------------------------------------------------------------------------------------------

    def sample(
        self,
        request: SamplingRequest,
        version: int,
        seconds: float,
        take: Callable[[int, SampledGroup], None],
        warms_up: bool = False,
    ) -> None:
        """Sample responses to all prompts of a request.

        Args:
            request: Prompts and settings.
            version: Version that the weights must have.
            seconds: Time limit of the whole request.
            take: Function that gets the number of a prompt and its responses as soon as they are there.
            warms_up: Sample with whatever weights are there, and return nothing.

        Raises:
            ServerLost: the server ended, or did not give up the request when it took too long.
            RequestTimeout: the request took too long and was given up. What finished in time was taken.
            RequestRefused: the server says no.
        """
        self._number += 1
        deadline = time.monotonic() + seconds
        self._send(
            "sample",
            [request.ids, request.grids, request.patches, request.seeds],
            seconds=max(seconds, _GRACE),
            request=self._number,
            version=version,
            warms_up=warms_up,
            sizes=[list(sizes) for sizes in request.sizes],
            **request.settings,
        )
        while True:
            message = self._next(max(deadline - time.monotonic(), 0.0))
            if message is None:
                self._abort(seconds)
            elif message.kind == "refused":
                raise RequestRefused(message.header["reason"])
            elif message.header.get("request") != self._number:
                raise self._lost(f"sent a reply of kind {message.kind} that belongs to no request")
            elif message.kind == "answer":
                header = message.header
                tokens, logprobs = message.arrays
                group = SampledGroup(tokens, logprobs, header["lengths"], header["ended"], header["version"])
                take(header["number"], group)
            elif message.kind == "done":
                return
            else:
                raise self._lost(f"sent a reply of kind {message.kind} while responses were expected")

    def _abort(self, seconds: float) -> None:
        """Give up the request under way. Raise RequestTimeout, or ServerLost where the server does not even do that."""
        self._send("abort", request=self._number)
        deadline = time.monotonic() + _GRACE
        while (left := deadline - time.monotonic()) > 0:
            message = self._next(left)
            if message is not None and message.kind == "aborted":
                raise RequestTimeout(f"took more than {seconds:g} s for a request, which was given up")
        raise self._lost(f"took more than {seconds:g} s for a request and did not give it up")

    # --- the connection -----------------------------------------------------------------------------------------------

    def _environment(self) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        return {**own, **self.program.environment}

    def _connect(self, address: str) -> Channel:
        """Return a connection to the server, which listens before it loads its engine."""
        assert self._process is not None
        deadline = time.monotonic() + 60.0
        while time.monotonic() < deadline and self._process.poll() is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(address)
                return Channel(connection, self._tick)
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                self._tick()
                time.sleep(0.02)
        raise self._lost("did not open its socket")

    def _send(self, kind: str, arrays: Sequence[np.ndarray] = (), seconds: float = _GRACE, **fields: Any) -> None:
        if self._channel is None:
            raise ServerLost("the sampler's server does not run")
        try:
            self._channel.send(kind, arrays, seconds, **fields)
        except ChannelClosed as error:
            raise self._lost(str(error)) from None

    def _next(self, seconds: float) -> Optional[Message]:
        """Return the next message, or None if none comes in time."""
        if self._channel is None:
            raise ServerLost("the sampler's server does not run")
        try:
            return self._channel.receive(seconds)
        except ChannelClosed as error:
            raise self._lost(str(error)) from None

    def _receive(self, seconds: float, otherwise: str) -> Message:
        message = self._next(seconds)
        if message is None:
            raise self._lost(otherwise)
        return message

    def _lost(self, how: str) -> ServerLost:
        """End the server, and return the error with the way it ended and the last line that it printed."""
        status: Optional[int] = None
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # a process whose connection broke is about to end
                status = self._process.wait(1.0)
        self.end()
        if status is not None:
            how += f"; it ended with status {status}" if status >= 0 else f"; signal {-status} ended it"
        last = ""
        with contextlib.suppress(OSError, IndexError):
            last = self.program.log.read_text(errors="replace").strip().splitlines()[-1][:300]
        return ServerLost(f"the sampler's server: {how}; see {self.program.log}{f' ({last})' if last else ''}")
