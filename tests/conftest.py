"""Shared material of the tests: tiny checkpoints and shards, made once per session by the project's own tools."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

PROJECT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)


def run_tool(name: str, *arguments: object) -> None:
    subprocess.run(
        [sys.executable, str(PROJECT / "tools" / name), *map(str, arguments)],
        check=True,
        capture_output=True,
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )


def perturbed_copy(source: Path, target: Path, scale: float = 0.02, seed: int = 1) -> Path:
    """A Hugging Face folder with noise added to every weight: a second model of the same shape."""
    import shutil

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


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> dict[str, Path]:
    """tiny: tied embeddings; tiny_other: the same with other weights; untied: separate LM head; qwen3: the second family;
    teacher: a larger model of the first; data: shards."""
    root = tmp_path_factory.mktemp("material")
    run_tool("make_tiny_model.py", "--output", root / "tiny", "--seed", 0)
    run_tool(
        "make_digit_search.py",
        "--output",
        root / "data",
        "--num-single",
        64,
        "--num-search",
        128,
        "--num-biased",
        32,
        "--num-rl",
        128,
        "--num-heldout",
        64,
        "--shard-size",
        16,
    )
    # Untrained weights give attention close to uniform; noise of this size makes rows and log-probs differ.
    perturbed_copy(root / "tiny", root / "tiny_a", seed=1)
    perturbed_copy(root / "tiny", root / "tiny_b", seed=2)
    run_tool("make_tiny_model.py", "--output", root / "made_untied", "--untied", "--seed", 3)
    perturbed_copy(root / "made_untied", root / "untied", seed=5)
    perturbed_copy(root / "untied", root / "untied_other", seed=3)
    run_tool("make_tiny_model.py", "--output", root / "made_qwen3", "--family", "qwen3_vl", "--vision-depth", 3)
    perturbed_copy(root / "made_qwen3", root / "qwen3", seed=4)
    # wider, deeper, more heads, another padding of the vocabulary
    run_tool(
        "make_tiny_model.py",
        "--output",
        root / "made_teacher",
        "--untied",
        "--seed",
        6,
        "--hidden-size",
        192,
        "--num-layers",
        6,
        "--num-heads",
        6,
        "--vocab-size",
        500,
    )
    perturbed_copy(root / "made_teacher", root / "teacher", seed=6)
    return {
        "teacher": root / "teacher",
        "tiny": root / "tiny_a",
        "tiny_other": root / "tiny_b",
        "untied": root / "untied",
        "untied_other": root / "untied_other",
        "qwen3": root / "qwen3",
        "data": root / "data",
        "root": root,
    }


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """Shards of video search: a folder."""
    folder = tmp_path_factory.mktemp("clips") / "data"
    run_tool(
        "make_video_search.py",
        "--output",
        folder,
        "--num-single",
        8,
        "--num-search",
        32,
        "--num-biased",
        20,
        "--num-rl",
        24,
        "--num-heldout",
        24,
    )
    return folder
