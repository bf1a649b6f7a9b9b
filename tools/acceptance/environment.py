"""Environment: versions, device, and the SDPA backends that are enabled and chosen for our two kinds of call."""

import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any, Iterator

import torch
from torch.cuda import nccl
from torch.nn.attention import SDPBackend

from megatron_ral.compat.cuda_fakes import compiler
from megatron_ral.compat.versions import installed_versions, untried
from tools.acceptance.part import Figure, Setting, expect, note, start

HEADS, KEY_HEADS, WIDTH = 28, 4, 128
"""Attention of Qwen2.5-VL-7B."""


def enabled_backends() -> list[str]:
    """Return the names of the SDPA backends that this process leaves on."""
    cuda = torch.backends.cuda
    states = {
        "FLASH_ATTENTION": cuda.flash_sdp_enabled(),
        "EFFICIENT_ATTENTION": cuda.mem_efficient_sdp_enabled(),
        "MATH": cuda.math_sdp_enabled(),
        "CUDNN_ATTENTION": cuda.cudnn_sdp_enabled(),
    }
    return [name for name, is_on in states.items() if is_on]


def chosen_backend(device: str, masked: bool) -> str:
    """Return the SDPA backend that torch takes.

    Args:
        device: cuda or cpu.
        masked: False for the causal call over a prompt with grouped heads, True for the dense mask of responses with
            repeated keys.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows, keys = (64, 320) if masked else (256, 256)

    def make(heads: int, length: int) -> torch.Tensor:
        return torch.zeros(1, heads, length, WIDTH, dtype=dtype, device=device, requires_grad=True)

    heads = HEADS if masked else KEY_HEADS
    mask = torch.ones(1, 1, rows, keys, dtype=torch.bool, device=device) if masked else None
    choose: Any = torch._fused_sdp_choice  # pyright: ignore[reportPrivateImportUsage]
    number = choose(
        make(HEADS, rows),
        make(heads, keys),
        make(heads, keys),
        mask,
        0.0,
        not masked,
        scale=None,
        enable_gqa=not masked,
    )
    return SDPBackend(number).name


def run(setting: Setting) -> Iterator[Figure]:
    """Yield versions, device and chosen backends."""
    versions = installed_versions()
    yield note("platform", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    for name, version in versions.items():
        yield note(name, version)
    outside = untried(versions)
    yield expect("versions outside the tried ranges", ", ".join(outside) or "none", not outside, "none")
    header = (Path(sysconfig.get_path("include")) / "Python.h").is_file()
    found = f"{compiler() or 'none'}, Python.h {'found' if header else 'missing'}"
    yield note("C++ compiler", found, "", "Triton needs both, a rehearsal the compiler")
    if setting.on_gpu:
        start()
        properties = torch.cuda.get_device_properties(0)
        yield note("device", properties.name)
        yield note("memory", round(properties.total_memory / 2**30, 1), "GiB")
        yield note("multiprocessors", properties.multi_processor_count)
        yield note("compute capability", f"{properties.major}.{properties.minor}")
        yield expect("NCCL", ".".join(map(str, nccl.version())), True, "answers")
        yield note("CUDA of torch, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
        if shutil.which("nvidia-smi"):
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            done = subprocess.run(asked, capture_output=True, text=True, check=False)
            yield note("driver", done.stdout.strip() or "unknown")
        recorded = graph_result()
        yield expect("CUDA graph", recorded, recorded == 2.0, "2.0 from 1.0 + 1.0 after a replay")
        left = enabled_backends()
        yield expect("SDPA backends on", ", ".join(left), "CUDNN_ATTENTION" not in left, "not cuDNN")
    prompt, dense = (chosen_backend(setting.device, masked) for masked in (False, True))
    yield expect("SDPA of a prompt", prompt, prompt == "FLASH_ATTENTION", "FLASH_ATTENTION")
    if setting.on_gpu:
        yield expect("SDPA with a dense mask", dense, dense == "EFFICIENT_ATTENTION", "EFFICIENT_ATTENTION")
    else:
        yield note("SDPA with a dense mask", dense)


def graph_result() -> float:
    """Return the result of a recorded addition after its inputs changed."""
    from megatron_ral.engine.decode_graph import Recorded

    one = torch.zeros(1, device="cuda")
    one.add(1.0)
    torch.cuda.synchronize()
    recorded = Recorded(lambda: one + 1.0)
    one.fill_(1.0)
    return float(recorded())
