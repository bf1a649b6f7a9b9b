"""The place of each sample in a tar file, found from the headers of its members alone.

Members of one sample stand together and share the name up to the first dot of the file name: `KEY.json`, `KEY.png`,
`KEY.0.jpg`. Pictures of a video may stand in a folder, `KEY.frames/0001.jpg`. Members are never written to disk. All
the same, a member whose name leads out of the archive, or that is no plain file, makes its sample unusable. The
readable samples of a damaged archive are used.
"""

import re
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Iterator, Optional, cast

from megatron_ral.data.issues import SampleIssue, printable
from megatron_ral.errors import DataError

FRAME_FOLDER = ".frames"
MAX_SAMPLE_BYTES = 2 * 2**30
MAX_MEMBER_BYTES = 2**60
_META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class SampleSpan:
    """Place of one sample's members in a shard."""

    key: str
    """Name of the sample."""
    offset: int
    """First byte."""
    size: int
    """Number of bytes."""
    fault: Optional[SampleIssue] = None
    """Reason for which the sample cannot be used, as far as the headers tell."""


@dataclass(frozen=True)
class ArchiveScan:
    """All samples of a shard in file order."""

    num_bytes: int
    """Size of the shard."""
    spans: tuple[SampleSpan, ...]
    damage: str = ""
    """Fault of the archive; empty: none. The spans lie before the damage."""


def split_member(name: str) -> Optional[tuple[str, str]]:
    """Return (key, suffix) of a member's name, or None if it belongs to no sample (no suffix, or `__meta__`).

    `a/s0.png` -> (a/s0, png), `s0.1.JPG` -> (s0, 1.jpg), `s0.frames/0001.jpg` -> (s0, frames/0001.jpg).
    """
    if _META.match(name):
        return None
    folder, slash, base = name.rpartition("/")
    if folder.endswith(FRAME_FOLDER):
        return folder.removesuffix(FRAME_FOLDER), f"{FRAME_FOLDER[1:]}/{base.lower()}"
    stem, dot, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and dot else None


def plain_members(data: bytes) -> Optional[list[tuple[str, bytes]]]:
    """Return (name, content) of consecutive members, or None where a reader of all of tar is needed.

    Plain members are regular files with short names and intact headers in the POSIX or the GNU format.

    Args:
        data: members from the first header on, without the end of the archive.
    """
    members, place, block = [], 0, tarfile.BLOCKSIZE
    while place < len(data):
        header = data[place : place + block]
        name, _, rest = header[:100].partition(b"\0")
        # The checksum counts its own eight bytes as spaces. Bytes 345 to 500 continue a long name, or are GNU's own.
        if (
            len(header) < block
            or header[156:157] != tarfile.REGTYPE
            or not (name and name.isascii())
            or any(rest)
            or any(header[345:500])
            or sum(header) - sum(header[148:156]) + 8 * 32 != _octal(header[148:156])
        ):
            return None
        start = place + block
        end = start + _octal(header[124:136])
        if not start <= end <= len(data):
            return None
        members.append((name.decode("ascii"), data[start:end]))
        place = end + (start - end) % block
    return members


def _octal(field: bytes) -> int:
    """Return the number in a field of a header, -1 where it is not written in octal digits."""
    digits = field.partition(b"\0")[0].strip(b" ")
    try:
        return int(digits, 8) if digits.isdigit() else -1
    except ValueError:
        return -1


def scan_archive(path: str | Path) -> ArchiveScan:
    """Find the samples of a tar file by its headers.

    Raises:
        DataError: the file cannot be opened or is no tar archive.
    """
    try:
        num_bytes = Path(path).stat().st_size
        with tarfile.open(path, "r:") as archive:
            spans: list[SampleSpan] = []
            damage = _collect(archive, num_bytes, spans)
            end = archive.offset
        if not damage:
            damage = _damage_at_end(path, end)
    except (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError):
        raise DataError(f"'{path}'", None, "is not a tar archive; remove or rebuild it") from None
    except OSError as error:
        raise DataError(
            f"'{path}'", None, f"cannot be read ({error.strerror}); check the path and its permissions"
        ) from None
    return ArchiveScan(num_bytes, tuple(_without_repetition(spans)), damage)


def _collect(archive: tarfile.TarFile, num_bytes: int, spans: list[SampleSpan]) -> str:
    """Append the samples to `spans` and return the damage that ended the reading; empty: none."""
    suffixes: set[str] = set()
    while True:
        try:
            member = archive.next()
        except (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError) as error:
            return f"it is cut short or damaged at byte {archive.offset} ({error})"
        cast(Any, archive).members = []  # otherwise tarfile holds every member it has seen
        if member is None:
            return ""
        end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if not 0 <= member.size <= MAX_MEMBER_BYTES:
            return f"a member at byte {member.offset} declares {member.size} bytes"
        fault = _member_fault(member)
        names = split_member(member.name) or ((member.name, "") if fault is not None else None)
        if member.isdir() or names is None:
            continue
        key, suffix = names
        cut = member.isreg() and member.offset_data + member.size > num_bytes
        if cut:
            fault = SampleIssue("truncated", f"sample '{printable(key)}' is cut short by the end of its shard")
        if spans and spans[-1].key == key and suffix not in suffixes:
            last = spans[-1]
            size = max(end, last.offset + last.size) - last.offset
            spans[-1] = replace(last, size=size, fault=last.fault or fault or _too_large(key, size))
        else:
            suffixes.clear()
            size = (end if member.isreg() else member.offset_data) - member.offset
            spans.append(SampleSpan(key, member.offset, size, fault or _too_large(key, size)))
        suffixes.add(suffix)
        if cut:
            return f"it is cut short in member '{printable(member.name)}' at byte {num_bytes}"


def _member_fault(member: tarfile.TarInfo) -> Optional[SampleIssue]:
    name, parts = member.name, member.name.split("/")
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or re.match("[A-Za-z]:", name):
        return SampleIssue("unsafe_member", f"member '{printable(name)}' has a name that leads out of the archive")
    if not member.isreg() or member.issparse():
        return SampleIssue(
            "unsafe_member", f"member '{printable(name)}' is a link, device or sparse file, not a plain one"
        )
    return None


def _too_large(key: str, size: int) -> Optional[SampleIssue]:
    if size <= MAX_SAMPLE_BYTES:
        return None
    return SampleIssue("unsafe_member", f"sample '{printable(key)}' of {size} bytes is larger than {MAX_SAMPLE_BYTES}")


def _damage_at_end(path: str | Path, end: int) -> str:
    """Return the fault of an archive that does not end with a block of zeros.

    tarfile takes any other bytes for the end too, without an error.
    """
    with open(path, "rb") as stream:
        stream.seek(end)
        block = stream.read(tarfile.BLOCKSIZE)
    if any(block):
        return f"it is damaged at byte {end}: what follows cannot be read"
    return "" if block else f"it ends at byte {end} without the mark of a whole archive; samples may be missing"


def _without_repetition(spans: list[SampleSpan]) -> Iterator[SampleSpan]:
    """Yield the spans with a fault on each repetition of a key; the first sample of that key is used."""
    seen: set[str] = set()
    for span in spans:
        if span.key in seen and span.fault is None:
            fault = SampleIssue(
                "duplicate_key",
                f"sample '{printable(span.key)}' at byte {span.offset} has the key of an earlier sample of its shard",
            )
            span = replace(span, fault=fault)
        seen.add(span.key)
        yield span
