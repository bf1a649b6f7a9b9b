"""Weights on disk: Hugging Face folders and Megatron folders (one safetensors file per tensor and pipeline rank), read
and written tensor by tensor.

    Megatron folder:  tp_00_pp_00.safetensors ...   hf/ (config, tokenizer, processor)   megatron.json (written last)

Both kinds are read through one mapping from names (`model.layers..`, `visual..`, `lm_head..`, as Qwen2.5-VL has them on
the hub; `Family.hub_name` tells the others) to tensors, so that loading, converting, resharding and comparing are the
same code on either. Only safetensors; nothing is unpickled.
"""

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_ral.errors import CheckpointError
from megatron_ral.models.folder import config_folder, read_json

INDEX = "model.safetensors.index.json"
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


def copy_config(source: str | Path, target: Path) -> None:
    """Copy everything of a checkpoint but its weights: config, tokenizer, processor, generation config."""
    target.mkdir(exist_ok=True)
    for path in config_folder(source).iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != INDEX:
            shutil.copy(path, target / path.name)


class Weights(Mapping[str, Tensor]):
    """Tensors by name, read on demand."""

    path: Path
    _where: dict[str, Any]
    """Name -> where the tensor is kept."""

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def part(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """The tensor between two indices of a dimension."""
        return self[name].narrow(dim, start, stop - start)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape without reading the tensor."""
        raise KeyError(name)

    def dtype_of(self, name: str) -> torch.dtype:
        """Type without reading the tensor."""
        raise KeyError(name)


class SafetensorsFile:
    """One file, opened anew for every tensor: a mapping that stayed open would keep every page it ever read in memory.

    Raises:
        CheckpointError: missing, cut short or damaged, or a tensor that is no floating point number of 16 or 32 bits.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"'{path.parent}' has no file '{path.name}'")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        with self._open() as handle:
            for name in handle.keys():
                part = handle.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    raise CheckpointError(
                        f"'{path}': tensor '{name}' has type {part.get_dtype()}; known: {', '.join(_DTYPES)}"
                    )
                self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), _DTYPES[part.get_dtype()]

    def read(self, name: str) -> Tensor:
        with self._open() as handle:
            return handle.get_tensor(name)

    def read_part(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        with self._open() as handle:
            return handle.get_slice(name)[(slice(None),) * dim + (slice(start, stop),)]

    def _open(self):
        try:
            return safe_open(str(self.path), framework="pt")
        except Exception as error:  # safetensors raises its own type for every kind of damage
            raise CheckpointError(f"'{self.path}' is not a whole safetensors file ({error})") from None


class HuggingFaceWeights(Weights):
    """A Hugging Face folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        index = self.path / INDEX
        files = ["model.safetensors"]
        if index.is_file():
            weight_map = read_json(index, "weight_map")["weight_map"]
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"'{index}' is not a safetensors index")
            files = sorted(set(weight_map.values()))
        self._where = {}
        for file in files:
            opened = SafetensorsFile(self.path / file)
            for name in opened.shapes:
                self._where[common_name(name)] = (opened, name)

    def __getitem__(self, name: str) -> Tensor:
        file, stored = self._where[name]
        return file.read(stored)

    def part(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        file, stored = self._where[name]
        return file.read_part(stored, dim, start, stop)

    def shape_of(self, name: str) -> tuple[int, ...]:
        file, stored = self._where[name]
        return file.shapes[stored]

    def dtype_of(self, name: str) -> torch.dtype:
        file, stored = self._where[name]
        return file.dtypes[stored]


def common_name(name: str) -> str:
    """The project's name of a weight, from any of those that transformers and the hub have had for it."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


class SafetensorsWriter:
    """Writes one safetensors file tensor by tensor, in the announced order, so that only one tensor is in memory.

    Args:
        path: file to write.
        entries: (name, dtype, shape) of every tensor in the order of `add`.
    """

    def __init__(self, path: Path, entries: Sequence[tuple[str, torch.dtype, Sequence[int]]]):
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        self._expected = []
        for name, dtype, shape in entries:
            size = dtype.itemsize
            for dimension in shape:
                size *= dimension
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            self._expected.append((name, dtype, tuple(shape)))
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._next, self._file = 0, open(path, "wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def add(self, name: str, tensor: Tensor) -> int:
        """Append the next tensor; returns its bytes."""
        wanted = self._expected[self._next]
        assert (name, tensor.dtype, tuple(tensor.shape)) == wanted, f"{name} {tuple(tensor.shape)} instead of {wanted}"
        self._next += 1
        data = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
        self._file.write(memoryview(data.numpy()))
        return data.numel()

    def close(self, sync: bool = False) -> None:
        """Check that nothing is missing; `sync`: come back when the file is on the disk."""
        self._file.flush()
        if sync:
            os.fsync(self._file.fileno())
        self._file.close()
        assert self._next == len(self._expected), "not every announced tensor was written"
