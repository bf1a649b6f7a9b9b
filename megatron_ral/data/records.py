"""Records of a data set as published, read one after the other from JSON, JSONL, parquet or Arrow files.

A source is one file, a folder of files (in the order of their names), or a data set that Hugging Face's
`save_to_disk` wrote. Such a data set is read as the Arrow files that it is: neither `datasets` nor a script of it runs.
"""

import json
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator

import numpy as np

from megatron_ral.data.issues import SampleError
from megatron_ral.data.layouts import record_id
from megatron_ral.data.shards import natural_order
from megatron_ral.errors import DataError

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".json", ".jsonl", ".parquet")
_SPLIT = re.compile("(train|test|validation|valid|val|dev|eval)(?=[-_.])")
_TABLES = (".parquet", ".arrow")
STATE, SPLITS, FEATURES = "state.json", "dataset_dict.json", "dataset_info.json"
"""Files of a saved Hugging Face data set, of one with splits, and with the meaning of the columns."""


def is_saved_dataset(path: Path) -> bool:
    """Return True for a folder that Hugging Face's `save_to_disk` wrote."""
    return (path / STATE).is_file() or (path / SPLITS).is_file()


def saved_split(folder: Path, split: str) -> Path:
    """Return the folder of a split of a saved Hugging Face data set, or of the data set if it has none.

    Raises:
        DataError: no such data set, or a split that is missing or not named.
    """
    if (folder / SPLITS).is_file():
        names = [str(name) for name in _json_object(folder / SPLITS).get("splits", [])]
        if split not in names:
            raise DataError("--split", split or None, f"is none of the splits of {folder}: {', '.join(names)}")
        folder = folder / split
    elif split:
        raise DataError("--split", split, f"is given, but {folder} is one data set without splits; leave it out")
    if not (folder / STATE).is_file():
        raise DataError("--hf-dataset", folder, f"holds no {STATE}; give a folder that save_to_disk wrote")
    return folder


def source_files(source: Path) -> list[Path]:
    """Return the files of a source in the order in which their records are read.

    Raises:
        DataError: a folder without any, or with several splits, or a saved data set whose rows were chosen by indices.
    """
    if not source.is_dir():
        return [source]
    if not (source / STATE).is_file():
        files = [file for file in source.iterdir() if file.suffix in SUFFIXES and file.is_file()]
        if not files:
            raise DataError("--input", source, f"holds no file of {', '.join(SUFFIXES)}")
        splits = sorted({match[1] for file in files if (match := _SPLIT.match(file.name))})
        if len(splits) > 1:
            raise DataError(
                "--input",
                source,
                f"holds files of several splits ({', '.join(splits)}); give one file, or a folder with those of one",
            )
        return sorted(files, key=lambda file: natural_order(file.name))
    state = _json_object(source / STATE)
    if state.get("_indices_data_files"):
        raise DataError("--hf-dataset", source, "holds chosen rows as indices; save it again with a newer `datasets`")
    names = [str(file["filename"]) for file in state.get("_data_files") or []]
    missing = [name for name in names if Path(name).name != name or not (source / name).is_file()]
    if missing:
        raise DataError(
            "--hf-dataset", source, f"names '{missing[0]}' in {STATE}, which is no file in it; copy it again"
        )
    return [source / name for name in names]


def count_records(source: Path) -> int:
    """Return the number of records in a source."""
    return sum(map(_count, source_files(source)))


def _count(path: Path) -> int:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        with _readable(path), pyarrow.parquet.ParquetFile(path) as file:
            return file.metadata.num_rows
    if path.suffix == ".arrow":
        return sum(batch.num_rows for _, batch in _batches(path))
    if path.suffix == ".jsonl":
        with open(path, "rb") as stream:
            return sum(1 for line in stream if _bare(line))
    return len(_json_list(path))


def read_records(source: Path) -> Iterator[Any]:
    """Yield the records in file order, with a SampleError in place of a line that is not JSON.

    Raises:
        DataError: a file as a whole cannot be read.
    """
    for path in source_files(source):
        if path.suffix in _TABLES:
            for schema, batch in _batches(path):
                features = _features(schema, path.parent)
                rounded = [field.name for field in schema if _is_short_float(field.type)]
                for record in batch.to_pylist():
                    for name in rounded:
                        record[name] = _shortest(record[name])
                    yield {name: _meant(value, features.get(name)) for name, value in record.items()}
        elif path.suffix == ".jsonl":
            with open(path, "rb") as stream:
                for line in filter(None, map(_bare, stream)):
                    try:
                        yield json.loads(line.decode("utf-8"))
                    except (ValueError, RecursionError) as error:
                        yield SampleError(f"the line is not JSON in UTF-8 ({error})", "unreadable_text")
        else:
            yield from _json_list(path)


def _bare(line: bytes) -> bytes:
    """Return a line without the mark of UTF-8 that other programs begin a file with, and without white space."""
    return line.removeprefix(b"\xef\xbb\xbf").strip()


def _batches(path: Path) -> Iterator[tuple["pyarrow.Schema", "pyarrow.RecordBatch"]]:
    """Yield the rows of a parquet file, or of an Arrow stream as `datasets` writes it, by 64.

    Raises:
        DataError: the file is damaged, or another.
    """
    import pyarrow
    import pyarrow.parquet

    with _readable(path):
        if path.suffix == ".parquet":
            with pyarrow.parquet.ParquetFile(path) as file:
                yield from ((file.schema_arrow, batch) for batch in file.iter_batches(64))
        else:
            with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
                for batch in stream:
                    yield from ((batch.schema, batch.slice(start, 64)) for start in range(0, batch.num_rows, 64))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise DataError in place of pyarrow's errors."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        option, kind = ("--input", "parquet") if path.suffix == ".parquet" else ("--hf-dataset", "an Arrow stream")
        text = " ".join(str(error).split()).rstrip(".")
        raise DataError(option, path, f"cannot be read as {kind} ({text}); copy or save it again") from None


def _features(schema: "pyarrow.Schema", folder: Path) -> dict[str, Any]:
    """Return the meaning of each column as `datasets` writes it; empty without."""
    info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
    if not info and (folder / FEATURES).is_file():
        info = _json_object(folder / FEATURES)
    return info.get("features") or {}


def _meant(value: Any, feature: Any) -> Any:
    """Return a value with the names of classes (`ClassLabel`) in place of their numbers; -1 means none."""
    if not isinstance(feature, dict) or value is None:
        return value
    if feature.get("_type") == "ClassLabel" and isinstance(value, int):
        names = feature["names"]
        return names[value] if 0 <= value < len(names) else None
    if isinstance(value, list):
        return [_meant(item, feature.get("feature")) for item in value]
    if isinstance(value, dict):
        return {name: _meant(item, feature.get(name)) for name, item in value.items()}
    return value


def _is_short_float(kind: "pyarrow.DataType") -> bool:
    import pyarrow

    kind = kind.value_type if pyarrow.types.is_list(kind) else kind
    return pyarrow.types.is_float32(kind)


def _shortest(value: Any) -> Any:
    """Return a number of 32 bits as the decimal number that was written: 0.1, not 0.10000000149011612."""
    if isinstance(value, list):
        return [_shortest(item) for item in value]
    return value if value is None else float(str(np.float32(value)))


def _json_object(path: Path) -> dict:
    found = _json(path, "--hf-dataset")
    if not isinstance(found, dict):
        raise DataError("--hf-dataset", path, "is not a JSON object; save the data set again")
    return found


def _json(path: Path, option: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        way = "; a file with one record per line must be named .jsonl" if "Extra data" in str(error) else ""
        raise DataError(option, path, f"is not JSON in UTF-8 ({error}){way}") from None


def _json_list(path: Path) -> list:
    records = _json(path, "--input")
    if not isinstance(records, list):
        raise DataError("--input", path, f"must hold a list of records, not {type(records).__name__}")
    return records


def keyed_records(source: Path, by_number: bool) -> Iterator[tuple[str, Any]]:
    """Yield pairs of key and record, or the SampleError in its place. The second record of a key is refused."""
    seen: set[str] = set()
    for number, record in enumerate(read_records(source)):
        name = None if by_number or isinstance(record, SampleError) else record_id(record)
        key = f"{number:08d}" if name is None else re.sub(r"[^A-Za-z0-9_-]+", "_", name)
        if key in seen:
            record = SampleError(
                f"record {number} has the key of an earlier one; --keys number gives keys of their own", "duplicate_key"
            )
        seen.add(key)
        yield key, record
