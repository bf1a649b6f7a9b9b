"""Read and write single safetensors files, tensor by tensor. Nothing is unpickled.

File format: 8 bytes with the length of the header, a JSON header with the type, shape and byte range of each tensor,
and the bytes of the tensors. Source: https://github.com/huggingface/safetensors#format.

Reading departs from the `safetensors` package because a file that the package holds open is mapped into memory, and
keeps every page that was ever read from it. Here only the bytes that are asked for are read.
"""

import json
import math
import os
import struct
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from megatron_ral.errors import CheckpointError

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Types that weights may have, and their names in a file."""
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class TensorEntry(NamedTuple):
    """Name, type and shape of one tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor in the file."""
        return self.dtype.itemsize * math.prod(self.shape)


class SafetensorsFile:
    """Reader of one safetensors file.

    The file is opened for each read and closed again, unless `open` was called. Use `open` and `close` around many
    small reads.

    Raises:
        CheckpointError: the file is missing, cut short or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: Optional[FileIO] = None
        if not path.is_file():
            raise CheckpointError(f"'{path.parent}'", None, f"has no file '{path.name}'")
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shape of each tensor, by name in alphabetical order."""
        self._dtype_names: dict[str, str] = {}
        self._begins: dict[str, int] = {}
        """Position of each tensor's first byte in the file."""
        try:
            self._read_header()
        except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"'{path}'", None, f"is not a whole safetensors file ({error!r})") from None

    def _read_header(self) -> None:
        size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if 8 + length > size:
                raise ValueError("cut short in its header")
            header = json.loads(file.read(length))
        total, ranges = 0, []
        for name, item in sorted(header.items()):
            if name == "__metadata__":
                continue
            dtype_name, shape, (begin, stop) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
            known = _DTYPES.get(dtype_name)
            if known is not None and stop - begin != TensorEntry(name, known, shape).num_bytes:
                raise ValueError(f"'{name}' has {stop - begin} bytes for shape {shape} of {dtype_name}")
            self.shapes[name], self._dtype_names[name], self._begins[name] = shape, dtype_name, 8 + length + begin
            total += stop - begin
            ranges.append((begin, stop))
        if 8 + length + total != size:
            raise ValueError(f"{size} bytes instead of {8 + length + total}")
        if any(begin != end for (begin, _), (_, end) in zip(sorted(ranges), [(0, 0), *sorted(ranges)])):
            raise ValueError("its tensors overlap or leave a gap")

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the type of a tensor.

        Raises:
            CheckpointError: the tensor is no floating-point number of 16 or 32 bits.
        """
        dtype = _DTYPES.get(self._dtype_names[name])
        if dtype is None:
            raise CheckpointError(
                f"'{self.path}'",
                None,
                f": tensor '{name}' has type {self._dtype_names[name]}; known: {', '.join(_DTYPES)}; give the folder "
                "of the unquantized model",
            )
        return dtype

    def read(self, name: str) -> Tensor:
        """Return a whole tensor."""
        value = torch.empty(self.shapes[name], dtype=self.dtype_of(name))
        self._fill(name, [(0, value.view(-1))])
        return value

    def read_part(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Return a tensor between two indices of a dimension, reading no other bytes."""
        shape = self.shapes[name]
        outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
        value = torch.empty((*shape[:dim], stop - start, *shape[dim + 1 :]), dtype=self.dtype_of(name))
        rows = value.view(outer, (stop - start) * inner)
        self._fill(name, [((row * shape[dim] + start) * inner, rows[row]) for row in range(outer)])
        return value

    def read_into(self, name: str, start: int, target: Tensor) -> None:
        """Fill a flat contiguous float32 tensor with the numbers of a flattened float32 tensor from index `start`.

        Raises:
            CheckpointError: the file has no float32 tensor of this name that is long enough.
        """
        if self._dtype_names.get(name) != "F32" or start + len(target) > math.prod(self.shapes[name]):
            raise CheckpointError(
                f"'{self.path}'",
                None,
                f"has no float32 tensor '{name}' of {start + len(target):,} numbers; it is damaged or of another model",
            )
        self._fill(name, [(start, target)])

    def open(self) -> None:
        """Hold the file open until `close`."""
        if self._file is None:
            self._file = FileIO(self.path)

    @property
    def is_open(self) -> bool:
        """True between `open` and `close`."""
        return self._file is not None

    def close(self) -> None:
        """Close the file. It may be opened again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @contextmanager
    def _opened(self) -> Iterator[FileIO]:
        if self._file is not None:
            yield self._file
        else:
            with FileIO(self.path) as file:
                yield file

    def _fill(self, name: str, stretches: Sequence[tuple[int, Tensor]]) -> None:
        """Read stretches of a flattened tensor: (index of the first number, flat contiguous target)."""
        with self._opened() as file:
            for start, target in stretches:
                view = _bytes_of(target)
                file.seek(self._begins[name] + start * target.itemsize)
                while view:
                    count = file.readinto(view)
                    if not count:
                        raise CheckpointError(f"'{self.path}'", None, f"is cut short in tensor '{name}'")
                    view = view[count:]


class SafetensorsWriter:
    """Writer of one safetensors file that needs only one tensor in memory at a time.

    Args:
        path: File to write.
        entries: All tensors of the file in the order of their bytes. They may be added in any order.
    """

    def __init__(self, path: Path, entries: Sequence[tuple[str, torch.dtype, Sequence[int]]]):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._missing: dict[str, tuple[int, TensorEntry]] = {}
        """Position of the first byte, and entry, of each tensor that has not been added."""
        offset = 0
        for name, dtype, shape in entries:
            entry = TensorEntry(name, dtype, tuple(shape))
            end = offset + entry.num_bytes
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            self._missing[name] = offset, entry
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = open(path, "wb")  # noqa: SIM115  # stays open between calls of `add`; `close` closes it
        self._begin = 8 + len(text)
        self._file.write(struct.pack("<Q", len(text)) + text)

    def add(self, name: str, tensor: Tensor) -> int:
        """Write one of the announced tensors. Return its number of bytes."""
        offset, entry = self._missing.pop(name)
        assert (tensor.dtype, tuple(tensor.shape)) == entry[1:], f"{name} {tuple(tensor.shape)} instead of {entry}"
        data = _bytes_of(tensor.detach().contiguous().cpu().view(-1))
        self._file.seek(self._begin + offset)
        self._file.write(data)
        return len(data)

    def close(self, sync: bool = False) -> None:
        """Close the file and check that every announced tensor was added.

        Args:
            sync: Return only when the file is on the disk.
        """
        self._file.flush()
        if sync:
            os.fsync(self._file.fileno())
        self._file.close()
        assert not self._missing, f"not every announced tensor was written: {list(self._missing)}"


def _bytes_of(flat: Tensor) -> memoryview:
    """Return the memory of a flat contiguous tensor on the host."""
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)
