"""Values that lie beside parameters (master weights, moments, averages) from one layout in another, by byte ranges.

ZeRO-3 cuts a tensor rank's parameter, flattened, into equal pieces over data-parallel ranks, the last one padded. A rank
of the new layout wants one such piece; `pieces` says which rectangles of which old tensor ranks' parameters it is made
of, and `ReshardedState` reads just these from the old ranks' files. Nothing is computed: every number is copied.

Both layouts hold parts of one and the same matrix: fused tensors are interleaved per key/value group or joined in equal
blocks whatever the number of tensor ranks, and only the padding of the vocabulary differs. Padding is filled with zeros,
which it has from the start: its logits are masked, so that it never gets a gradient.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Optional, Protocol

import torch
from torch import Tensor

from megatron_ral.errors import CheckpointError
from megatron_ral.models.shape import ModelShape
from megatron_ral.parallel.rank_layout import RankLayout
from megatron_ral.runtime.progress import tick
from megatron_ral.weights.conversion import expected_shapes, stage_tables
from megatron_ral.weights.tensor_table import StageTensor

MAX_OPEN_FILES = 64


@dataclass(frozen=True)
class HeldParameter:
    """A parameter as one tensor rank of a layout holds it, seen as a matrix of its first dimension by the rest."""

    tensor: StageTensor
    stage: int
    """The first pipeline stage that holds it."""
    tensor_size: int
    shape: tuple[int, ...]
    """Of one tensor rank's part."""
    real_rows: int
    """Rows over all tensor ranks in each of `tensor.interleaved` blocks, without padding of the vocabulary."""

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def width(self) -> int:
        return self.numel // self.shape[0]

    @property
    def block_rows(self) -> int:
        """Rows of one block on one tensor rank."""
        return self.shape[0] // self.tensor.interleaved

    def shard_size(self, data_size: int) -> int:
        """Numbers in one data-parallel rank's piece."""
        return -(-self.numel // data_size)


def held_parameters(shape: ModelShape, tensor_size: int, pipeline_size: int) -> list[dict[str, HeldParameter]]:
    """Parameters of each pipeline stage by their names in it."""
    sizes, stages = expected_shapes(shape), []
    for stage, table in stage_tables(shape, tensor_size, pipeline_size):
        stages.append({})
        for tensor in table:
            sources = [torch.empty(sizes[source], device="meta") for source in tensor.sources]
            part = tensor.cut(tensor.merge(sources), 0, tensor_size)
            cut_rows = tensor_size if tensor.cut_dim == 0 else 1
            real_rows = min(sum(source.shape[0] for source in sources), part.shape[0] * cut_rows) // tensor.interleaved
            stages[-1][tensor.name] = HeldParameter(tensor, stage, tensor_size, tuple(part.shape), real_rows)
    return stages


@dataclass(frozen=True)
class Rectangle:
    """Numbers of an old tensor rank's parameter, and where they go in the new piece."""

    tensor_rank: int
    row: int
    column: int
    rows: int
    columns: int
    target: int
    """Place of the first number in the new piece; the next row is one width of the new part further."""


def pieces(old: HeldParameter, new: HeldParameter, tensor_rank: int, start: int, stop: int) -> Iterator[Rectangle]:
    """What the numbers [start, stop) of the flattened part of `tensor_rank` in the new layout are made of.

    Padding, of the vocabulary or at the end of a flattened part, is in no rectangle.
    """
    assert old.real_rows == new.real_rows and old.tensor.cut_dim == new.tensor.cut_dim
    for row, rows, column, columns in _bands(start, min(stop, new.numel), new.width):
        for old_rank_rows, old_row, count, new_row in _rows(old, new, tensor_rank, row, rows):
            for old_rank_columns, old_column, width, new_column in _columns(old, new, tensor_rank, column, columns):
                yield Rectangle(
                    old_rank_rows + old_rank_columns,
                    old_row,
                    old_column,
                    count,
                    width,
                    new_row * new.width + new_column - start,
                )


def _bands(start: int, stop: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """(row, rows, column, columns) of at most three rectangles that a flat range of a matrix consists of."""
    while start < stop:
        row, column = divmod(start, width)
        if column or stop - start < width:
            columns = min(width - column, stop - start)
            yield row, 1, column, columns
            start += columns
        else:
            rows = (stop - start) // width
            yield row, rows, 0, width
            start += rows * width


def _rows(
    old: HeldParameter, new: HeldParameter, tensor_rank: int, row: int, rows: int
) -> Iterator[tuple[int, int, int, int]]:
    """(old tensor rank, its row, rows, new row) for rows of the new part. Rank 0 where rows are not cut."""
    if new.tensor.cut_dim != 0:
        yield 0, row, rows, row
        return
    end = row + rows
    while row < end:
        block, inside = divmod(row, new.block_rows)
        place = tensor_rank * new.block_rows + inside
        if place >= new.real_rows:  # padding up to the end of the block
            row += new.block_rows - inside
            continue
        old_rank, old_inside = divmod(place, old.block_rows)
        count = min(end - row, new.block_rows - inside, old.block_rows - old_inside, new.real_rows - place)
        yield old_rank, block * old.block_rows + old_inside, count, row
        row += count


def _columns(
    old: HeldParameter, new: HeldParameter, tensor_rank: int, column: int, columns: int
) -> Iterator[tuple[int, int, int, int]]:
    """(old tensor rank, its column, columns, new column) for columns of the new part. Rank 0 where they are not cut."""
    if new.tensor.cut_dim != 1:
        yield 0, column, columns, column
        return
    end = column + columns
    while column < end:
        old_rank, old_column = divmod(tensor_rank * new.width + column, old.width)
        count = min(end - column, old.width - old_column)
        yield old_rank, old_column, count, column
        column += count


class ShardFile:
    """One rank's safetensors file, of which stretches of float32 tensors are read, without a mapping into memory.

    Raises:
        CheckpointError: no safetensors file, or (when read) a tensor that is not there or shorter.
    """

    def __init__(self, path: Path):
        self.path, self._file = path, None
        try:
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(length, path.stat().st_size)))
            self._where = {
                name: (item["dtype"], tuple(item["shape"]), 8 + length + item["data_offsets"][0])
                for name, item in header.items()
                if name != "__metadata__"
            }
        except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"'{path}' is not a whole safetensors file ({error!r})") from None

    @property
    def is_open(self) -> bool:
        return self._file is not None

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self._where[name][1]

    def read_into(self, name: str, start: int, target: Tensor) -> None:
        """Fill a contiguous flat float32 tensor with the numbers of `name` from `start`."""
        dtype, shape, begin = self._where.get(name, ("nothing", (0,), 0))
        if dtype != "F32" or start + len(target) > torch.Size(shape).numel():
            raise CheckpointError(
                f"'{self.path}' has no float32 tensor '{name}' of {start + len(target):,} numbers; it is "
                "damaged or of another model"
            )
        if self._file is None:
            self._file = open(self.path, "rb", buffering=0)
        self._file.seek(begin + 4 * start)
        view = memoryview(target.numpy()).cast("B")
        while view:
            count = self._file.readinto(view)
            if not count:
                raise CheckpointError(f"'{self.path}' is cut short in tensor '{name}'")
            view = view[count:]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class StateSource(Protocol):
    """Where an engine's state comes from; a dict is one."""

    def get(self, key: str) -> Optional[Tensor]:
        """The shard of a key, None where there is none."""


def fitting_shard(state: StateSource, key: str, numel: int) -> Tensor:
    """The shard of a key.

    Raises:
        CheckpointError: there is none, or it has not `numel` numbers.
    """
    tick()
    value = state.get(key)
    if value is None or value.numel() != numel:
        found = "none" if value is None else f"one of {value.numel():,}"
        raise CheckpointError(
            f"the checkpoint should have a shard '{key}' of {numel:,} numbers, but has {found}; it is "
            "damaged or of another model"
        )
    return value


class OwnShards:
    """One rank's state in the layout it was saved in, read tensor by tensor from its file."""

    def __init__(self, path: Path):
        self._file = ShardFile(path)

    def get(self, key: str) -> Optional[Tensor]:
        if key not in self._file:
            return None
        value = torch.empty(self._file.shape_of(key))
        self._file.read_into(key, 0, value.view(-1))
        return value

    def close(self) -> None:
        self._file.close()


class ReshardedState:
    """One rank's state in a new layout, read from the files of all ranks of an old one when it is asked for.

    Keys hold a parameter's name as one of their parts between slashes (`<name>/exp_avg`, `ema/<name>`); a key without is a
    number that is the same on all ranks. In memory are the tensor that was asked for and at most one old tensor rank's
    share of it.

    Args:
        shape: model.
        old: layout of the files, of any rank.
        new: this rank's place now.
        file_of: path of an old rank's file.
    """

    def __init__(self, shape: ModelShape, old: RankLayout, new: RankLayout, file_of: Callable[[int], Path]):
        self._old_layout, self._new_layout, self._file_of = old, new, file_of
        self._new = held_parameters(shape, new.tensor_size, new.pipeline_size)[new.pipeline_rank]
        self._old: dict[tuple[str, ...], HeldParameter] = {}
        for stage in held_parameters(shape, old.tensor_size, old.pipeline_size):
            for parameter in stage.values():
                self._old.setdefault(parameter.tensor.sources, parameter)
        self._files: dict[int, ShardFile] = {}
        self.num_bytes_read = 0

    def get(self, key: str) -> Optional[Tensor]:
        """This rank's piece, [ceil(numbers of its tensor rank / data-parallel ranks)] float32; None where the files have
        no such key.

        Raises:
            CheckpointError: a file is damaged or of another model.
        """
        name = next((part for part in key.split("/") if part in self._new), None)
        if name is None:
            return self._scalar(key)
        new, place = self._new[name], self._new_layout
        old = self._old[new.tensor.sources]
        old_key = "/".join(old.tensor.name if part == name else part for part in key.split("/"))
        if old_key not in self._file(self._old_layout.rank_of(0, 0, old.stage)):
            return None
        size = new.shard_size(place.data_size)
        start = place.data_rank * size
        result = torch.zeros(size)
        for part in pieces(old, new, place.tensor_rank, start, start + size):
            self._fill(result.as_strided((part.rows, part.columns), (new.width, 1), part.target), old, old_key, part)
        return result

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _scalar(self, key: str) -> Optional[Tensor]:
        if key not in self._file(0):
            return None
        value = torch.empty(1)
        self._file(0).read_into(key, 0, value)
        return value[0]

    def _fill(self, target: Tensor, old: HeldParameter, key: str, part: Rectangle) -> None:
        """Copy a rectangle; whole rows of the old part are one stretch of its numbers, others one for each row."""
        start = part.row * old.width + part.column
        if part.columns < old.width and part.rows > 1:
            for row in range(part.rows):
                self._read(target[row], old, key, part.tensor_rank, start + row * old.width)
        elif target.is_contiguous():
            self._read(target.view(-1), old, key, part.tensor_rank, start)
        else:
            values = torch.empty(part.rows, part.columns)
            self._read(values.view(-1), old, key, part.tensor_rank, start)
            target.copy_(values)

    def _read(self, target: Tensor, old: HeldParameter, key: str, tensor_rank: int, start: int) -> None:
        """Fill `target` with numbers of an old tensor rank's flattened part, joined from its data-parallel pieces."""
        size, done = old.shard_size(self._old_layout.data_size), 0
        while done < len(target):
            data_rank, inside = divmod(start + done, size)
            count = min(len(target) - done, size - inside)
            file = self._file(self._old_layout.rank_of(tensor_rank, data_rank, old.stage))
            file.read_into(key, inside, target[done : done + count])
            done += count
        self.num_bytes_read += 4 * done

    def _file(self, rank: int) -> ShardFile:
        if rank not in self._files:
            self._files[rank] = ShardFile(self._file_of(rank))
        file = self._files[rank]
        if not file.is_open and sum(other.is_open for other in self._files.values()) >= MAX_OPEN_FILES:
            self.close()
        return file
