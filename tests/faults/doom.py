"""Training in which one rank fails at a chosen moment.

`python -m tests.faults.doom TRAINING_ARGUMENTS` with the environment

    DOOM={"rank": 1, "phase": "rollout", "entry": 2, "delay": 0.05, "how": "kill", "note": FILE}

runs `megatron_ral.train` and makes rank 1 fail 0.05 s after it entered the phase for the second time. `how` is `kill`
(SIGKILL), `stop` (SIGSTOP), `stall` (its main thread sleeps for ever) or `ask` (SIGTERM). The rank's phase, step and
samples at that moment are written to `note` before.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from megatron_ral.runtime.progress import progress

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "stall": signal.SIGUSR2, "ask": signal.SIGTERM}


def await_doom(rank: int, doom: dict) -> None:
    """Start the thread that lets the rank fail, on that rank only. Main thread only."""
    if rank != doom["rank"]:
        return
    signal.signal(signal.SIGUSR2, lambda *_: time.sleep(1e6))  # handlers run in the main thread

    def watch() -> None:
        entries, seen, before, since, due = 0, -1, "", time.monotonic(), float("inf")
        phase = progress.phase
        while time.monotonic() < due:
            if progress.num_phases != seen:
                before, phase, since, seen = phase, progress.phase, time.monotonic(), progress.num_phases
                entries += phase == doom["phase"]
                if entries == doom["entry"] and due == float("inf"):
                    due = since + doom["delay"]
            time.sleep(0.0005)
        note = {
            "phase": progress.phase,
            "before": before,
            "seconds": time.monotonic() - since,
            "step": progress.step,
            "samples": list(progress.samples[-1:]),
        }
        Path(doom["note"] + ".partial").write_text(json.dumps(note))
        os.rename(doom["note"] + ".partial", doom["note"])
        os.kill(os.getpid(), SIGNALS[doom["how"]])

    threading.Thread(target=watch, daemon=True).start()


def varied(completion: str, solution: str, problem_type: str) -> float:
    """Return a reward that differs between the responses of an untrained model."""
    return (sum(map(ord, completion)) % 7) / 7.0


if __name__ == "__main__":
    if "DOOM" in os.environ:
        await_doom(int(os.environ.get("RANK", 0)), json.loads(os.environ["DOOM"]))
    from megatron_ral import train

    sys.argv[0] = train.__file__
    train.main()
