"""Run the parts of the GPU acceptance one after another, each in a process of its own with a time limit.

A part that crashes, hangs or yields a figure beyond its limit is marked as failed, and the next one starts. The results
so far are written after every part, so that a run that is ended loses none. docs/results/gpu.md says what the parts
show.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Sequence

import psutil

from megatron_ral.errors import UserError

PROJECT = Path(__file__).resolve().parents[1]
SECONDS = {
    "environment": 60,
    "sdpa_nan": 60,
    "kernels": 120,
    "flash_join": 60,
    "bf16": 90,
    "stage": 150,
    "decode": 90,
    "waits": 60,
    "end_to_end": 170,
}
"""Time limit of each part on a GPU, in the order in which they run. Together they are limited by `--limit`."""
OTHER_SECONDS = 60
"""Time limit of a part that is given by the dotted name of its module."""
WHOLE_LIMIT = {"cuda": 480.0, "cpu": 1800.0}
CPU_FACTOR = 4
"""Time limits of the parts on a CPU, as a multiple."""


@dataclass
class Result:
    """Result of one part."""

    part: str
    verdict: str = "not run"
    """passed, failed or not run."""
    seconds: float = 0.0
    reason: str = ""
    """Reason why it failed or did not run."""
    figures: list[dict[str, Any]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    """Last lines of its log, where it ended by an error or at its limit."""


def run_part(part: str, device: str, folder: Path, limit: float) -> Result:
    """Run one part and read its figures, those before a crash as well."""
    result, started = Result(part), time.monotonic()
    figures, log = folder / f"{part}.jsonl", folder / f"{part}.log"
    figures.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tools.acceptance.part", part, "--device", device, "--folder", str(folder)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
    }
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with open(log, "w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command, cwd=PROJECT, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    result.seconds = round(time.monotonic() - started, 1)
    lines = figures.read_text(encoding="utf-8").splitlines() if figures.exists() else []
    result.figures = [json.loads(line) for line in lines if line.endswith("}")]
    beyond = [figure["name"] for figure in result.figures if figure["passes"] is False]
    if status is None:
        result.reason = f"ended at its limit of {limit:.0f} s"
    elif status:
        result.reason = f"exit status {status}"
    elif beyond:
        result.reason = f"beyond its limit: {', '.join(beyond)}"
    elif not result.figures:
        result.reason = "no figures"
    result.verdict = "failed" if result.reason else "passed"
    if status != 0:
        result.log = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
    return result


def _end(process: subprocess.Popen) -> None:
    """End a part and all that it started. Ranks of a launcher are in sessions of their own."""
    started: list[psutil.Process] = []
    if process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


def table(results: Sequence[Result]) -> str:
    """Return the results as a Markdown table: one line for each part, and one for each of its figures."""
    lines = ["| part | figure | value | limit | verdict |", "|---|---|---|---|---|"]
    for result in results:
        verdict = f"{result.verdict}{': ' + result.reason if result.reason else ''}"
        lines.append(f"| **{result.part}** | | {result.seconds:g} s | | **{verdict}** |")
        for figure in result.figures:
            value = figure["value"]
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            shown = {True: "passed", False: "FAILED", None: ""}[figure["passes"]]
            cells = (figure["name"], f"{text} {figure['unit']}".strip(), figure["limit"], shown)
            lines.append(f"| | {' | '.join(' '.join(cell.split()).replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=str(__doc__).split("\n\n")[0], epilog=f"parts: {' '.join(SECONDS)}", prog="gpu_acceptance.sh"
    )
    parser.add_argument("--cpu", action="store_true", help="run everything smaller on the CPU")
    parser.add_argument("--output-dir", type=Path, default=PROJECT / "outputs" / "gpu_acceptance")
    parser.add_argument("--limit", type=float, help="seconds for all parts together; default 480, with --cpu 1800")
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="parts to run, default all; or dotted names of modules with `run`"
    )
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts, print the table and return the exit status."""
    arguments = parse(argv)
    try:
        for part in arguments.parts:
            if part not in SECONDS and "." not in part:
                raise UserError("PART", part, f"is not known; take some of {', '.join(SECONDS)}")
        device = "cpu" if arguments.cpu else "cuda"
        if device == "cuda" and not has_gpu():
            raise UserError("--cpu", None, "is missing, and torch finds no GPU; with it everything runs smaller")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder: Path = arguments.output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    started, limit = time.monotonic(), arguments.limit or WHOLE_LIMIT[device]
    results = [Result(part) for part in arguments.parts or SECONDS]
    for index, result in enumerate(results):
        left = limit - (time.monotonic() - started)
        own = SECONDS.get(result.part, OTHER_SECONDS) * (CPU_FACTOR if device == "cpu" else 1)
        if left < 5:
            result.reason = "no time was left"
        else:
            print(f"{result.part} ..", end=" ", flush=True)
            result = results[index] = run_part(result.part, device, folder, min(own, left))
            print(f"{result.verdict} in {result.seconds:g} s {result.reason}", flush=True)
        write(folder / "acceptance.json", device, results)
    print(f"\n{table(results)}\n")
    for result in results:
        if result.log:
            print(f"{result.part}: last lines of {result.part}.log", *result.log, sep="\n    ")
    passed = sum(result.verdict == "passed" for result in results)
    print(f"{passed} of {len(results)} parts passed in {time.monotonic() - started:.0f} s on {device}")
    return int(passed < len(results))


def has_gpu() -> bool:
    """Return whether torch finds a GPU, asked in another process, so that this one holds none of its memory."""
    asked = [sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    return subprocess.run(asked, check=False).returncode == 0


def write(path: Path, device: str, results: Sequence[Result]) -> None:
    """Write the results so far, whole or not at all."""
    partial = path.with_suffix(".partial")
    text = json.dumps({"device": device, "parts": [asdict(result) for result in results]}, indent=1)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.rename(path)


if __name__ == "__main__":
    sys.exit(main())
