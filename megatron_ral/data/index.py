"""The index beside a shard: the place of each sample and the length of its prompt, known without decoding anything.

The index of `NAME.tar` is `NAME.index.jsonl`. Its first line is a header: format, bytes of the tar (another number
means that the index is stale), and the fingerprint of the rules behind the lengths (`PromptProcessor.fingerprint`). One
line per sample follows, in file order: key, offset, size, and either the lengths or, for a sample that cannot be used,
reason and text.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Mapping, Optional

import numpy as np

from megatron_ral.data.archive import ArchiveScan, SampleSpan, scan_archive
from megatron_ral.data.issues import REASONS, SampleIssue

FORMAT = 1
UNKNOWN = -1
"""Length of a sample whose length could not be computed."""


@dataclass(frozen=True)
class SampleLengths:
    """Facts about a sample that need no pixels. Lengths are in tokens."""

    prompt_length: int
    """Length of the prompt, visual tokens included."""
    visual_tokens: int
    """Visual tokens of the prompt."""
    response_length: int
    """Length of the reference response with its reasoning and the end-of-turn token."""
    num_images: int
    """Number of images."""
    num_videos: int
    """Number of videos."""
    problem_type: str
    """Problem type of the sample; may be empty."""


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Index of one shard's N samples, in arrays."""

    shard: str
    """Path of the tar file."""
    keys: tuple[str, ...]
    """Names of the samples."""
    offsets: np.ndarray
    """[N] int64 first bytes."""
    sizes: np.ndarray
    """[N] int64 numbers of bytes."""
    faults: Mapping[int, SampleIssue]
    """Sample number -> reason for which it cannot be used."""
    damage: str = ""
    """Fault of the archive; empty: none."""
    fingerprint: str = ""
    """Fingerprint of the rules behind the lengths; empty: no lengths."""
    prompt_lengths: Optional[np.ndarray] = None
    """[N] int32 tokens, UNKNOWN where the length could not be computed; None: no index."""
    visual_tokens: Optional[np.ndarray] = None
    """[N] int32 tokens, as `prompt_lengths`."""
    note: str = ""
    """State of the index file where there are no lengths (`missing`, `stale`, ..); empty: there are lengths."""

    def __len__(self) -> int:
        return len(self.keys)


def index_path(shard: str | Path) -> Path:
    """Return the path of a shard's index."""
    return Path(shard).with_suffix(".index.jsonl")


def write_index(shard: str | Path, scan: ArchiveScan, lengths: Mapping[str, SampleLengths], fingerprint: str) -> Path:
    """Write the index of a shard in one step, so that no reader finds half of it.

    Args:
        shard: path of the tar file.
        scan: samples of the shard as it is on disk.
        lengths: lengths by key; a sample may have none.
        fingerprint: fingerprint of the processor that computed the lengths.

    Returns:
        Path of the index.
    """
    target = index_path(shard)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    with open(partial, "w", encoding="ascii") as stream:
        header = {
            "format": FORMAT,
            "tar_bytes": scan.num_bytes,
            "processor": fingerprint,
            "num_samples": len(scan.spans),
            "damage": scan.damage,
        }
        stream.write(json.dumps(header) + "\n")
        for span in scan.spans:
            line = {"key": span.key, "offset": span.offset, "size": span.size}
            if span.fault is not None:
                line |= asdict(span.fault)
            elif span.key in lengths:
                line |= asdict(lengths[span.key])
            stream.write(json.dumps(line) + "\n")
    os.replace(partial, target)
    return target


def open_index(shard: str | Path) -> ShardIndex:
    """Return the index of a shard.

    A missing, stale or unreadable index is replaced in memory by one without lengths, made from the headers of the tar;
    `note` says so.

    Raises:
        DataError: the shard is no tar archive or cannot be read.
    """
    path, note = index_path(shard), ""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
        header, lines = json.loads(lines[0]), [json.loads(line) for line in lines[1:]]
        if header["format"] != FORMAT:
            note = f"of format {header['format']}"
        elif header["tar_bytes"] != Path(shard).stat().st_size or header["num_samples"] != len(lines):
            note = "stale"
        else:
            return _from_lines(str(shard), header, lines)
    except FileNotFoundError:
        note = "missing"
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError):
        note = "unreadable"
    return index_of_scan(str(shard), scan_archive(shard), note)


def index_of_scan(shard: str, scan: ArchiveScan, note: str = "") -> ShardIndex:
    """Return an index without lengths.

    Args:
        shard: path of the tar file.
        scan: its samples.
        note: state of the index file.
    """
    return _build(shard, list(scan.spans), damage=scan.damage, note=note)


def _from_lines(shard: str, header: dict, lines: list[dict]) -> ShardIndex:
    spans = [_span(line, header["tar_bytes"]) for line in lines]
    numbers = {
        name: np.array([_whole(line.get(name, UNKNOWN), UNKNOWN, 2**31) for line in lines], dtype=np.int32)
        for name in ("prompt_length", "visual_tokens")
    }
    if not isinstance(header["damage"], str) or not isinstance(header["processor"], str):
        raise TypeError("'damage' and 'processor' are texts")
    return _build(
        shard,
        spans,
        damage=header["damage"],
        fingerprint=header["processor"],
        prompt_lengths=numbers["prompt_length"],
        visual_tokens=numbers["visual_tokens"],
    )


def _span(line: dict, tar_bytes: int) -> SampleSpan:
    """Return the span of one line.

    Raises:
        ValueError, KeyError, TypeError: `write_index` cannot have written the line.
    """
    fault = SampleIssue(line["reason"], line["text"]) if "reason" in line else None
    if not isinstance(line["key"], str) or (fault and not (fault.reason in REASONS and isinstance(fault.text, str))):
        raise TypeError("'key', 'reason' and 'text' are texts")
    offset = _whole(line["offset"], 0, tar_bytes + 1)
    # a sample that the end of the file cuts reaches beyond it
    return SampleSpan(
        line["key"], offset, _whole(line["size"], 0, tar_bytes + 1 - offset if fault is None else 2**63), fault
    )


def _whole(value: object, least: int, end: int) -> int:
    if type(value) is not int or not least <= value < end:
        raise ValueError(f"{str(value)[:40]} is no whole number from {least} to {end - 1}")
    return value


def _build(shard: str, spans: list[SampleSpan], **rest) -> ShardIndex:
    return ShardIndex(
        shard,
        tuple(span.key for span in spans),
        np.array([span.offset for span in spans], dtype=np.int64),
        np.array([span.size for span in spans], dtype=np.int64),
        {number: span.fault for number, span in enumerate(spans) if span.fault is not None},
        **rest,
    )
