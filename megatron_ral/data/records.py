"""Records of a data set as published, read one after the other from a JSON, JSONL or parquet file."""

import json
import re
from pathlib import Path
from typing import Any, Iterator

from megatron_ral.data.issues import SampleError
from megatron_ral.data.layouts import record_id
from megatron_ral.errors import DataError


def count_records(path: Path) -> int:
    """Return the number of records in a file."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(path).metadata.num_rows
    if path.suffix == ".jsonl":
        with open(path, "rb") as stream:
            return sum(1 for line in stream if line.strip())
    return len(_json_list(path))


def read_records(path: Path) -> Iterator[Any]:
    """Yield the records in file order, with a SampleError in place of a line that is not JSON.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    if path.suffix == ".parquet":
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(64):
            yield from batch.to_pylist()
    elif path.suffix == ".jsonl":
        with open(path, "rb") as stream:
            for line in filter(bytes.strip, stream):
                try:
                    yield json.loads(line.decode("utf-8"))
                except (ValueError, RecursionError) as error:
                    yield SampleError(f"the line is not JSON in UTF-8 ({error})", "unreadable_text")
    else:
        yield from _json_list(path)


def _json_list(path: Path) -> list:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError("--input", path, f"is not JSON in UTF-8 ({error})") from None
    if not isinstance(records, list):
        raise DataError("--input", path, f"must hold a list of records, not {type(records).__name__}")
    return records


def keyed_records(path: Path, by_number: bool) -> Iterator[tuple[str, Any]]:
    """Yield pairs of key and record, or the SampleError in its place. The second record of a key is refused."""
    seen: set[str] = set()
    for number, record in enumerate(read_records(path)):
        name = None if by_number or isinstance(record, SampleError) else record_id(record)
        key = f"{number:08d}" if name is None else re.sub(r"[^A-Za-z0-9_-]+", "_", name)
        if key in seen:
            record = SampleError(
                f"record {number} has the key of an earlier one; --keys number gives keys of their own", "duplicate_key"
            )
        seen.add(key)
        yield key, record
