"""Hugging Face folders: weights read by name, and folders written file by file.

Both kinds of model folder, Hugging Face and Megatron, are read through one mapping from common names to tensors,
`Weights`. Loading, converting, resharding and comparing are therefore the same code for both. Common names are
`model.layers..`, `visual..` and `lm_head..`, like those of Qwen2.5-VL on the hub. `Family.hub_name` gives the names
that other families have there.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megatron_ral.errors import CheckpointError
from megatron_ral.models.folder import config_folder, read_json
from megatron_ral.weights.safetensors_files import SafetensorsFile, SafetensorsWriter, TensorEntry

INDEX = "model.safetensors.index.json"
"""File that names the weight file of each tensor."""


def common_name(name: str) -> str:
    """Return the common name of a weight, from any name that transformers and the hub have used for it."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


class Weights(Mapping[str, Tensor]):
    """Tensors of a model folder by common name, read on demand."""

    path: Path
    """Folder of the weights."""
    _where: Mapping[str, Any]
    """Common name -> place of the tensor, in a form that each subclass chooses."""

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def part(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Return a tensor between two indices of a dimension."""
        return self[name].narrow(dim, start, stop - start)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        raise KeyError(name)

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the type of a tensor without reading it."""
        raise KeyError(name)


class HuggingFaceWeights(Weights):
    """Weights of a Hugging Face folder, with an index or in one file.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor has a type that weights cannot have.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        index = self.path / INDEX
        files = ["model.safetensors"]
        if index.is_file():
            weight_map = read_json(index, "weight_map")["weight_map"]
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"'{index}'", None, "is not a safetensors index")
            files = sorted(set(weight_map.values()))
        where: dict[str, tuple[SafetensorsFile, str]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for file in files:
            opened = SafetensorsFile(self.path / file)
            for name in opened.shapes:
                where[common_name(name)] = (opened, name)
                self._dtypes[common_name(name)] = opened.dtype_of(name)
        self._where = where

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
        return self._dtypes[name]


@dataclass(frozen=True)
class HuggingFacePlan:
    """Contents of a Hugging Face folder to write: the tensors of each weight file, by their names on the hub.

    Ranks that write one file each derive the same plan, so that they need not exchange it.
    """

    files: Sequence[Sequence[TensorEntry]]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for entries in self.files for entry in entries)

    def file_name(self, number: int) -> str:
        """Return the name of a weight file, numbered from 0 here and from 1 in its name."""
        return f"model-{number + 1:05d}-of-{len(self.files):05d}.safetensors"

    def open_file(self, folder: Path, number: int) -> SafetensorsWriter:
        """Return the writer of a weight file, numbered from 0."""
        return SafetensorsWriter(folder / self.file_name(number), self.files[number])

    def finish(self, folder: Path, source: str | Path) -> None:
        """Write the index, and copy everything but the weights from the model folder `source`."""
        weight_map = {entry.name: self.file_name(number) for number, file in enumerate(self.files) for entry in file}
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
        copy_config(source, folder)


def copy_config(source: str | Path, target: Path) -> None:
    """Copy everything of a model folder but its weights: config, tokenizer, processor, generation config."""
    target.mkdir(exist_ok=True)
    for path in config_folder(source).iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != INDEX:
            shutil.copy(path, target / path.name)
