"""Reading WebDataset shards: which files, in which order, split by data-parallel rank.

Departures from plain `webdataset.WebDataset(urls)`:
- Shards must be existing local files. A shard name never reaches a shell (`pipe:` and other schemes are refused).
- Nothing is decoded here, so nothing is ever unpickled.
- Order is a function of (seed, epoch) alone, so that a position is (source, epoch, samples taken).
"""

import glob
import hashlib
import io
import json
import random
import re
import tarfile
from pathlib import Path
from typing import Iterator, Sequence

import webdataset as wds

from megatron_ral.data.targets import parse_boxes, parse_target_frames
from megatron_ral.types import Sample

REQUIRED_FIELDS = ("problem", "solution")
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
VIDEO_SUFFIXES = ("mp4", "webm", "gif")
_IMAGE_MEMBER, _VIDEO_MEMBER = (re.compile(rf"(?:(\d+)\.)?(?:{'|'.join(suffixes)})")
                                for suffixes in (IMAGE_SUFFIXES, VIDEO_SUFFIXES))


class DataError(ValueError):
    """Data that cannot be used at all; the message names the file and the way out."""


def find_shards(pattern: str, key: str) -> list[str]:
    """Sorted local tar files of a glob.

    Args:
        pattern: glob of tar files.
        key: configuration key, for the error.

    Raises:
        DataError: a URL scheme, no match, or a file that is no tar archive.
    """
    scheme = pattern.split("/", 1)[0]
    if ":" in scheme:
        raise DataError(f"{key} = '{pattern}': only local files are read, '{scheme.split(':')[0]}:' is refused; "
                        "give a path to tar files")
    shards = sorted(glob.glob(pattern))
    if not shards:
        raise DataError(f"{key} = '{pattern}' matches no file; make the shards first or correct the path")
    for shard in shards:
        _check_archive(shard, key)
    return shards


def _check_archive(shard: str, key: str) -> None:
    """Raise DataError for a file that is no tar archive, is cut short, or is damaged between two members (where a
    reader would take it for the end). Reads headers only."""
    if not Path(shard).is_file() or not tarfile.is_tarfile(shard):
        raise DataError(f"{key}: shard '{shard}' is not a tar archive; remove or rebuild it")
    try:
        with tarfile.open(shard, "r:") as archive:
            archive.getmembers()
            end = archive.offset
    except tarfile.TarError as error:
        raise DataError(f"{key}: shard '{shard}' is cut short or damaged ({error}); remove or rebuild it") from None
    with open(shard, "rb") as stream:
        stream.seek(end)
        if any(stream.read(tarfile.BLOCKSIZE)):
            raise DataError(f"{key}: shard '{shard}' is damaged at byte {end}; remove or rebuild it")


def check_first_sample(shard: str, key: str) -> None:
    """Raise DataError when the first sample of a shard lacks a needed field (a whole shard is then likely wrong)."""
    for entry in _entries([shard]):
        try:
            parse_sample(entry)
        except ValueError as error:
            raise DataError(f"{key}: shard '{shard}': {error}") from None
        return
    raise DataError(f"{key}: shard '{shard}' holds no sample")


def parse_sample(entry: dict) -> Sample:
    """Raw WebDataset entry -> Sample. Images are the members `.png` (or another suffix), or `.0.png`, `.1.png` ... in
    the order of the question; videos likewise (`.mp4`, `.webm`, `.gif`).

    Raises:
        ValueError: a field is missing or of the wrong type; names sample and field.
    """
    key, shard = entry["__key__"], entry["__url__"]
    if "json" not in entry:
        raise ValueError(f"sample '{key}' has no .json member")
    try:
        record = json.loads(entry["json"].decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"sample '{key}': its .json is unreadable ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"sample '{key}': its .json is not an object")
    for field in REQUIRED_FIELDS:
        if not isinstance(record.get(field), str):
            raise ValueError(f"sample '{key}' has no text field '{field}'")
    for field in ("process", "problem_type", "category", "question_group"):
        if not isinstance(record.get(field) or "", str):
            raise ValueError(f"sample '{key}': field '{field}' must be text, not {type(record[field]).__name__}")
    media = {}
    for kind, pattern, suffixes in (("image", _IMAGE_MEMBER, IMAGE_SUFFIXES), ("video", _VIDEO_MEMBER, VIDEO_SUFFIXES)):
        numbered = sorted((int(match[1] or 0), name) for name in entry if (match := pattern.fullmatch(name)))
        media[kind] = tuple(entry[name] for _, name in numbered)
        if record.get("data_type") == kind and not media[kind]:
            raise ValueError(f"sample '{key}' has data_type '{kind}' but no member .{' or .'.join(suffixes)}; add it, or "
                             "leave data_type out for text alone")
    try:
        boxes = parse_boxes(record.get("target_boxes"), "target_boxes")
        target_frames = parse_target_frames(record.get("target_frames"))
    except ValueError as error:
        raise ValueError(f"sample '{key}': {error}") from None
    return Sample(
        key=key, shard=shard, problem=record["problem"], solution=record["solution"],
        process=record.get("process") or "", problem_type=record.get("problem_type") or "",
        images=media["image"], target_boxes=boxes, videos=media["video"], target_frames=target_frames,
        category=record.get("category") or "", question_group=record.get("question_group") or "",
    )


def _entries(shards: Sequence[str]) -> Iterator[dict]:
    """Raw entries of shards in order. The stage between opens plain files only, unlike webdataset's own opener."""

    def opened(urls: Iterator[dict]) -> Iterator[dict]:
        for item in urls:
            with open(item["url"], "rb") as stream:
                yield {**item, "stream": io.BufferedReader(stream)}

    for shard in shards:
        stages = wds.SimpleShardList([shard]), opened, wds.tariterators.tar_file_expander, wds.tariterators.group_by_keys
        try:
            yield from wds.DataPipeline(*stages)
        except (tarfile.TarError, OSError, ValueError) as error:
            raise DataError(f"shard '{shard}' cannot be read on: {error.args[0] if error.args else error}; remove or "
                            "rebuild it") from None


class _RandomState(random.Random):
    """random.Random seeded by a stable hash of its identity."""

    def __init__(self, *identity: object):
        super().__init__(int.from_bytes(hashlib.blake2b(repr(identity).encode(), digest_size=8).digest(), "little"))


def epoch_entries(shards: Sequence[str], *, dp_rank: int, dp_size: int, epoch: int, seed: int, shuffle: bool,
                  shuffle_buffer: int) -> Iterator[dict]:
    """Raw entries one data-parallel rank reads in one epoch, in an order fixed by (seed, epoch).

    Shards are dealt to data-parallel ranks like cards; tensor- and pipeline-parallel peers share dp_rank and so read
    the same samples. With fewer shards than ranks, every rank reads all shards and keeps every dp_size-th sample.
    """
    order = list(shards)
    if shuffle:
        _RandomState("shards", seed, epoch).shuffle(order)
    whole = len(order) >= dp_size
    entries = _entries(order[dp_rank::dp_size] if whole else order)
    if not whole:
        entries = (entry for index, entry in enumerate(entries) if index % dp_size == dp_rank)
    if shuffle:
        rng = _RandomState("samples", seed, epoch, dp_rank)
        entries = wds.filters._shuffle(entries, bufsize=shuffle_buffer, initial=shuffle_buffer, rng=rng)
    return entries
