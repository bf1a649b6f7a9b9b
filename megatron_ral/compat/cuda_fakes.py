"""A CUDA device without a GPU, on which fake tensors can lie.

`FakeTensorMode` gives tensors a device and no memory. In a process without a GPU it can do so for "cuda" only in part:
autograd asks for the device's guard, and megatron-core for the current device. `cuda_fakes.cpp` gives the one and this
file the other, so that code takes the ways that it takes on a GPU, and an operation that mixes devices fails as it does
there. What stays out of reach are values, streams, NCCL and kernels.

The process runs on no GPU afterwards, and should end after the simulation.

Tried on: megatron-core 0.16.1, 0.18.2 and 0.19.2; torch 2.11.0, 2.12.1 and 2.13.0, builds for the CPU and for CUDA.
Retired by: `test_fake_cuda_tensors_still_need_a_device`.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, cast

import torch

from megatron_ral.errors import UserError

_SOURCE = Path(__file__).with_suffix(".cpp")


def compiler() -> str | None:
    """Return the C++ compiler of this machine: CXX, c++, g++ or clang++. None: there is none."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((name for name in names if name and shutil.which(name)), None)


def _library() -> Path:
    """Compile the C++ part, once for each build of torch, and return its file."""
    from torch.utils import cpp_extension

    key = hashlib.sha256(f"{torch.__version__} {torch.__file__}".encode() + _SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron_ral"
    library = folder / f"cuda_fakes-{key}.so"
    if library.exists():
        return library
    name = compiler()
    if name is None:
        raise UserError("CXX", os.environ.get("CXX"), "names no compiler; a rehearsal compiles a C++ file of 60 lines")
    folder.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / library.name
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        command = [name, "-O1", "-shared", "-fPIC", "-std=c++20", abi, *includes, str(_SOURCE), "-o", str(made)]
        done = subprocess.run([*command, *libraries, "-ltorch_cpu", "-lc10"], capture_output=True, text=True)
        if done.returncode:
            raise UserError("CXX", name, f"cannot compile '{_SOURCE.name}': {done.stderr.strip()[-500:]}")
        made.rename(library)  # whole or not at all, whichever process comes first
    return library


@functools.cache
def install() -> torch.device:
    """Give this process a CUDA device for fake tensors, and return it. Later calls do nothing.

    Raises:
        UserError: the machine has no C++ compiler.
    """
    assert not torch.cuda.is_available(), "fakes are for processes without a GPU"
    cast(Any, ctypes.CDLL(str(_library()))).use_fake_cuda()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: 0
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.get_device_capability = lambda *args: (9, 0)
    return torch.device("cuda", 0)
