"""Read optimizer state that was saved in one layout into another layout, by byte ranges.

The state of a parameter has the parameter's shape: master weights, moments, averages. ZeRO-3 flattens the part of a
parameter that one tensor rank holds, and divides it into equal shards over data-parallel ranks, the last one padded. A
rank of the new layout needs one such shard. `source_rectangles` computes which rectangles of which old tensor ranks'
parts it consists of, and `ReshardedState` reads only these from the old ranks' files. Every number is copied as it is.

Both layouts divide the same matrix: fused tensors are interleaved per key/value head or joined in equal blocks for any
number of tensor ranks, and only the padding of the vocabulary differs. Padding is filled with zeros. It was zero from
the start and never gets a gradient, because its logits are masked.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Optional, Protocol

import torch
from torch import Tensor

from megatron_ral.errors import CheckpointError
from megatron_ral.models.parameter_shapes import stored_shapes
from megatron_ral.models.shape import ModelShape
from megatron_ral.parallel.rank_layout import RankLayout
from megatron_ral.runtime.progress import tick
from megatron_ral.weights.safetensors_files import SafetensorsFile
from megatron_ral.weights.tensor_table import StageTensor, stage_tables

MAX_OPEN_FILES = 64
"""Number of files of old ranks that one rank holds open."""


@dataclass(frozen=True)
class HeldParameter:
    """Part of a parameter that one tensor rank holds, as a matrix of its first dimension by all others."""

    tensor: StageTensor
    """Entry of the parameter in the table of its stage."""
    stage: int
    """First pipeline stage that holds the parameter."""
    tensor_size: int
    """Number of tensor-parallel ranks."""
    shape: tuple[int, ...]
    """Shape of one tensor rank's part."""
    real_rows: int
    """Number of rows over all tensor ranks in each of `tensor.interleaved` blocks, without the vocabulary's padding."""

    @property
    def numel(self) -> int:
        """Number of values of one tensor rank's part."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Number of columns of one tensor rank's part."""
        return self.numel // self.shape[0]

    @property
    def block_rows(self) -> int:
        """Number of rows of one block on one tensor rank."""
        return self.shape[0] // self.tensor.interleaved

    def shard_size(self, data_size: int) -> int:
        """Return the number of values of one data-parallel rank's shard, padding included."""
        return -(-self.numel // data_size)


def held_parameters(shape: ModelShape, tensor_size: int, pipeline_size: int) -> list[dict[str, HeldParameter]]:
    """Return the parameters of each pipeline stage, by their names in the stage."""
    sizes = stored_shapes(shape)
    stages: list[dict[str, HeldParameter]] = []
    for stage, table in enumerate(stage_tables(shape, tensor_size, pipeline_size)):
        stages.append({})
        for tensor in table:
            part = tensor.shard_shape(sizes.__getitem__, tensor_size)
            rows = tensor.real_rows or part[0] * (tensor_size if tensor.cut_dim == 0 else 1)
            real_rows = rows // tensor.interleaved
            stages[-1][tensor.name] = HeldParameter(tensor, stage, tensor_size, part, real_rows)
    return stages


@dataclass(frozen=True)
class Rectangle:
    """Rectangle of an old tensor rank's part, and its place in a shard of the new layout."""

    tensor_rank: int
    """Old tensor rank."""
    row: int
    """First row in the old part."""
    column: int
    """First column in the old part."""
    rows: int
    """Number of rows."""
    columns: int
    """Number of columns."""
    target: int
    """Index of the first value in the new shard. The next row begins one width of the new part later."""


def source_rectangles(
    old: HeldParameter, new: HeldParameter, tensor_rank: int, start: int, stop: int
) -> Iterator[Rectangle]:
    """Yield the rectangles of the old layout that the new layout's values [start, stop) consist of.

    No rectangle covers padding, neither of the vocabulary nor at the end of a flattened part.

    Args:
        old: Parameter in the old layout.
        new: The same parameter in the new layout.
        tensor_rank: Tensor rank of the new layout.
        start: First index into the flattened part of `tensor_rank`.
        stop: Index after the last.
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
    """Yield at most three rectangles that a flat range of a matrix consists of: (row, rows, column, columns)."""
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
    """Yield (old tensor rank, its row, rows, new row) for rows of the new part. Uncut rows are read from rank 0."""
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
    """Yield (old tensor rank, its column, columns, new column) for columns of the new part, like `_rows`."""
    if new.tensor.cut_dim != 1:
        yield 0, column, columns, column
        return
    end = column + columns
    while column < end:
        old_rank, old_column = divmod(tensor_rank * new.width + column, old.width)
        count = min(end - column, old.width - old_column)
        yield old_rank, old_column, count, column
        column += count


class StateSource(Protocol):
    """Source of an engine's state, for instance a dict."""

    def get(self, key: str, /) -> Optional[Tensor]:
        """Return this rank's shard of a key, or None if there is none."""


def fitting_shard(state: StateSource, key: str, numel: int) -> Tensor:
    """Return this rank's shard of a key.

    Raises:
        CheckpointError: there is no such shard, or it does not have `numel` values.
    """
    tick()
    value = state.get(key)
    if value is None or value.numel() != numel:
        found = "none" if value is None else f"one of {value.numel():,}"
        raise CheckpointError(
            "the checkpoint",
            None,
            f"should have a shard '{key}' of {numel:,} numbers, but has {found}; it is damaged or of another model",
        )
    return value


class OwnShards:
    """State of one rank in the layout in which it was saved, read tensor by tensor from the rank's own file.

    Raises:
        CheckpointError: the file is missing, cut short or damaged.
    """

    def __init__(self, path: Path):
        self._file = SafetensorsFile(path)
        self._file.open()

    def get(self, key: str) -> Optional[Tensor]:
        """Return the shard of a key in float32, or None if the file has no such key."""
        if key not in self._file:
            return None
        value = torch.empty(self._file.shapes[key])
        self._file.read_into(key, 0, value.view(-1))
        return value

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ReshardedState:
    """State of one rank in a new layout, read on demand from the files of all ranks of an old layout.

    A key has the name of a parameter between slashes, for instance `<name>/exp_avg`. A key without one names a single
    number that is equal on all ranks. Memory holds the tensor that is read and at most one old tensor rank's part.

    Args:
        shape: Shape of the model.
        old: Layout of the files, as any of its ranks sees it.
        new: New layout, as this rank sees it.
        file_of: Function from an old rank to the path of its file.
    """

    def __init__(self, shape: ModelShape, old: RankLayout, new: RankLayout, file_of: Callable[[int], Path]):
        self._old_layout, self._new_layout, self._file_of = old, new, file_of
        self._new = held_parameters(shape, new.tensor_size, new.pipeline_size)[new.pipeline_rank]
        self._old: dict[tuple[str, ...], HeldParameter] = {}
        for stage in held_parameters(shape, old.tensor_size, old.pipeline_size):
            for parameter in stage.values():
                self._old.setdefault(parameter.tensor.sources, parameter)
        self._files: dict[int, SafetensorsFile] = {}
        self.num_bytes_read = 0
        """Bytes read so far, headers not counted."""

    def get(self, key: str) -> Optional[Tensor]:
        """Return this rank's shard of a key, or None if the files have no such key.

        Returns:
            [ceil(values of this tensor rank / data-parallel ranks)] float32, or a 0-dim tensor for a single number.

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
        for part in source_rectangles(old, new, place.tensor_rank, start, start + size):
            self._fill(result.as_strided((part.rows, part.columns), (new.width, 1), part.target), old, old_key, part)
        return result

    def close(self) -> None:
        """Close all files. They are opened again when needed."""
        for file in self._files.values():
            file.close()

    def _scalar(self, key: str) -> Optional[Tensor]:
        if key not in self._file(0):
            return None
        value = torch.empty(1)
        self._file(0).read_into(key, 0, value)
        return value[0]

    def _fill(self, target: Tensor, old: HeldParameter, key: str, part: Rectangle) -> None:
        """Copy a rectangle. Whole rows of the old part are contiguous in its file; parts of rows are read singly."""
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
        """Fill `target` with values of an old tensor rank's flattened part, joined from its data-parallel shards."""
        size, done = old.shard_size(self._old_layout.data_size), 0
        while done < len(target):
            data_rank, inside = divmod(start + done, size)
            count = min(len(target) - done, size - inside)
            file = self._file(self._old_layout.rank_of(tensor_rank, data_rank, old.stage))
            file.read_into(key, inside, target[done : done + count])
            done += count
        self.num_bytes_read += 4 * done

    def _file(self, rank: int) -> SafetensorsFile:
        if rank not in self._files:
            self._files[rank] = SafetensorsFile(self._file_of(rank))
        file = self._files[rank]
        if not file.is_open:
            if sum(other.is_open for other in self._files.values()) >= MAX_OPEN_FILES:
                self.close()
            file.open()
        return file
