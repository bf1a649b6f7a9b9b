"""Hugging Face folders: weights read by name, and folders written file by file.

Both kinds of model folder, Hugging Face and Megatron, are read through one mapping from common names to tensors,
`Weights`. Loading, converting, resharding and comparing are therefore the same code for both. Common names are
`model.layers..`, `visual..` and `lm_head..`, like those of Qwen2.5-VL on the hub. `Family.hub_name` gives the names
that other families have there.

`HuggingFaceWeights` is the one place that decides which of the stored tensors are the model's. What stock transformers
(5.23) loads without ambiguity is read alike: buffers of rotary frequencies are ignored, and a tied head may be stored
too. What it settles with a warning or in silence (a tied head that differs, two names of one weight, a single file
beside shards) is refused.
"""

import json
import re
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional, Sequence

import torch
from torch import Tensor

from megatron_ral.data.format_tags import export_tokenizer
from megatron_ral.errors import CheckpointError
from megatron_ral.models.families import FAMILIES
from megatron_ral.models.folder import ADAPTER, config_folder, foreign_content, read_json
from megatron_ral.models.shape import ModelShape, read_shape
from megatron_ral.weights.safetensors_files import SafetensorsFile, SafetensorsWriter, TensorEntry

INDEX = "model.safetensors.index.json"
"""File that names the weight file of each tensor."""


SINGLE = "model.safetensors"
"""File of a folder whose weights are in one file."""
_TIED = EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_SPELLINGS = tuple(dict.fromkeys(pair for family in FAMILIES.values() for pair in family.spellings))
"""Beginnings of names that transformers and the hub have used, and the common ones."""
_UNUSED = tuple({start for family in FAMILIES.values() for start in family.unused_weights})
"""Beginnings of the names of stored weights that some family leaves out."""
_BUFFER = re.compile(r"rotary(_pos)?_emb\.inv_freq$")
"""Rotary frequencies, which old versions of transformers stored and every version computes from config.json."""
_ROWS_COMPARED = 4096
"""Rows of the embedding in memory at a time, when it is compared with a stored head."""


def common_name(name: str) -> str:
    """Return the common name of a weight, from any name that transformers and the hub have used for it."""
    for stored, common in _SPELLINGS:
        if name.startswith(stored):
            return common + name[len(stored) :]
    return name


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and Path(value).name == value


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
        CheckpointError: a file is missing or damaged, a tensor has a type that weights cannot have, or it is not clear
            which of several tensors is meant.
        ConfigError: config.json cannot be used.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        where: dict[str, tuple[SafetensorsFile, str]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for opened in self._files():
            for name in opened.shapes:
                if _BUFFER.search(name) or (
                    name.startswith(_UNUSED) and name.startswith(self._shape.family.unused_weights)
                ):
                    continue
                common = common_name(name)
                if common in where:
                    file, other = where[common]
                    raise self._error(
                        f"holds the weight '{common}' twice, as '{other}' in '{file.path.name}' and '{name}' in "
                        f"'{opened.path.name}'; remove the one that is not meant"
                    )
                where[common] = (opened, name)
                self._dtypes[common] = opened.dtype_of(name)
        self._where = where
        if HEAD in where and self._shape.tie_word_embeddings:
            self._settle_tied_head(where)

    def _files(self) -> list[SafetensorsFile]:
        """Return the weight files of the folder, each checked against the index where there is one."""
        index, single = self.path / INDEX, self.path / SINGLE
        if (self.path / ADAPTER).is_file():
            raise self._error(f": {foreign_content(self.path)}; where it is merged already, remove '{ADAPTER}'")
        if not index.is_file():
            found = "" if single.is_file() else foreign_content(self.path)
            if found:
                raise self._error(f"has no file '{SINGLE}': {found}")
            return [SafetensorsFile(single)]
        weight_map = read_json(index, "weight_map")["weight_map"]
        if not weight_map or not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
            raise CheckpointError(f"'{index}'", None, "is not a safetensors index")
        names = sorted(set(weight_map.values()))
        if single.is_file() and names != [SINGLE]:
            raise self._error(
                f"holds weights twice: '{SINGLE}', which stock transformers would load, and '{INDEX}' with the shards "
                f"it names ({names[0]}, ..); remove the one that is not meant"
            )
        files = {name: SafetensorsFile(self.path / name) for name in names}
        for name, file in weight_map.items():
            if name not in files[file]:
                other = next((found for found, opened in files.items() if name in opened), None)
                place = f"that is in '{other}'" if other else "that no file holds"
                raise self._error(
                    f": '{INDEX}' names '{file}' for the tensor '{name}', {place}; index and files are not of one "
                    "export, copy the folder again"
                )
        return list(files.values())

    @cached_property
    def _shape(self) -> ModelShape:
        """Shape of the folder's model, read where it is first needed."""
        return read_shape(str(self.path))

    def _settle_tied_head(self, where: dict[str, tuple[SafetensorsFile, str]]) -> None:
        """Leave out a stored head that is the embedding; let it stand for an embedding that is not stored."""
        if EMBEDDING not in where:
            where[EMBEDDING], self._dtypes[EMBEDDING] = where[HEAD], self._dtypes[HEAD]
        elif not self._same_head():
            raise self._error(
                f"holds '{HEAD}' with other values than '{EMBEDDING}' although config.json says tie_word_embeddings: "
                "true (stock transformers warns and uses both, other programs drop the head); set "
                "tie_word_embeddings to false there, in text_config too, to use the head, or remove it from the weights"
            )
        del where[HEAD], self._dtypes[HEAD]

    def _same_head(self) -> bool:
        if self.shape_of(HEAD) != self.shape_of(EMBEDDING):
            return False
        rows = self.shape_of(HEAD)[0]
        return all(
            torch.equal(*(self.part(name, 0, start, min(start + _ROWS_COMPARED, rows)).float() for name in _TIED))
            for start in range(0, rows, _ROWS_COMPARED)
        )

    def _error(self, remedy: str) -> CheckpointError:
        return CheckpointError(f"'{self.path}'", None, remedy)

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

    def finish(self, folder: Path, source: str | Path, format_tags: Optional[str] = None) -> None:
        """Write the index, and copy everything but the weights from a model folder.

        Args:
            folder: Folder that has the weight files.
            source: Model folder of either kind.
            format_tags: model.format_tags of a run, by which the tokenizer is edited; None: it is copied as it is.
        """
        weight_map = {entry.name: self.file_name(number) for number, file in enumerate(self.files) for entry in file}
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
        copy_config(source, folder)
        if format_tags is not None:
            export_tokenizer(config_folder(source), folder, format_tags)


def copy_config(source: str | Path, target: Path) -> None:
    """Copy everything of a model folder but its weights: config, tokenizer, processor, generation config."""
    target.mkdir(exist_ok=True)
    for path in config_folder(source).iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != INDEX:
            shutil.copy(path, target / path.name)
