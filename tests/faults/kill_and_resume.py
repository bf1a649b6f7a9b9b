"""Rounds of kill_and_resume.sh: a rank is killed, the job has to end in time, and the resumed run has to be exact."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
LIMIT = 60
"""Seconds in which a job must have ended after a rank died."""
STEPS = 3
CONFIG = f"""
seed: 1
model: {{dtype: float32}}
data: {{max_prompt_length: 128, shuffle_buffer: 20}}
rollout: {{num_prompts: 8, group_size: 3, num_minibatches: 2, max_response_length: 12}}
reward: {{functions: {{varied: {{path: "tests.faults.doom:varied", weight: 1.0}}}}}}
loss: {{attention_target: reference, attention_coef: 1.0}}
optimizer: {{learning_rate: 1.0e-3}}
train: {{algorithm: ral, num_steps: {STEPS}, micro_batch_size: 2, checkpoint_interval: 1, keep_checkpoints: 2}}
logging: {{probe_interval: 0}}
watchdog: {{timeout_seconds: {LIMIT}}}
"""
PHASES = {
    "start-up": 1,
    "data": STEPS,
    "rollout": STEPS,
    "old": STEPS,
    "reference": STEPS,
    "update": 2 * STEPS,
    "checkpoint": STEPS,
    "export": 1,
}
"""Number of times that a run enters a phase, by the name of the phase."""


def tool(name: str, *arguments: object) -> None:
    subprocess.run(
        [sys.executable, str(PROJECT / "tools" / name), *map(str, arguments)],
        check=True,
        capture_output=True,
        cwd=PROJECT,
    )


class Job:
    """Training run, started as a user would start it.

    Args:
        work: folder with the model, the data and the configuration.
        output: output folder of the run.
    """

    def __init__(self, work: Path, output: Path):
        self.ranks = int(os.environ.get("NPROC", "2"))
        self.output = output
        self._command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(self.ranks),
            "-m",
            "tests.faults.doom",
            "--config",
            str(work / "run.yaml"),
            f"model.path={work}/tiny",
            f"data.train=[{{shards: '{work}/data/rl-*.tar'}}]",
            f"train.output_dir={output}",
            *os.environ.get("SETTINGS", "").split(),
        ]

    def run(self, *more: str, doom: dict | None = None) -> tuple[int, str]:
        """Return (exit status, printed text)."""
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(PROJECT),
            "TOKENIZERS_PARALLELISM": "false",
        }
        if doom is not None:
            environment["DOOM"] = json.dumps(doom)
        done = subprocess.run(
            self._command + list(more),
            cwd=PROJECT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=900,
        )
        return done.returncode, done.stdout

    def result(self) -> dict[str, bytes]:
        """Return the bytes of the exported weights and of the last checkpoint, by file."""
        last = self.output / "checkpoints" / f"step_{STEPS:08d}"
        files = [*(self.output / "hf").glob("*.safetensors"), *last.glob("*.safetensors"), *last.glob("rank_*.json")]
        return {str(path.relative_to(self.output)): path.read_bytes() for path in files}


def faults_of_end(status: int, log: str, rank: int, note: dict, seconds: float) -> list[str]:
    """Return what is wrong with the end of a job after a rank was killed; empty where nothing is."""
    wrong = []
    if status == 0:
        wrong.append("the exit status is 0")
    if seconds > LIMIT:
        wrong.append(f"it ended after {seconds:.1f} s")
    if not re.search(rf"rank\s*: {rank} \(local_rank", log) or not re.search(r"exitcode\s*: -9", log):
        wrong.append("the launcher does not name the rank")
    if note["phase"] == "leaving" or (note["step"] == 0 and "bytes held between steps" not in log):
        return wrong  # without a watchdog yet, or no longer: only the launcher can name the rank
    found = re.search(rf"watchdog: rank {rank} was in phase '([^']*)'(?: of step (\d+))?, (.*)", log)
    if f"watchdog: rank {rank} died" not in log or found is None:
        return wrong + ["no message of the watchdog"]
    phase, step, samples = found.group(1), int(found.group(2) or 0), found.group(3)
    if rank == 0:  # the store ended with rank 0: the others know only its heartbeat before
        return wrong if step in (note["step"] - 1, note["step"]) else wrong + [f"the message says step {step}"]
    known = {note["phase"], note["before"]} | ({phase} if note["seconds"] < 0.02 else set())
    if phase not in known or step != note["step"]:
        wrong.append(f"the message says phase '{phase}' of step {step}, it was {note['phase']} of step {note['step']}")
    if note["samples"] and "last sample" not in samples:
        wrong.append("the message names no sample")
    return wrong


def one_round(number: int, work: Path, chosen: dict, wanted: dict[str, bytes]) -> tuple[bool, str]:
    """Return (passed, text to print)."""
    job = Job(work, work / f"round_{number}")
    note_file = work / f"note_{number}.json"
    started = time.time()
    status, log = job.run(doom={**chosen, "note": str(note_file), "how": "kill"})
    ended = time.time()
    text = f"rank {chosen['rank']}, {chosen['phase']} number {chosen['entry']} + {chosen['delay']:.3f} s"
    wrong, note = [], None
    if note_file.exists():
        note = json.loads(note_file.read_text())
        seconds = ended - note_file.stat().st_mtime
        text += f": killed in {note['phase']} of step {note['step']}, ended after {seconds:.1f} s"
        wrong = faults_of_end(status, log, chosen["rank"], note, seconds)
    elif status != 0:
        wrong = [f"it ended by itself with status {status}"]
    else:
        text += ": the run had ended before"
    again, resumed = job.run("--resume")
    if again != 0:
        wrong.append(f"resumed, it ended with status {again}")
    else:
        found = re.search(r"resumed from \S*(step_\d+)", resumed)
        text += f", resumed from {found.group(1) if found else 'the start'}"
        different = [name for name in wanted.keys() | job.result().keys() if wanted.get(name) != job.result().get(name)]
        if different:
            wrong.append(f"not identical: {', '.join(sorted(different))}")
    if wrong:
        (work / f"round_{number}.log").write_text(log + "\n==== resumed\n" + resumed)
    else:
        shutil.rmtree(job.output)
    return not wrong, f"{text}, {time.time() - started:.0f} s: {'; '.join(wrong) or 'passed'}"


def main(count: int) -> int:
    """Run the rounds and return the exit status."""
    seed = int(os.environ.get("SEED", random.SystemRandom().randrange(10**6)))
    work = Path(os.environ.get("FAULTS_DIR") or tempfile.mkdtemp(prefix="kill_and_resume-"))
    work.mkdir(parents=True, exist_ok=True)
    print(f"SEED={seed}, {count} rounds, files in {work}", flush=True)
    tool("make_tiny_model.py", "--output", work / "tiny", "--seed", 0)
    tool(
        "make_digit_search.py",
        "--output",
        work / "data",
        "--num-single",
        8,
        "--num-search",
        8,
        "--num-biased",
        8,
        "--num-rl",
        48,
        "--num-heldout",
        8,
        "--shard-size",
        16,
    )
    (work / "run.yaml").write_text(CONFIG)
    straight = Job(work, work / "straight")
    status, log = straight.run()
    wanted = straight.result()
    if status != 0 or len(wanted) < 3:
        print(f"{log}\nthe undisturbed run ended with status {status}\n0 passed, {count} failed")
        return 1
    draw, order = random.Random(seed), []
    passed, phases = 0, Counter()
    for number in range(count):
        order = order or draw.sample(sorted(PHASES), len(PHASES))  # every phase in turn
        phase = order.pop()
        delay = draw.uniform(0.0, 12.0) if phase == "start-up" else draw.expovariate(1 / 0.05)
        chosen = {
            "rank": draw.randrange(straight.ranks),
            "phase": phase,
            "entry": draw.randint(1, PHASES[phase]),
            "delay": delay,
        }
        good, text = one_round(number, work, chosen, wanted)
        passed, phases[phase] = passed + good, phases[phase] + 1
        print(f"{number + 1}/{count} {text}", flush=True)
    print("aimed at: " + ", ".join(f"{phase} {times}" for phase, times in sorted(phases.items())))
    if passed == count:
        shutil.rmtree(work)
    print(f"{passed} passed, {count - passed} failed", flush=True)
    return int(passed != count)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
