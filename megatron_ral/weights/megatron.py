"""Megatron folders: one safetensors file per tensor rank and pipeline stage, read as if it were a Hugging Face folder.

tp_00_pp_00.safetensors ...   hf/ (config, tokenizer, processor)   megatron.json (manifest, written last)
"""

from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor

from megatron_ral.errors import CheckpointError
from megatron_ral.models.folder import MANIFEST, read_json
from megatron_ral.models.parameter_shapes import expected_shapes
from megatron_ral.models.shape import read_shape
from megatron_ral.weights.huggingface import Weights
from megatron_ral.weights.safetensors_files import SafetensorsFile
from megatron_ral.weights.tensor_table import StageTensor, stage_tables


def shard_file(tensor_rank: int, stage: int) -> str:
    """Return the name of the weight file of a tensor rank and pipeline stage."""
    return f"tp_{tensor_rank:02d}_pp_{stage:02d}.safetensors"


class MegatronWeights(Weights):
    """Weights of a Megatron folder: each parameter is joined over tensor ranks, then split into Hugging Face tensors.

    Raises:
        CheckpointError: a file is missing, cut short or damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        manifest = read_json(self.path / MANIFEST, "tensor_parallel", "pipeline_parallel", "files")
        self.tensor_size, self.pipeline_size = manifest["tensor_parallel"], manifest["pipeline_parallel"]
        for file, size in manifest["files"].items():
            if not (self.path / file).is_file() or (self.path / file).stat().st_size != size:
                raise CheckpointError(f"'{self.path}'", None, f": file '{file}' is missing or cut short")
        self.shape = read_shape(str(self.path))
        self._shapes = expected_shapes(self.shape)
        where: dict[str, tuple[int, StageTensor]] = {}
        self._tied: dict[str, tuple[int, StageTensor]] = {}
        """Tensors that a later stage holds a second time."""
        for stage, table in enumerate(stage_tables(self.shape, self.tensor_size, self.pipeline_size)):
            for tensor in table:
                for source in tensor.sources:
                    places = self._tied if source in where else where
                    places[source] = (stage, tensor)
        self._where = where
        self._files = {
            (rank, stage): SafetensorsFile(self.path / shard_file(rank, stage))
            for rank in range(self.tensor_size)
            for stage in range(self.pipeline_size)
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name, *self._where[name], first_rank=0)

    def copies(self, name: str) -> Iterator[Tensor]:
        """Yield the other copies of a tensor that is held several times: on all tensor ranks, or tied on two stages."""
        stage, tensor = self._where[name]
        if tensor.cut_dim is None:
            for rank in range(1, self.tensor_size):
                yield self._read(name, stage, tensor, first_rank=rank)
        if name in self._tied:
            yield self._read(name, *self._tied[name], first_rank=0)

    def _read(self, name: str, stage: int, tensor: StageTensor, first_rank: int) -> Tensor:
        ranks = range(self.tensor_size) if tensor.cut_dim is not None else (first_rank,)
        shards = (self._files[rank, stage].read(tensor.name) for rank in ranks)
        full = tensor.join(shards, self.tensor_size)
        return tensor.split(full)[tensor.sources.index(name)]

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype_of(self, name: str) -> torch.dtype:
        stage, tensor = self._where[name]
        return self._files[0, stage].dtype_of(tensor.name)
