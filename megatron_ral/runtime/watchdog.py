"""The watchdog: a rank that dies or stalls ends the whole job, and the message says which, where and with which sample.

A thread of every rank sends beats (`progress.py`: phase, step, samples, a count that grows) through a store of its own,
which the first rank holds, because the main thread may be stuck in a collective:

- ranks of one machine look at each other's processes, so that a death is seen within a second;
- the first rank judges the beats of all: none for too long is a rank that is stopped or a machine that is lost; beats whose
  count does not grow are a stalled main thread. Waiting in a collective for another rank is no stall, so those that are
  behind are named: not waiting, and in the earliest phase;
- all others listen for the first rank, whose death takes the store along.

Whoever finds something writes a verdict into the store; it is printed there, by the first rank and by the first that is
not to blame, and every rank's thread ends its process, whatever the main thread is stuck in.
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

from megatron_ral.runtime.heartbeat import Heartbeat, HealthMonitor, describe, name_ranks
from megatron_ral.parallel.collectives import from_first_rank_of_all, gather_from_all
from megatron_ral.runtime.progress import Progress, progress

EXIT_STATUS = 3
"""Of a rank that ended because of another one."""
_VERDICT = "verdict"
_WAITS_IN = ("torch/distributed/", "deepspeed/comm/", "pipeline_parallel/p2p_communication.py", "parallel/exchange.py")
"""Files whose code, innermost on the stack, waits for other ranks."""
_PACKAGE = str(Path(__file__).parents[1]) + os.sep


@dataclass(frozen=True)
class Process:
    """A rank's process as its machine knows it."""

    pid: int
    started: str
    """In ticks of the machine's clock, so that a number that is used again is not taken for the same process."""
    machine: str
    name: str
    """Of the machine, for people."""

    @classmethod
    def own(cls) -> "Process":
        boot = Path("/proc/sys/kernel/random/boot_id")
        machine = boot.read_text().strip() if boot.exists() else socket.gethostname()
        namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
        return cls(os.getpid(), _process_state(os.getpid())[1], f"{machine} {namespace}", socket.gethostname())

    def is_gone(self) -> bool:
        """Whether the process has ended; only for one of the same machine."""
        state, started = _process_state(self.pid)
        return state in ("", "Z", "X") or started != self.started


def _process_state(pid: int) -> tuple[str, str]:
    """(state letter, empty: no such process; time it was started)"""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def main_thread_place() -> tuple[str, str]:
    """(collective in which the main thread waits, or empty; innermost line of this package it is at)

    It waits where its innermost Python code does: a signal handler, say, that was called in a collective is no wait.
    """
    frame = sys._current_frames().get(threading.main_thread().ident)
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
    if code.co_filename == threading.__file__:  # for a thread of this process
        return False
    return code.co_name == "wait" or any(part in code.co_filename for part in _WAITS_IN)


def comes_from_a_collective(error: BaseException) -> bool:
    """Whether an exception was raised where ranks wait for each other, so that it may be another one's fault."""
    frames = traceback.extract_tb(error.__traceback__)
    said = isinstance(error, RuntimeError) and any(
        word in str(error).lower() for word in ("gloo", "nccl", "connection")
    )
    return (
        isinstance(error, dist.DistError)
        or said
        or any(frame.name == "wait" or any(part in frame.filename for part in _WAITS_IN) for frame in frames[-6:])
    )


class Watchdog:
    """Of one rank. Every rank makes one at the same place, after the process groups are there.

    Args:
        timeout: seconds after which a rank that died or stalled has ended the job; 0: off.
        long_timeout: the same in phases that may be long without a sign of life.
        watches_waiting: see Judge.
        log: file that gets the message too; None: standard error alone.
        source: where this rank is.
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
        if not timeout:
            return
        # judged a little early, so that the job has ended when the time is up
        limits = (0.9 * timeout - self.interval, max(0.9 * long_timeout, 0.9 * timeout) - self.interval)
        self._judge = HealthMonitor(limits, watches_waiting)
        self._wake, self._told = threading.Event(), 0
        self._leaving, self._own_end, self._beat = False, "", Heartbeat()
        wait = timedelta(seconds=max(limits[0], 30.0))  # of connecting; see _guard
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")

        def serve() -> int:
            self._server = dist.TCPStore(host, 0, None, True, wait, wait_for_workers=False)
            self._server.set(_VERDICT, "")
            return self._server.port

        port = from_first_rank_of_all(serve)
        self._store = dist.TCPStore(host, port, None, False, wait)
        self._processes: list[Process] = gather_from_all(Process.own())
        own = self._processes[rank]
        self._neighbours = [
            other for other, process in enumerate(self._processes) if other != rank and process.machine == own.machine
        ]
        self._send()
        gather_from_all(None)  # every rank has sent a beat
        source.listener = self._phase_changed
        self._rounds = 0
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()
        if rank != 0:
            threading.Thread(target=self._guard, name="watchdog of the store", daemon=True).start()

    # ---- called by the main thread ----------------------------------------------------------------------------------

    def leave(self) -> None:
        """This rank is about to end as it should. The first one waits for the others, a little."""
        if self._thread is None:
            return
        self._leaving = True
        self._wake.set()
        self._thread.join(max(10.0, 2 * self.interval))
        self.source.listener = None

    def end_with(self, error: BaseException) -> NoReturn:
        """This rank cannot go on: end the process, with the watchdog's verdict where another rank is the reason, else with
        the error, which then ends the other ranks too."""
        if self._thread is not None and comes_from_a_collective(error):
            self._thread.join(self.timeout)  # it ends the process where it finds a reason
        sys.stdout.flush()
        traceback.print_exception(error, file=sys.stderr)
        sys.stderr.flush()
        self.announce(f"ended with {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        os._exit(1)

    def announce(self, what: str) -> None:
        """This rank ends by an error it has told of: tell the others, so that they end too."""
        if self._thread is None:
            return
        self._own_end = what
        self._wake.set()
        self._thread.join(max(10.0, 2 * self.interval))

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _phase_changed(self, is_long: bool) -> None:
        self._wake.set()
        deadline = time.monotonic() + 1.0
        # what comes may be long and not let go of the interpreter: the others must know before it begins
        while is_long and self._told < self.source.num_phases and time.monotonic() < deadline:
            time.sleep(0.002)

    def _run(self) -> None:
        checked, round_began = 0.0, time.monotonic()
        try:
            while True:
                self._wake.wait(self.interval / 4)
                self._wake.clear()
                held_up, round_began = time.monotonic() - round_began, time.monotonic()
                if held_up > 0.5 * self.timeout:  # a job that was suspended as a whole goes on: nobody is to blame
                    self._judge.skip(held_up)
                self._send()
                if self.rank != 0:  # its last words, should the store go with it
                    self._judge.hear(0, self._read([0])[0], time.monotonic())
                self._rounds += 1
                if self._leaving:
                    return self._farewell()
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
        """A client of a store that is stopped waits for ever, whatever its timeout: notice that no round ends. Looks are
        counted rather than seconds, which also pass while the whole process is held up."""
        looks, rounds = 0, -1
        while self._thread.is_alive():
            looks, rounds = (0 if self._rounds != rounds else looks + 1), self._rounds
            if looks * self.interval > 0.75 * self.timeout:
                self._store_lost(f"no answer for {looks * self.interval:.0f} s")
            time.sleep(self.interval)

    def _send(self) -> None:
        source, (waits_in, place) = self.source, main_thread_place()
        names = list(source.samples[-2:])
        more = f" and {len(source.samples) - len(names)} before" if len(source.samples) > len(names) else ""
        samples = f"last sample{'s' if len(names) > 1 else ''} {', '.join(names)}{more}" if names else ""
        self._beat = Heartbeat(
            self._beat.number + 1,
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
        self._store.set(f"beat/{self.rank}", json.dumps(asdict(self._beat)))
        self._told = self._beat.num_phases

    def _read(self, ranks: Sequence[int]) -> dict[int, Heartbeat]:
        values = self._store.multi_get([f"beat/{rank}" for rank in ranks])
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
            for rank, beat in self._read(range(self.world_size)).items():
                self._judge.hear(rank, beat, time.monotonic())
        found = self._judge.silent(time.monotonic())
        if found is None and self.rank == 0:
            found = self._judge.stalled(time.monotonic())
        if found is not None:
            self._post(*found)

    def _post(self, ranks: list[int], what: str, printed: bool = False) -> None:
        """Write a verdict, unless there is one already, and obey the one there is."""
        beats = self._read(range(self.world_size))
        text = self._message(ranks, what, beats)
        written = self._store.compare_set(_VERDICT, "", json.dumps({"ranks": ranks, "text": text, "by": self.rank}))
        if not printed:
            self._obey(json.loads(written))

    def _message(self, ranks: list[int], what: str, beats: Mapping[int, Heartbeat]) -> str:
        lines = [f"watchdog: {name_ranks(ranks)} {what}; the job ends"]
        lines += [f"watchdog: rank {rank} was in {beats[rank].where()}" for rank in ranks[:8]]
        return "\n".join(
            lines + ["where every rank was:"] + describe(beats) + ["go on from the newest checkpoint with --resume", ""]
        )

    def _obey(self, verdict: Mapping) -> NoReturn:
        """End this process by a verdict."""
        survivor = next((rank for rank in range(self.world_size) if rank not in verdict["ranks"]), 0)
        if self.rank in (0, survivor, verdict["by"]):
            # A finder that is itself to blame may be killed by the survivor before it has written.
            keeper = survivor if verdict["by"] in verdict["ranks"] else verdict["by"]
            self._print(verdict["text"], self.rank == keeper)
        try:
            self._store.set(f"seen/{self.rank}", "")
            self._wait_until_seen(verdict["ranks"])
        except dist.DistError:
            pass  # the first rank has gone ahead
        deadline = time.monotonic() + max(3.0, 3 * self.interval)
        while (
            self.rank not in verdict["ranks"]
            and 0 in verdict["ranks"]
            and 0 in self._neighbours
            and not self._processes[0].is_gone()
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)  # it holds the store until all have looked, and ends by itself
        self._end(verdict["ranks"])

    def _wait_until_seen(self, but: Sequence[int]) -> None:
        """The first rank holds the store: let the others see what is in it before it goes."""
        names = [f"seen/{rank}" for rank in range(self.world_size) if rank not in but and rank != self.rank]
        deadline = time.monotonic() + max(2.0, 2 * self.interval)
        while self.rank == 0 and time.monotonic() < deadline and not all(self._store.check([name]) for name in names):
            time.sleep(0.02)

    def _farewell(self) -> None:
        self._send()  # the beat before may have been made before this rank was about to leave
        deadline = time.monotonic() + 10.0
        while (
            self.rank == 0
            and time.monotonic() < deadline
            and not all(beat.has_left for beat in self._read(range(self.world_size)).values())
        ):
            self._check()
            time.sleep(0.02)

    def _store_lost(self, why: str) -> NoReturn:
        """Nobody can be asked any more: every rank says what it knows of the first."""
        process = self._processes[0]
        time.sleep(0.2)  # the process of a lost connection may take a moment to be gone
        near = process.machine == self._processes[self.rank].machine
        what = (
            f"died (process {process.pid} on {process.name})"
            if near and process.is_gone()
            else f"does not answer ({why}): stopped, or its machine is lost"
        )
        self._print(self._message([0], what, {0: self._judge.beats.get(0, Heartbeat()), self.rank: self._beat}), True)
        self._end([0])

    def _print(self, text: str, keep: bool) -> None:
        os.write(2, text.encode())  # the main thread may hold sys.stderr
        if keep and self.log is not None:
            try:
                with open(self.log, "a") as file:
                    file.write(time.strftime("%Y-%m-%d %H:%M:%S\n") + text)
            except OSError:
                pass

    def _end(self, ranks: Sequence[int]) -> NoReturn:
        """End this process, and those to blame that cannot do so themselves."""
        if self.rank not in ranks:
            for rank in set(ranks) & set(self._neighbours):
                if not self._processes[rank].is_gone():
                    os.kill(self._processes[rank].pid, signal.SIGKILL)
        os._exit(EXIT_STATUS)
