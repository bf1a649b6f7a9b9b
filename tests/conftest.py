"""Shared material of the tests: tiny checkpoints and shards, made once per session by the project's own tools."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests compare two engines bit for bit. On some processors MKL's products round by where their matrices lie in memory,
# which is elsewhere in each engine, unless it is told not to.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import pytest
import torch
from filelock import FileLock

from tests.tiers import is_fast, missing_entries

PROJECT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)

RUN_ALL = """
import json, runpy, sys
for path, *arguments in json.loads(sys.argv[1]):
    sys.argv = [path, *arguments]
    sys.path.insert(0, path.rpartition("/")[0])
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""


def pytest_collection_modifyitems(config, items) -> None:
    missing = missing_entries(PROJECT)
    if missing:
        raise pytest.UsageError(f"tests/tiers.py names files that are not there: {', '.join(missing)}")
    for item in items:
        if is_fast(item.nodeid):
            item.add_marker("fast")


def run_tools(*calls: tuple[object, ...]) -> None:
    """Run tools one after another in one process of their own; each call is the name of a tool and its arguments."""
    lines = [[str(PROJECT / "tools" / str(name)), *map(str, arguments)] for name, *arguments in calls]
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(lines)], capture_output=True, text=True, cwd=PROJECT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def made_once(request: pytest.FixtureRequest, name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder that `make` fills once per session: by the first worker that asks, while others wait."""
    base = request.getfixturevalue("tmp_path_factory").getbasetemp()
    if hasattr(request.config, "workerinput"):  # a worker of pytest-xdist has a folder inside the session's
        base = base.parent
    folder, done = base / f"shared_{name}", base / f"shared_{name}.done"
    with FileLock(base / f"shared_{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def perturbed_copy(source: Path, target: Path, scale: float = 0.02, seed: int = 1) -> Path:
    """A Hugging Face folder with noise added to every weight: a second model of the same shape."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    generator = torch.Generator().manual_seed(seed)
    for file in target.glob("*.safetensors"):
        tensors = {
            name: tensor + scale * torch.randn(tensor.shape, generator=generator)
            for name, tensor in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
    return target


def options(**values: object) -> list[object]:
    """`--name value` per keyword; True: a flag."""
    pairs = ((f"--{name.replace('_', '-')}", value) for name, value in values.items())
    return [part for name, value in pairs for part in ([name] if value is True else [name, value])]


def make_material(root: Path) -> None:
    model, wide = "make_tiny_model.py", options(hidden_size=192, num_layers=6, num_heads=6, vocab_size=500)
    shards = options(num_single=64, num_search=128, num_biased=32, num_rl=128, num_heldout=64, shard_size=16)
    run_tools(
        (model, "--output", root / "tiny", "--seed", 0),
        ("make_digit_search.py", "--output", root / "data", *shards),
        (model, "--output", root / "made_untied", "--untied", "--seed", 3),
        (model, "--output", root / "made_qwen3", "--family", "qwen3_vl", "--vision-depth", 3),
        (model, "--output", root / "made_internvl", "--family", "internvl", "--vision-depth", 3, "--tile-patches", 6),
        (model, "--output", root / "made_qwen3_5", "--family", "qwen3_5"),
        # wider, deeper, more heads, another padding of the vocabulary
        (model, "--output", root / "made_teacher", "--untied", "--seed", 6, *wide),
    )
    # Untrained weights give attention close to uniform; noise of this size makes rows and log-probs differ.
    perturbed_copy(root / "tiny", root / "tiny_a", seed=1)
    perturbed_copy(root / "tiny", root / "tiny_b", seed=2)
    perturbed_copy(root / "made_untied", root / "untied", seed=5)
    perturbed_copy(root / "untied", root / "untied_other", seed=3)
    perturbed_copy(root / "made_qwen3", root / "qwen3", seed=4)
    perturbed_copy(root / "made_internvl", root / "internvl", seed=8)
    perturbed_copy(root / "made_qwen3_5", root / "qwen3_5", seed=10)
    perturbed_copy(root / "made_teacher", root / "teacher", seed=6)


@pytest.fixture(scope="session")
def material(request) -> dict[str, Path]:
    """Folders by name, shared by all workers: read, never written.

    tiny: tied embeddings; tiny_other: other weights; untied: separate LM head; untied_other: the same with
    other weights; qwen3, internvl, qwen3_5: other families; teacher: a larger model of the first family; data: shards.
    """
    root = made_once(request, "material", make_material)
    return {
        "teacher": root / "teacher",
        "tiny": root / "tiny_a",
        "tiny_other": root / "tiny_b",
        "untied": root / "untied",
        "untied_other": root / "untied_other",
        "qwen3": root / "qwen3",
        "internvl": root / "internvl",
        "qwen3_5": root / "qwen3_5",
        "data": root / "data",
        "root": root,
    }


def make_clips(root: Path) -> None:
    counts = options(num_single=8, num_search=32, num_biased=20, num_rl=24, num_heldout=24)
    run_tools(("make_video_search.py", "--output", root / "data", *counts))


@pytest.fixture(scope="session")
def clips(request) -> Path:
    """Shards of video search: a folder. Shared by all workers: read, never written."""
    return made_once(request, "clips", make_clips) / "data"
