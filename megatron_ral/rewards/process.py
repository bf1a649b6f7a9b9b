"""Functions in a process of their own, with a time limit that holds whatever they do.

A pattern that backtracks never releases Python's interpreter lock, so that no thread and no signal handler of the same
process can end it. Here the caller waits on a pipe, which releases the lock, and kills the process when the time is up.
Requests and replies are lines of JSON. Nothing is pickled.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from typing import Any, Optional

from megatron_ral.errors import ConfigError

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from megatron_ral.rewards.worker import serve; serve(*map(int, sys.argv[2:]))"
)


class CallFailed(Exception):
    """A function raised, or its process ended. The text says how."""


class CallTimeout(Exception):
    """A function did not return in time.

    Args:
        seconds: Time limit.
    """

    def __init__(self, seconds: float):
        super().__init__(f"did not return within {seconds:g} s")
        self.seconds = seconds


class FunctionProcess:
    """Process in which functions run that are found by import path. It starts with the first call.

    Args:
        memory_gib: Address space of the process in GiB; None for no limit.
    """

    def __init__(self, memory_gib: Optional[int] = None):
        self.memory_gib = memory_gib
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._owner, self._requests, self._replies, self._rest = 0, -1, -1, b""
        self._loaded: set[str] = set()
        self._lock = threading.Lock()

    def load(self, key: str, path: str) -> None:
        """Import the function at `package.module:function` there, without a time limit.

        Args:
            key: Setting that holds the path, for the error.
            path: Import path, looked for along this process's `sys.path`.

        Raises:
            ConfigError: The path is none of a function that can be called, see `functions.load_function`.
        """
        with self._lock:
            self._load(key, path)

    def call(
        self,
        path: str,
        *arguments: str,
        problem: str = "",
        seconds: Optional[float] = None,
        cpu_seconds: Optional[float] = None,
    ) -> float:
        """Return what the function at `path` returns, as a float.

        Args:
            path: Import path, see `load`.
            arguments: Arguments of the call.
            problem: Text of the question, for a function that reads it.
            seconds: Time limit of the call alone; None for no limit.
            cpu_seconds: Limit of its processor time, which does not depend on the load of the machine; None for none.

        Raises:
            CallFailed: The function raised, returned no number, or ended its process.
            CallTimeout: The time is up. The process has been killed; the next call starts another one.
        """
        with self._lock:
            self._load(path, path)
            request = {"call": path, "arguments": arguments, "problem": problem}
            request |= {"seconds": seconds, "cpu_seconds": cpu_seconds}
            reply = self._ask(request, seconds)
            if reply.get("status") == -signal.SIGPROF and cpu_seconds is not None:
                raise CallTimeout(cpu_seconds)
        if "error" in reply:
            raise CallFailed(reply["error"])
        return reply["value"]

    def _load(self, key: str, path: str) -> None:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._start()
        if path not in self._loaded:
            refused = self._ask({"load": path, "key": key, "sys_path": sys.path}, None)["refused"]
            if refused:
                raise ConfigError(key, path, refused)
            self._loaded.add(path)

    def _start(self) -> None:
        if self._owner == os.getpid():  # a forked copy must leave the pipes of its parent alone
            self._close()
        request_end, self._requests = os.pipe()
        self._replies, reply_end = os.pipe()
        arguments = [json.dumps(sys.path), str(request_end), str(reply_end), str(self.memory_gib or 0)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *arguments],
            stdin=subprocess.DEVNULL,
            pass_fds=(request_end, reply_end),
            start_new_session=True,  # a Ctrl-C is for the run, which then ends this process
        )
        os.close(request_end)
        os.close(reply_end)
        self._owner, self._rest, self._loaded = os.getpid(), b"", set()

    def _close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # with the programs that a function has started
            self._process.wait()
            os.close(self._requests)
            os.close(self._replies)
        self._process = None

    def _ask(self, request: dict[str, Any], seconds: Optional[float]) -> dict[str, Any]:
        """Return the reply to a request; {"error": ..} if the process ended instead of replying."""
        deadline = None if seconds is None else time.monotonic() + seconds
        try:
            line = json.dumps(request).encode() + b"\n"
            while line:
                line = line[os.write(self._requests, line) :]
            while b"\n" not in self._rest:
                wait = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not select.select([self._replies], [], [], wait)[0]:
                    self._close()
                    raise CallTimeout(seconds or 0.0)
                found = os.read(self._replies, 2**16)
                if not found:
                    raise BrokenPipeError
                self._rest += found
        except BrokenPipeError:
            assert self._process is not None
            status = self._process.wait()
            self._close()
            text = f"its process ended with {f'status {status}' if status >= 0 else f'signal {-status}'}"
            return {"status": status, "error": text, "refused": f"cannot be imported: {text}"}
        reply, _, self._rest = self._rest.partition(b"\n")
        return json.loads(reply)
