"""Records of a data set as published, read one after the other from JSON, JSONL, parquet or Arrow files.

A source is one file, a folder of files (in the order of their names), or a data set that Hugging Face's
`save_to_disk` wrote. Such a data set is read as the Arrow files that it is: neither `datasets` nor a script of it runs.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Sequence

from megatron_ral.data.issues import SampleError
from megatron_ral.data.layouts import record_id
from megatron_ral.data.shards import natural_order
from megatron_ral.errors import DataError

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".json", ".jsonl", ".parquet")
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
        DataError: a folder without any, or a saved data set whose rows were chosen by indices.
    """
    if not source.is_dir():
        return [source]
    if not (source / STATE).is_file():
        files = [file for file in source.iterdir() if file.suffix in SUFFIXES and file.is_file()]
        if not files:
            raise DataError("--input", source, f"holds no file of {', '.join(SUFFIXES)}")
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

        return pyarrow.parquet.ParquetFile(path).metadata.num_rows
    if path.suffix == ".arrow":
        return sum(batch.num_rows for batch in _arrow_batches(path))
    if path.suffix == ".jsonl":
        with open(path, "rb") as stream:
            return sum(1 for line in stream if line.strip())
    return len(_json_list(path))


def read_records(source: Path) -> Iterator[Any]:
    """Yield the records in file order, with a SampleError in place of a line that is not JSON.

    Raises:
        DataError: a file as a whole cannot be read.
    """
    for path in source_files(source):
        if path.suffix == ".parquet":
            import pyarrow.parquet

            file = pyarrow.parquet.ParquetFile(path)
            classes = _classes(file.schema_arrow, path.parent)
            for batch in file.iter_batches(64):
                yield from _named(batch.to_pylist(), classes)
        elif path.suffix == ".arrow":
            for batch in _arrow_batches(path):
                classes = _classes(batch.schema, path.parent)
                for start in range(0, batch.num_rows, 64):
                    yield from _named(batch.slice(start, 64).to_pylist(), classes)
        elif path.suffix == ".jsonl":
            with open(path, "rb") as stream:
                for line in filter(bytes.strip, stream):
                    try:
                        yield json.loads(line.decode("utf-8"))
                    except (ValueError, RecursionError) as error:
                        yield SampleError(f"the line is not JSON in UTF-8 ({error})", "unreadable_text")
        else:
            yield from _json_list(path)


def _arrow_batches(path: Path) -> Iterator["pyarrow.RecordBatch"]:
    """Yield the batches of an Arrow file as `datasets` writes it: a stream, not a random-access file."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
        yield from stream


def _classes(schema: "pyarrow.Schema", folder: Path) -> dict[str, Sequence[str]]:
    """Return the names of the classes of each column that holds their numbers (`ClassLabel` of `datasets`)."""
    info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
    if not info and (folder / FEATURES).is_file():
        info = _json_object(folder / FEATURES)
    return {
        name: feature["names"]
        for name, feature in (info.get("features") or {}).items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }


def _named(records: list[dict], classes: dict[str, Sequence[str]]) -> list[dict]:
    """Return records with the names of classes in place of their numbers; -1 means none."""
    for name, names in classes.items():
        for record in records:
            number = record.get(name)
            if isinstance(number, int):
                record[name] = names[number] if 0 <= number < len(names) else None
    return records


def _json_object(path: Path) -> dict:
    found = _json(path, "--hf-dataset")
    if not isinstance(found, dict):
        raise DataError("--hf-dataset", path, "is not a JSON object; save the data set again")
    return found


def _json(path: Path, option: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(option, path, f"is not JSON in UTF-8 ({error})") from None


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
