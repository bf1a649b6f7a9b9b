"""Make WebDataset shards and their indexes from a file of records and a folder of media: `megatron-ral shards make`.

Every sample is decoded once and made into a prompt by the real processor, so that the shards hold only samples that a
run can use. The others are listed in `rejects.jsonl` with key and reason. A shard with an index is finished, and a
folder that was left unfinished is continued to the same result.
"""

import json
import multiprocessing
import os
import re
import shutil
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Optional
from urllib.parse import unquote

from megatron_ral.data.archive import scan_archive
from megatron_ral.data.index import open_index, write_index
from megatron_ral.data.issues import SampleError, printable
from megatron_ral.data.layouts import File, RawSample, names_media, read_record
from megatron_ral.data.records import count_records, keyed_records, source_files
from megatron_ral.data.shards import IMAGE_SUFFIXES, natural_order, parse_sample
from megatron_ral.errors import ConfigError, DataError, UserError

WORK, DONE, REJECTS = ".make_shards", "dataset.json", "rejects.jsonl"
UNLIMITED = 2**31 - 1


@dataclass(frozen=True)
class ShardSettings:
    """Input, output and options of one data set."""

    input: Path
    """File of records (.json, .jsonl or .parquet), a folder of them, or a saved Hugging Face data set."""
    media: Optional[Path]
    """Resolved folder that media paths are relative to, and must stay inside of; None: all media are in the records."""
    output: Path
    """Folder of the shards."""
    model: str
    """Hugging Face folder whose tokenizer and processor make the prompts."""
    shard_size: int
    """Records per shard."""
    keys: str
    """Keys of samples: `id` of the records, or their `number`."""
    prompt_suffix: str
    """Text appended to every question, as `data.prompt_suffix`."""
    max_prompt_length: int
    """Longest accepted prompt in tokens; 0 for no limit."""
    max_visual_tokens: int
    """Most visual tokens of an accepted prompt; 0 for no limit."""
    problem_type: str
    """Problem type of records that name none."""
    category: str
    """Category of records that name none."""
    group_field: str
    """Field shared by questions that are scored together; empty for none."""


def with_defaults(record: Any, settings: ShardSettings) -> Any:
    """Return a record with the settings' problem type, category and group where it has none of its own."""
    if not isinstance(record, dict):
        return record
    named = {
        name: value
        for name, value in (("problem_type", settings.problem_type), ("category", settings.category))
        if value and not record.get(name)
    }
    if "category" in named and record.get("task"):
        del named["category"]
    if settings.group_field and record.get(settings.group_field) not in (None, ""):
        named["question_group"] = str(record[settings.group_field])
    return {**record, **named}


class ShardMaker:
    """Builder of shards in one process."""

    def __init__(self, settings: ShardSettings):
        import torch

        from megatron_ral.data.processor import PromptProcessor

        torch.set_num_threads(1)
        self.output, self.settings = settings.output, settings
        self.processor = PromptProcessor(
            settings.model,
            settings.max_prompt_length or UNLIMITED,
            max_visual_tokens=settings.max_visual_tokens,
            prompt_suffix=settings.prompt_suffix,
        )
        self.fingerprint = self.processor.fingerprint()

    def build(self, number: int, records: list[tuple[str, Any]]) -> None:
        """Write a shard, its rejects and, last, its index, because a shard with an index is finished."""
        from webdataset.writer import TarWriter

        shard, rejects, lengths = shard_path(self.output, number), [], {}
        partial = shard.with_suffix(".partial")
        with open(partial, "wb") as stream, TarWriter(stream, mtime=0, encoder=False) as writer:
            for key, record in records:
                try:
                    members, measured = self._check(key, str(shard), record)
                except SampleError as error:
                    rejects.append({"key": key, "reason": error.reason, "text": str(error)})
                except Exception as error:  # as in the loader: one bad record must not end the work
                    text = f"sample '{key}': {type(error).__name__}: {error}"
                    rejects.append({"key": key, "reason": "unusable", "text": text})
                else:
                    lengths[key] = measured
                    writer.write({"__key__": key, **members})
        text = "".join(json.dumps(reject) + "\n" for reject in rejects)
        reject_path(self.output, number).write_text(text, encoding="ascii")
        scan = scan_archive(partial)
        os.replace(partial, shard)
        write_index(shard, scan, lengths, self.fingerprint)

    def _check(self, key: str, shard: str, record: Any):
        """Return members and lengths of a sample, after the processor has made a prompt of it."""
        try:
            if isinstance(record, SampleError):
                raise record
            members = self._members(read_record(with_defaults(record, self.settings)))
        except SampleError as error:
            raise SampleError(f"sample '{key}': {error}", error.reason) from None
        sample = parse_sample({"__key__": key, "__url__": shard, **members})
        lengths, prompt = self.processor.lengths(sample), self.processor(sample)
        found = len(prompt.input_ids), int(prompt.visual_mask.sum())
        if found != (lengths.prompt_length, lengths.visual_tokens):
            raise SampleError(
                f"sample '{key}': prompt and visual tokens are {found}, but its sizes say "
                f"{(lengths.prompt_length, lengths.visual_tokens)}",
                "token_mismatch",
            )
        return members, lengths

    def _members(self, raw: RawSample) -> dict[str, bytes]:
        members: dict[str, bytes] = {}
        for kind, media in (("image", raw.images), ("video", raw.videos)):
            for number, item in enumerate(media):
                prefix = f"{number}." if len(media) > 1 else ""
                frames = self._frames(item) if kind == "video" else None
                if frames is not None and len(media) > 1:
                    raise SampleError("frames must be the only video of a sample", "wrong_field")
                if frames is not None:
                    members |= frames
                else:
                    assert not isinstance(item, tuple)
                    data = self._read(item)
                    members[prefix + _suffix(kind, data)] = data
        kind = "video" if raw.videos else "image" if raw.images else "text"
        record = {**raw.fields, "data_type": kind}
        try:
            return {**members, "json": json.dumps(record, ensure_ascii=False, sort_keys=True).encode("utf-8")}
        except UnicodeEncodeError as error:
            raise SampleError(f"its text cannot be written in UTF-8 ({error})", "unreadable_text") from None

    def _frames(self, item: File | tuple[File, ...]) -> Optional[dict[str, bytes]]:
        """Return the members of a video that is a list or a folder of pictures, or None for a file."""
        files = item if isinstance(item, tuple) else self._folder(item) if isinstance(item, str) else None
        if files is None:
            return None
        pictures = map(self._read, files)
        return {f"frames/{number:06d}.{_suffix('image', data)}": data for number, data in enumerate(pictures)}

    def _folder(self, item: str) -> Optional[tuple[str, ...]]:
        """Return the paths of the pictures in a folder in the order of their names, or None for no folder."""
        path = self._inside(item)
        if not path.is_dir():
            return None
        names = sorted((file.name for file in path.iterdir() if file.name[0] != "."), key=natural_order)
        pictures = [name for name in names if name.rpartition(".")[2].lower() in IMAGE_SUFFIXES]
        others = [name for name in names if name not in pictures and names_media(name)]
        if others or not pictures:
            found = f"holds '{others[0]}'" if others else "holds no picture"
            raise SampleError(
                f"the folder of frames '{item[:200]}' {found}; only {', '.join(IMAGE_SUFFIXES)} are read as frames",
                "broken_video" if pictures or others else "missing_media",
            )
        # each is resolved when it is read, because a link in the folder may lead out of --media as well
        return tuple(f"{item}/{name}" for name in pictures)

    def _read(self, item: File) -> bytes:
        """Return the content of a file of --media; bytes as they are."""
        if isinstance(item, bytes):
            return item
        path = self._inside(item)
        try:
            return path.read_bytes()
        except OSError as error:
            raise SampleError(
                f"'{printable(item[:200])}' cannot be read in --media ({error.strerror})", "missing_media"
            ) from None

    def _inside(self, name: str) -> Path:
        """Return the path of a media file with links resolved; `file://` before it is dropped."""
        local = re.sub("^file://(?:localhost(?=/))?", "", name)
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", local) or "\0" in name:
            raise SampleError(
                f"'{name[:200]}' is not a local file; only paths inside --media are read, so put it there and give its "
                "path",
                "refused_path",
            )
        if self.settings.media is None:
            raise SampleError(f"'{name[:200]}' is a path; give the folder that it is in as --media", "refused_path")
        try:
            path = (self.settings.media / local).resolve()
            if local != name and not path.exists():
                path = (self.settings.media / unquote(local)).resolve()
            path.is_dir()
        except (OSError, RuntimeError, ValueError) as error:  # a ring of links, a name too long or of half characters
            text = " ".join(str(error).split())[:200].encode("ascii", "backslashreplace").decode()
            raise SampleError(f"'{printable(name[:200])}' is not a path ({text})", "refused_path") from None
        if not path.is_relative_to(self.settings.media):
            raise SampleError(f"'{name[:200]}' leads out of --media", "refused_path")
        return path


def _suffix(kind: str, data: bytes) -> str:
    """Return the suffix of a member by its content, because names of files say little. The processor refuses others."""
    if kind == "image":
        return "jpg" if data[:2] == b"\xff\xd8" else "webp" if data[8:12] == b"WEBP" else "png"
    return "gif" if data[:3] == b"GIF" else "webm" if data[:4] == b"\x1aE\xdf\xa3" else "mp4"


_maker: ShardMaker


def _start_worker(settings: ShardSettings) -> None:
    global _maker
    _maker = ShardMaker(settings)


def _build_in_worker(number: int, records: list) -> None:
    _maker.build(number, records)


def shard_path(output: Path, number: int) -> Path:
    return output / f"shard-{number:06d}.tar"


def reject_path(output: Path, number: int) -> Path:
    return output / WORK / f"rejects-{number:06d}.jsonl"


def is_finished(output: Path, number: int) -> bool:
    """Return True if a shard, its index and its rejects are complete."""
    shard = shard_path(output, number)
    return shard.is_file() and reject_path(output, number).is_file() and not open_index(shard).note


def build_all(settings: ShardSettings, workers: int) -> int:
    """Build the missing shards in `workers` processes; return the number of all."""
    from tqdm import tqdm

    def finish(running: dict, until: int) -> None:
        while len(running) > until:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                progress.update(running.pop(future))

    number, records, running = 0, [], {}
    pool = (
        None
        if workers < 2
        else ProcessPoolExecutor(
            workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(settings,)
        )
    )
    maker = None
    with tqdm(total=count_records(settings.input), unit="sample", desc="make shards", mininterval=1.0) as progress:
        stream = keyed_records(settings.input, settings.keys == "number")
        while records := [item for _, item in zip(range(settings.shard_size), stream)]:
            if is_finished(settings.output, number):
                progress.update(len(records))
            elif pool is None:
                maker = maker or ShardMaker(settings)
                maker.build(number, records)
                progress.update(len(records))
            else:
                finish(running, 2 * workers - 1)
                running[pool.submit(_build_in_worker, number, records)] = len(records)
            number += 1
        finish(running, 0)
    if pool is not None:
        pool.shutdown()
    return number


def settings_of(settings: ShardSettings) -> dict[str, Any]:
    """Return everything that decides the bytes of the result."""
    digest = blake2b(digest_size=16)
    for file in source_files(settings.input):
        with open(file, "rb") as stream:
            while block := stream.read(2**22):
                digest.update(block)
    model = {
        name: blake2b((Path(settings.model) / name).read_bytes(), digest_size=16).hexdigest()
        for name in ("config.json", "tokenizer.json", "preprocessor_config.json")
        if (Path(settings.model) / name).is_file()
    }
    return {
        "input": digest.hexdigest(),
        "model": model,
        "shard_size": settings.shard_size,
        "keys": settings.keys,
        "prompt_suffix": settings.prompt_suffix,
        "max_prompt_length": settings.max_prompt_length,
        "max_visual_tokens": settings.max_visual_tokens,
        "problem_type": settings.problem_type,
        "category": settings.category,
        "group_field": settings.group_field,
    }


def make_dataset(settings: ShardSettings, workers: int) -> dict[str, Any]:
    """Make the data set, or continue an unfinished one; return its summary, the content of dataset.json.

    Raises:
        ConfigError: the output folder holds something else.
        DataError: the input or the model cannot be used at all.
    """
    output, wanted = settings.output, settings_of(settings)
    work, done = output / WORK, output / DONE
    started = done if done.is_file() else work / "settings.json"
    if started.is_file() and json.loads(started.read_text())["settings"] != wanted:
        raise ConfigError(
            "--output", output, "holds shards made from another input or with other arguments; give another folder"
        )
    if not started.is_file() and output.is_dir() and any(output.iterdir()):
        raise ConfigError("--output", output, "is not empty and was not written by this command; give another folder")
    if not done.is_file():
        work.mkdir(parents=True, exist_ok=True)
        (work / "settings.json").write_text(json.dumps({"settings": wanted}))
        try:
            num_shards = build_all(settings, workers)
        except UserError:
            raise
        except ValueError as error:  # pyarrow and transformers raise it for files that they cannot read
            raise DataError("--output", output, f"cannot be made: {error}") from error
        finish_output(output, num_shards, wanted)
    return json.loads(done.read_text())


def finish_output(output: Path, num_shards: int, settings: dict) -> None:
    """Join the rejects, and write the summary last."""
    text = "".join(reject_path(output, number).read_text() for number in range(num_shards))
    partial = output / f"{REJECTS}.partial"
    partial.write_text(text)
    os.replace(partial, output / REJECTS)
    counts = Counter(json.loads(line)["reason"] for line in text.splitlines())
    num_samples = sum(len(open_index(shard_path(output, number))) for number in range(num_shards))
    summary = {
        "settings": settings,
        "num_samples": num_samples,
        "num_shards": num_shards,
        "num_rejects": counts.total(),
        "rejects": dict(counts.most_common()),
    }
    (output / WORK / DONE).write_text(json.dumps(summary, indent=1) + "\n")
    os.replace(output / WORK / DONE, output / DONE)
    shutil.rmtree(output / WORK)
