"""Run a function in N real processes over gloo and collect what each returns.

Processes are forked from a server that has imported torch, megatron-core and DeepSpeed once, so that a launch of eight
costs a second, not a minute. A rank that raises ends the test with its traceback; a rank that hangs ends it after the
timeout.
"""

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, Callable

import torch

_context = None
PRELOAD = ["torch", "deepspeed", "megatron.core", "megatron_ral.training.trainer", "transformers.models.qwen2_5_vl"]


def _server():
    global _context
    if _context is None:
        _context = multiprocessing.get_context("forkserver")
        _context.set_forkserver_preload(PRELOAD)
    return _context


def _entry(rank: int, world_size: int, port: int, folder: str, function: Callable, arguments: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    try:
        result = function(*arguments)
        torch.save(result, f"{folder}/{rank}.result")
    except BaseException:
        Path(f"{folder}/{rank}.error").write_text(traceback.format_exc())
    finally:
        os._exit(0)


def run_ranks(world_size: int, function: Callable, *arguments: Any, timeout: float = 420.0) -> list[Any]:
    """Results of function(*arguments) on ranks 0..world_size-1. The function must be importable (top level)."""
    for _ in range(2):
        try:
            return _run_ranks(world_size, function, arguments, timeout)
        except AssertionError as error:
            if "EADDRINUSE" not in str(error):  # another process took the port before the first rank did
                raise
    return _run_ranks(world_size, function, arguments, timeout)


def _run_ranks(world_size: int, function: Callable, arguments: tuple, timeout: float) -> list[Any]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    context = _server()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_entry, args=(rank, world_size, port, folder, function, arguments))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0.1))
        hung = [process.pid for process in processes if process.is_alive()]
        for process in processes:
            if process.is_alive():
                process.kill()
        errors = {path.stem: path.read_text() for path in sorted(Path(folder).glob("*.error"))}
        assert not errors, "\n".join(f"rank {rank}:\n{text}" for rank, text in errors.items())
        assert not hung, f"{len(hung)} of {world_size} ranks hung for {timeout} s"
        codes = [process.exitcode for process in processes]
        assert not any(codes), f"exit codes {codes}"
        return [torch.load(f"{folder}/{rank}.result", weights_only=False) for rank in range(world_size)]
