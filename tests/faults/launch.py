"""Launch of `megatron_ral.train` on a few ranks, forked from a server that has imported everything."""

import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping, Optional, Sequence

import torch

from tests.distributed import runner
from tests.faults.doom import await_doom


@dataclass(frozen=True)
class Ended:
    """End of a job."""

    codes: list[int]
    """Exit status of every rank; a negative one is the signal that killed it."""
    output: list[str]
    """Standard output and error of every rank."""
    seconds: float
    """Seconds from the failure to the end of the last rank."""


def _entry(
    rank: int, world_size: int, port: int, folder: str, module: str, arguments: Sequence[str], doom: Optional[dict]
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
    )
    torch.set_num_threads(1)
    file = os.open(f"{folder}/rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if doom is not None:
        await_doom(rank, doom)
    sys.argv = [module, *arguments]
    status = importlib.import_module(module).main()
    sys.stdout.flush()
    os._exit(status)


def run_job(
    world_size: int,
    folder: Path,
    arguments: Sequence[str],
    doom: Optional[dict] = None,
    module: str = "megatron_ral.train",
    timeout: float = 120.0,
) -> Ended:
    """Run a job until all ranks have ended. No launcher ends the other ranks when one has died."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    note = folder / "note.json"
    doom = None if doom is None else {**doom, "note": str(note)}
    processes = [
        runner._server().Process(target=_entry, args=(rank, world_size, port, str(folder), module, arguments, doom))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    deadline, met = time.monotonic() + timeout, None
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if met is None and note.exists():
            met = time.monotonic()
        time.sleep(0.02)
    ended = time.monotonic()
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in hung:
        os.kill(processes[rank].pid, signal.SIGKILL)
    for process in processes:
        process.join()
    output = [(folder / f"rank_{rank}.log").read_text() for rank in range(world_size)]
    assert not hung, f"ranks {hung} hung:\n" + "\n".join(output)
    return Ended([process.exitcode for process in processes], output, ended - (met or ended))


def _command_entry(folder: str, environment: Mapping[str, str], module: str, arguments: Sequence[str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    sys.argv = [module, *arguments]
    importlib.import_module(module).main()
    sys.stdout.flush()
    os._exit(0)


def run_command(
    module: str, *arguments: str, environment: Mapping[str, str], timeout: float = 120.0
) -> subprocess.CompletedProcess:
    """Run what `python -m MODULE ARGUMENT ...` runs, in a process of the server, which has the imports behind it."""
    with tempfile.TemporaryDirectory() as folder:
        process = runner._server().Process(target=_command_entry, args=(folder, environment, module, arguments))
        process.start()
        process.join(timeout)
        hung = process.is_alive()
        if hung:
            process.kill()
            process.join()
        stdout, stderr = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
        assert not hung, f"{module} hung:\n{stdout}{stderr}"
        return subprocess.CompletedProcess([module, *arguments], process.exitcode, stdout, stderr)
