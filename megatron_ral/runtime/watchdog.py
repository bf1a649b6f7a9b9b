# As torch.distributed lists no exports:
# pyright: reportPrivateImportUsage=false
"""Watchdog: a rank that dies or stalls ends the whole job, with a message that names rank, place and samples.

A thread of every rank sends heartbeats (phase, step, samples and ticks of `progress.py`) through a key-value store of
its own, which the first rank hosts. The store is separate because the main thread may be stuck in a collective.

- Ranks of one machine check each other's processes, so that a death is noticed within a second.
- The first rank judges the heartbeats of all ranks. No heartbeat for too long means a stopped rank or a lost machine.
  Heartbeats whose ticks do not grow mean a stalled main thread. Waiting in a collective for another rank is no stall,
  so that the stragglers are named: ranks that do not wait, in the earliest phase.
- All other ranks watch the first rank, because the store ends with it.

The rank that finds a failure writes a verdict into the store. The verdict is printed by that rank, by the first rank
and by the first rank that has not failed. Every rank's thread then ends its process, wherever the main thread is stuck.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import CodeType
from typing import Mapping, NoReturn, Optional, Sequence

import torch.distributed as dist

from megatron_ral.parallel.collectives import from_first_rank_of_all, gather_from_all
from megatron_ral.runtime.heartbeat import HealthMonitor, Heartbeat, describe, name_ranks
from megatron_ral.runtime.progress import Progress, progress

EXIT_STATUS = 3
"""Exit status of a rank that ended because of another one."""
_VERDICT = "verdict"
_WAITS_IN = ("torch/distributed/", "deepspeed/comm/", "pipeline_parallel/p2p_communication.py", "parallel/exchange.py")
"""Files whose code waits for other ranks where it is innermost on the stack."""
_WRAPPER = "deepspeed/utils/nvtx.py"
"""File of DeepSpeed's wrapper around calls. Where it is innermost, it called compiled code for the frame above it."""
_PACKAGE = str(Path(__file__).parents[1]) + os.sep


@dataclass(frozen=True)
class Process:
    """Identity of a rank's process on its machine."""

    pid: int
    """Process number."""
    started: str
    """Start time in ticks of the machine's clock. It tells a reused process number from the same process."""
    machine: str
    """Identity of the machine and of its process namespace."""
    name: str
    """Name of the machine for people."""

    @classmethod
    def own(cls) -> "Process":
        """Return the identity of this process."""
        boot = Path("/proc/sys/kernel/random/boot_id")
        machine = boot.read_text().strip() if boot.exists() else socket.gethostname()
        namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
        return cls(os.getpid(), _process_state(os.getpid())[1], f"{machine} {namespace}", socket.gethostname())

    def is_gone(self) -> bool:
        """Return whether the process has ended. Valid only for a process of the same machine."""
        state, started = _process_state(self.pid)
        return state in ("", "Z", "X") or started != self.started


def _process_state(pid: int) -> tuple[str, str]:
    """Return (state letter, start time) of a process; the letter is empty where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def main_thread_place() -> tuple[str, str]:
    """Return (collective in which the main thread waits or empty, innermost line of this package on its stack).

    The innermost Python code decides whether it waits. A signal handler, for instance, that was called inside a
    collective is no wait.
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_code.co_filename.endswith(_WRAPPER):
        frame = frame.f_back
    waits = frame is not None and _waits_for_ranks(frame.f_code)
    waits_in = place = ""
    while frame is not None and not place:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if waits and _waits_for_ranks(frame.f_code):
            waits_in = name if waits_in in ("", "wrapper", "wait") else waits_in
        if file.startswith(_PACKAGE):
            place = f"{file.removeprefix(_PACKAGE)}:{frame.f_lineno} in {name}"
        frame = frame.f_back
    return waits_in, place


def _waits_for_ranks(code: CodeType) -> bool:
    if code.co_filename == threading.__file__:  # waits for a thread of this process
        return False
    return code.co_name == "wait" or any(part in code.co_filename for part in _WAITS_IN)


def comes_from_a_collective(error: BaseException) -> bool:
    """Return whether an exception was raised where ranks wait for each other, so that another rank may be its cause."""
    frames = traceback.extract_tb(error.__traceback__)
    names_transport = isinstance(error, RuntimeError) and any(
        word in str(error).lower() for word in ("gloo", "nccl", "connection")
    )
    return (
        isinstance(error, dist.DistError)
        or names_transport
        or any(frame.name == "wait" or any(part in frame.filename for part in _WAITS_IN) for frame in frames[-6:])
    )


class Watchdog:
    """Watchdog of one rank. Every rank constructs it at the same place, after the process groups exist.

    Args:
        rank, world_size: this rank's number, and the number of ranks.
        timeout: seconds within which a dead or stalled rank has ended the job; 0 switches the watchdog off.
        long_timeout: the same limit for phases that may last long without progress.
        watches_waiting: see `HealthMonitor`.
        log: file to which the message is appended; None for standard error only.
        source: progress of this rank.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout: float,
        long_timeout: float,
        watches_waiting: bool,
        log: Optional[Path] = None,
        source: Progress = progress,
    ):
        self.rank, self.world_size, self.log, self.source = rank, world_size, log, source
        self.timeout, self.interval = timeout, min(1.0, timeout / 10)
        self._thread: Optional[threading.Thread] = None
        self._server: Optional[dist.TCPStore] = None
        if not timeout:
            return
        # Judged a little early, so that the job has ended when the time is up.
        limits = (0.9 * timeout - self.interval, max(0.9 * long_timeout, 0.9 * timeout) - self.interval)
        self._monitor = HealthMonitor(limits, watches_waiting)
        self._wake, self._sent_phases = threading.Event(), 0
        self._leaving, self._own_end, self._heartbeat = False, "", Heartbeat()
        wait = timedelta(seconds=max(limits[0], 30.0))  # limit of connecting only: see _guard
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")

        def serve() -> int:
            server = self._server = dist.TCPStore(host, 0, None, True, wait, wait_for_workers=False)
            server.set(_VERDICT, "")
            return server.port

        port = from_first_rank_of_all(serve)
        self._store = dist.TCPStore(host, port, None, False, wait)
        self._processes: list[Process] = gather_from_all(Process.own())
        own = self._processes[rank]
        self._neighbours = [
            other for other, process in enumerate(self._processes) if other != rank and process.machine == own.machine
        ]
        self._send()
        gather_from_all(None)  # from here on, every rank has sent a heartbeat
        source.listener = self._phase_changed
        self._rounds = 0
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()
        if rank != 0:
            threading.Thread(target=self._guard, name="watchdog of the store", daemon=True).start()

    # ---- called by the main thread ----------------------------------------------------------------------------------

    def leave(self) -> None:
        """Announce that this rank ends normally. The first rank waits a little for the others."""
        if self._thread is None:
            return
        self._leaving = True
        self._wake.set()
        self._thread.join(max(10.0, 2 * self.interval))
        self.source.listener = None

    def end_with(self, error: BaseException) -> NoReturn:
        """End the process because of an error.

        Where another rank is the cause, the watchdog's verdict ends the process. Otherwise the error is printed, and
        the other ranks end because of it.
        """
        if self._thread is not None and comes_from_a_collective(error):
            self._thread.join(self.timeout)  # the thread ends the process where it finds a cause
        sys.stdout.flush()
        traceback.print_exception(error, file=sys.stderr)
        sys.stderr.flush()
        self.announce(f"ended with {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        os._exit(1)

    def announce(self, reason: str) -> None:
        """Tell the other ranks that this rank ends by an error that it has printed, so that they end too."""
        if self._thread is None:
            return
        self._own_end = reason
        self._wake.set()
        self._thread.join(max(10.0, 2 * self.interval))

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _phase_changed(self, is_long: bool) -> None:
        self._wake.set()
        deadline = time.monotonic() + 1.0
        # A long phase may hold the interpreter lock. The other ranks must know of the phase before it begins.
        while is_long and self._sent_phases < self.source.num_phases and time.monotonic() < deadline:
            time.sleep(0.002)

    def _run(self) -> None:
        checked, round_began = 0.0, time.monotonic()
        try:
            while True:
                self._wake.wait(self.interval / 4)
                self._wake.clear()
                seconds, round_began = time.monotonic() - round_began, time.monotonic()
                if seconds > 0.5 * self.timeout:  # the whole job was suspended: no rank has failed
                    self._monitor.exclude(seconds)
                self._send()
                if self.rank != 0:  # remembered, because the store may end with the first rank
                    self._monitor.record(0, self._read([0])[0], time.monotonic())
                self._rounds += 1
                if self._leaving:
                    return self._wait_for_others_to_leave()
                if self._own_end:
                    self._post([self.rank], self._own_end, printed=True)
                    return self._wait_until_seen([self.rank])
                if time.monotonic() - checked >= self.interval:
                    self._check()
                    checked = time.monotonic()
                time.sleep(0.005)  # phases may change often
        except dist.DistError as error:
            if not self._leaving and not self._own_end:
                self._store_lost(" ".join(str(error).split())[:200])

    def _guard(self) -> None:
        """End the process if no round of the thread ends any more.

        A client of a stopped store waits for ever, whatever its timeout. Checks are counted instead of seconds, because
        seconds also pass while the whole process is suspended.
        """
        checks, rounds = 0, -1
        while self._thread is not None and self._thread.is_alive():
            checks, rounds = (0 if self._rounds != rounds else checks + 1), self._rounds
            if checks * self.interval > 0.75 * self.timeout:
                self._store_lost(f"no answer for {checks * self.interval:.0f} s")
            time.sleep(self.interval)

    def _send(self) -> None:
        source, (waits_in, place) = self.source, main_thread_place()
        names = list(source.samples[-2:])
        more = f" and {len(source.samples) - len(names)} before" if len(source.samples) > len(names) else ""
        samples = f"last sample{'s' if len(names) > 1 else ''} {', '.join(names)}{more}" if names else ""
        self._heartbeat = Heartbeat(
            self._heartbeat.number + 1,
            source.ticks,
            source.phase,
            source.is_long,
            source.num_phases,
            source.step,
            samples,
            waits_in,
            place,
            self._leaving,
        )
        self._store.set(f"heartbeat/{self.rank}", json.dumps(asdict(self._heartbeat)))
        self._sent_phases = self._heartbeat.num_phases

    def _read(self, ranks: Sequence[int]) -> dict[int, Heartbeat]:
        values = self._store.multi_get([f"heartbeat/{rank}" for rank in ranks])
        return {rank: Heartbeat(**json.loads(value)) for rank, value in zip(ranks, values)}

    def _check(self) -> None:
        verdict = self._store.get(_VERDICT).decode()
        if verdict:
            self._obey(json.loads(verdict))
        for rank in self._neighbours:
            if self._processes[rank].is_gone() and not self._read([rank])[rank].has_left:
                process = self._processes[rank]
                self._post([rank], f"died (process {process.pid} on {process.name})")
        if self.rank == 0:
            for rank, heartbeat in self._read(range(self.world_size)).items():
                self._monitor.record(rank, heartbeat, time.monotonic())
        found = self._monitor.silent(time.monotonic())
        if found is None and self.rank == 0:
            found = self._monitor.stalled(time.monotonic())
        if found is not None:
            self._post(*found)

    def _post(self, ranks: list[int], what: str, printed: bool = False) -> None:
        """Write a verdict unless there is one already, and obey the verdict in the store."""
        text = self._message(ranks, what, self._read(range(self.world_size)))
        written = self._store.compare_set(_VERDICT, "", json.dumps({"ranks": ranks, "text": text, "by": self.rank}))
        if not printed:
            self._obey(json.loads(written))

    def _message(self, ranks: list[int], what: str, heartbeats: Mapping[int, Heartbeat]) -> str:
        lines = [f"watchdog: {name_ranks(ranks)} {what}; the job ends"]
        lines += [f"watchdog: rank {rank} was in {heartbeats[rank].where()}" for rank in ranks[:8]]
        lines += ["where every rank was:", *describe(heartbeats)]
        return "\n".join([*lines, "continue from the newest checkpoint with --resume", ""])

    def _obey(self, verdict: Mapping) -> NoReturn:
        """End this process by a verdict."""
        survivor = next((rank for rank in range(self.world_size) if rank not in verdict["ranks"]), 0)
        if self.rank in (0, survivor, verdict["by"]):
            # A failed rank that found itself may be killed by the survivor before it has written to the log.
            writer = survivor if verdict["by"] in verdict["ranks"] else verdict["by"]
            self._print(verdict["text"], self.rank == writer)
        try:
            self._store.set(f"seen/{self.rank}", "")
            self._wait_until_seen(verdict["ranks"])
        except dist.DistError:
            pass  # the first rank has ended before
        deadline = time.monotonic() + max(3.0, 3 * self.interval)
        while (
            self.rank not in verdict["ranks"]
            and 0 in verdict["ranks"]
            and 0 in self._neighbours
            and not self._processes[0].is_gone()
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)  # the first rank hosts the store until all have read the verdict, and ends by itself
        self._end(verdict["ranks"])

    def _wait_until_seen(self, but: Sequence[int]) -> None:
        """Wait on the first rank, which hosts the store, until the other ranks have read the verdict."""
        names = [f"seen/{rank}" for rank in range(self.world_size) if rank not in but and rank != self.rank]
        deadline = time.monotonic() + max(2.0, 2 * self.interval)
        while self.rank == 0 and time.monotonic() < deadline and not all(self._store.check([name]) for name in names):
            time.sleep(0.02)

    def _wait_for_others_to_leave(self) -> None:
        self._send()  # the heartbeat before may have been made before this rank was about to leave
        deadline = time.monotonic() + 10.0
        while (
            self.rank == 0
            and time.monotonic() < deadline
            and not all(heartbeat.has_left for heartbeat in self._read(range(self.world_size)).values())
        ):
            self._check()
            time.sleep(0.02)

    def _store_lost(self, why: str) -> NoReturn:
        """Report the last known state of the first rank, and end. No other rank can be asked without the store."""
        process = self._processes[0]
        time.sleep(0.2)  # the process of a lost connection may take a moment to end
        near = process.machine == self._processes[self.rank].machine
        what = (
            f"died (process {process.pid} on {process.name})"
            if near and process.is_gone()
            else f"does not answer ({why}): stopped, or its machine is lost"
        )
        known = {0: self._monitor.heartbeats.get(0, Heartbeat()), self.rank: self._heartbeat}
        self._print(self._message([0], what, known), True)
        self._end([0])

    def _print(self, text: str, to_log: bool) -> None:
        os.write(2, text.encode())  # the main thread may hold sys.stderr
        if to_log and self.log is not None:
            try:
                with open(self.log, "a") as file:
                    file.write(time.strftime("%Y-%m-%d %H:%M:%S\n") + text)
            except OSError:
                pass

    def _end(self, ranks: Sequence[int]) -> NoReturn:
        """End this process, and the failed processes of this machine that cannot end themselves."""
        if self.rank not in ranks:
            for rank in set(ranks) & set(self._neighbours):
                if not self._processes[rank].is_gone():
                    os.kill(self._processes[rank].pid, signal.SIGKILL)
        os._exit(EXIT_STATUS)
