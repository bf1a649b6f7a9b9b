"""The other end of `process.FunctionProcess`: reads requests from a pipe, calls functions, writes replies."""

import hashlib
import json
import os
import random
import resource
import signal
import sys
from typing import Any, Callable

from megatron_ral.errors import ConfigError
from megatron_ral.rewards.functions import QUESTION, load_function, reads_question

GRACE = 5.0
"""Seconds behind the caller's limit after which a process ends itself whose caller has died."""


def serve(request_end: int, reply_end: int, memory_gib: int) -> None:
    """Answer requests until the pipe is closed.

    Args:
        request_end: File descriptor with lines of JSON: {"load", "key", "sys_path"} or {"call", "arguments",
            "problem", "seconds", "cpu_seconds"}.
        reply_end: File descriptor for the replies: {"refused"}, {"value"} or {"error"}.
        memory_gib: Address space in GiB; 0 for no limit.
    """
    if memory_gib:
        resource.setrlimit(resource.RLIMIT_AS, (memory_gib * 2**30, memory_gib * 2**30))
    caller = os.getppid()

    def pass_on(number: int, frame: object) -> None:
        if os.getppid() == caller:
            os.kill(caller, number)

    for asks_to_stop in (signal.SIGTERM, signal.SIGUSR1):  # for the run, which needs rewards until its step is done
        signal.signal(asks_to_stop, pass_on)
    os.set_inheritable(request_end, False)
    os.set_inheritable(reply_end, False)
    functions: dict[str, tuple[Callable[..., Any], bool]] = {}  # with their answer to `reads_question`
    with open(request_end, "rb") as requests, open(reply_end, "wb", buffering=0) as replies:
        for line in requests:
            request = json.loads(line)
            reply = _load(functions, request) if "load" in request else _call(functions, request)
            try:
                replies.write(json.dumps(reply).encode() + b"\n")
            except BrokenPipeError:
                return


def _load(functions: dict[str, tuple[Callable[..., Any], bool]], request: dict[str, Any]) -> dict[str, Any]:
    sys.path[:] = request["sys_path"]
    try:
        function = load_function(request["key"], request["load"])
        functions[request["load"]] = function, reads_question(function)
    except ConfigError as error:
        return {"refused": error.remedy}
    return {"refused": ""}


def _call(functions: dict[str, tuple[Callable[..., Any], bool]], request: dict[str, Any]) -> dict[str, Any]:
    _seed(request["call"], *request["arguments"])
    seconds = request["seconds"]
    if seconds is not None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel ends the process, whoever holds the interpreter
        signal.setitimer(signal.ITIMER_REAL, seconds + GRACE)
    if request["cpu_seconds"] is not None:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, request["cpu_seconds"])
    try:
        function, is_asked = functions[request["call"]]
        question = {QUESTION: request["problem"]} if is_asked else {}
        return {"value": float(function(*request["arguments"], **question))}
    except (Exception, SystemExit) as error:  # no failure of a reward function may end the run
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    finally:
        if seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if request["cpu_seconds"] is not None:
            signal.setitimer(signal.ITIMER_PROF, 0)


def _seed(*texts: str) -> None:
    """Seed the generators of random numbers by the call, so that a resumed run draws what it would have drawn."""
    seed = int.from_bytes(hashlib.blake2b(json.dumps(texts).encode(), digest_size=4).digest(), "little")
    random.seed(seed)
    for module, name in (("numpy", "random.seed"), ("torch", "manual_seed")):
        if module in sys.modules:
            function: Any = sys.modules[module]
            for part in name.split("."):
                function = getattr(function, part)
            function(seed)
