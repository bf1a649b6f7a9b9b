"""What the parts of the GPU acceptance share: figures with limits, and the process that runs one part.

    python -m tools.acceptance.part NAME --device cuda --folder outputs/gpu_acceptance

A part is a module with a function `run(setting)` that yields figures. Each is written to NAME.jsonl in the folder as
soon as it is known, so that a part that crashes later, or is ended by its time limit, loses none.
"""

import argparse
import dataclasses
import importlib
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Figure:
    """Result of a part."""

    name: str
    value: float | int | str
    unit: str = ""
    limit: str = ""
    """Limit in words, such as "<= 0.02" or "floor 1.3 ms"; empty without one."""
    passes: Optional[bool] = None
    """Verdict. None: the figure has no limit."""


@dataclass(frozen=True)
class Setting:
    """Where and how large a part runs."""

    device: str
    """cuda or cpu. The CPU runs everything smaller."""
    folder: Path
    """Folder of the acceptance, for files that parts share."""

    @property
    def on_gpu(self) -> bool:
        """True on a GPU, with the sizes that are wanted there."""
        return self.device == "cuda"


def note(name: str, value: float | int | str, unit: str = "", limit: str = "") -> Figure:
    """Return a figure without a verdict."""
    return Figure(name, value, unit, limit)


def at_most(name: str, value: float, limit: float, unit: str = "") -> Figure:
    """Return a figure that fails above a limit, and where it is NaN."""
    return Figure(name, value, unit, f"<= {limit:.3g}", bool(value <= limit))


def at_least(name: str, value: float, limit: float, unit: str = "") -> Figure:
    """Return a figure that fails below a limit, and where it is NaN."""
    return Figure(name, value, unit, f">= {limit:.3g}", bool(value >= limit))


def expect(name: str, value: float | int | str, holds: bool, wanted: str) -> Figure:
    """Return a figure that fails unless `holds`."""
    return Figure(name, value, "", wanted, bool(holds))


def seconds_of(work: Callable[[], Any], setting: Setting, repeats: int = 3) -> float:
    """Return the least seconds of some calls, after one that warms up."""
    from tools.benchmarks.attention_term import seconds

    work()
    return min(seconds(work, setting.device, time.perf_counter) for _ in range(repeats))


def relative_error(found: Any, wanted: Any) -> float:
    """Return |found - wanted| / |wanted| of two tensors, in float64."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm())


def start() -> Any:
    """Join a job of one rank: NCCL and the project's choice of kernels on a GPU, gloo on the CPU."""
    from megatron_ral.commands.common import quiet_third_parties
    from megatron_ral.compat.cpu_backend import choose_deepspeed_accelerator

    quiet_third_parties()
    choose_deepspeed_accelerator()
    from megatron_ral.parallel.process_groups import start_groups

    return start_groups(tensor_size=1, pipeline_size=1, seed=0)


def tiny_material(setting: Setting) -> tuple[str, str, str]:
    """Return folders of a tiny model, another one and digit-search data, made once for all parts."""
    from filelock import FileLock

    from tools.benchmarks.tiny_material import make_tiny_material

    setting.folder.mkdir(parents=True, exist_ok=True)
    made = setting.folder / "tiny_material.json"
    with FileLock(setting.folder / "tiny_material.lock"):
        if not made.exists():
            made.write_text(json.dumps(make_tiny_material(setting.folder / "tiny_material")))
    policy, other, data = json.loads(made.read_text())
    return policy, other, data


def run_part(name: str, setting: Setting) -> Iterator[Figure]:
    """Run a part: one of this folder, or any module with a function `run` by its dotted name."""
    module = importlib.import_module(name if "." in name else f"tools.acceptance.{name}")
    yield from module.run(setting)


def plain(figure: Figure) -> dict[str, Any]:
    """Return a figure as JSON holds it. Numbers that are not finite become words, because JSON has none for them."""
    value = figure.value
    if isinstance(value, float) and not math.isfinite(value):
        value = str(value)
    return {**dataclasses.asdict(figure), "value": value}


def main() -> None:
    """Run one part and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    setting = Setting(arguments.device, arguments.folder)
    with open(arguments.folder / f"{arguments.name}.jsonl", "w", encoding="utf-8") as file:
        for figure in run_part(arguments.name, setting):
            file.write(json.dumps(plain(figure)) + "\n")
            file.flush()
            print(figure, flush=True)
    os._exit(0)  # the figures are written; threads of libraries may take their time


if __name__ == "__main__":
    main()
