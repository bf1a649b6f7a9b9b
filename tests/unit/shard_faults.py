"""Shards with planted faults of every kind that a tar file can bring to the loader."""

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

from PIL import Image

from tests.unit.test_video import clip, overwrite


def picture(width: int = 28, height: int = 28, suffix: str = "png", colour="red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(stream, {"png": "PNG", "jpg": "JPEG"}[suffix])
    return stream.getvalue()


def pixel_bomb(side: int = 20000) -> bytes:
    """Return a small PNG that declares side x side pixels and holds the first of them."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(2**16)))
        + chunk(b"IEND", b"")
    )


def text(**changes) -> bytes:
    record = {
        "problem": "Which digit is red?",
        "solution": "<answer>7</answer>",
        "data_type": "image",
        "problem_type": "numerical",
        **changes,
    }
    return json.dumps({name: value for name, value in record.items() if value is not None}).encode()


def faulty(kind: str, images: dict) -> dict[str, bytes]:
    """Return the members of a sample with one fault; `images` are those of a good one."""
    options = {"problem_type": "multiple choice", "options": ["A. red", "B. blue"]}
    return {
        "broken_image": {"jpg": picture(suffix="jpg")[:200], "json": text()},
        "missing_field": {**images, "json": text(solution=None)},
        "target_box": {**images, "json": text(target_boxes=[[0, 0, 500, 28]])},
        "answer_not_in_options": {**images, "json": text(solution="<answer>C</answer>", **options)},
        "image_too_large": {"png": pixel_bomb(), "json": text()},
        "broken_video": {"mp4": overwrite(clip("mp4", count=4), b"stsz", 8, bytes(4)), "json": text(data_type="video")},
        "unreadable_text": {**images, "json": b'{"problem": "\xff\xfe?", "solution": "7"}'},
        "duplicate_key": {**images, "json": text()},
        "unsafe_member": {**images, "json": text()},
        "truncated": {**images, "json": text()},
        "missing_media": {"json": text(path="pipe:touch pipe_was_run", image="pipe:touch pipe_was_run")},
    }[kind]


KINDS = (
    "broken_image",
    "missing_field",
    "target_box",
    "answer_not_in_options",
    "image_too_large",
    "broken_video",
    "unreadable_text",
    "duplicate_key",
    "unsafe_member",
    "truncated",
    "missing_media",
)


def write_faulty_set(
    folder: Path, num_shards: int, shard_size: int, faults_per_shard: int
) -> tuple[list[str], dict[str, str]]:
    """Write shards of shard_size samples; return the identities of the good ones, and identity -> reason of the others.

    Kinds of faults take turns, so that each occurs equally often. The shard of the kind `truncated` ends in the
    middle of its last sample.
    """
    good, bad, images = [], {}, {"png": picture(), "jpg": picture(56, 28, "jpg")}
    kept = {kind: faulty(kind, {"png": images["png"]}) for kind in KINDS}
    for shard in range(num_shards):
        path, members = folder / f"s-{shard:02d}.tar", []
        kinds = [KINDS[(shard * faults_per_shard + turn) % len(KINDS)] for turn in range(faults_per_shard)]
        places = {
            3 + turn * (shard_size - 4) // faults_per_shard: kind
            for turn, kind in enumerate(kinds)
            if kind != "truncated"
        }
        if "truncated" in kinds:
            places[shard_size - 1] = "truncated"
        for number in range(shard_size):
            key, kind = f"k{shard:02d}{number:03d}", places.get(number)
            suffix = ("png", "jpg")[number % 2]
            content = {suffix: images[suffix], "json": text()} if kind is None else kept[kind]
            if kind == "duplicate_key":
                key = f"k{shard:02d}000"  # the first of that name is a good one
            elif kind == "unsafe_member":
                key = f"../../k{shard:02d}{number:03d}"
            if kind is None:
                good.append(f"{path.name}/{key}")
            else:
                bad[f"{path.name}/{key}" + (f"#{number}" if kind == "duplicate_key" else "")] = kind
            members += [(f"{key}.{suffix}", data) for suffix, data in content.items()]
        write_members(path, members)
        if "truncated" in kinds:
            path.write_bytes(path.read_bytes()[: _last_member(path) + 520])  # its header and 8 bytes
            bad[path.name] = "truncated"
    return good, bad


def write_members(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def _last_member(path: Path) -> int:
    with tarfile.open(path) as archive:
        return archive.getmembers()[-1].offset
