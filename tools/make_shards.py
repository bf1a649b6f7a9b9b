"""Make WebDataset shards and their indexes from a JSON, JSONL or parquet file and a folder of media.

    python tools/make_shards.py --input train.json --media DIR --output DIR --model HF_DIR [--config RUN.yaml]

Layouts (found by the fields present): Video-R1, chat `messages`, V*-style questions with boxes (megatron_ral/data/layouts.py).
Every sample is decoded once and made a prompt by the real processor of --model; what cannot be used goes to
`rejects.jsonl` with its key and reason. Shard k holds the usable ones of records k * --shard-size onwards, so workers share
nothing, and a run that was killed goes on where it was when started again with the same arguments: finished shards are
kept, and the result is the same as that of one run. Media paths must stay inside --media; URLs are refused.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import sys
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from hashlib import blake2b
from pathlib import Path
from typing import Any, Iterator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ral.commands.common import add_prompt_suffix, prompt_suffix
from megatron_ral.errors import ConfigError
from megatron_ral.data.archive import scan_archive
from megatron_ral.data.issues import REASONS, SampleError, printable
from megatron_ral.data.index import open_index, write_index
from megatron_ral.data.layouts import Media, RawSample, read_record, record_id
from megatron_ral.data.shards import IMAGE_SUFFIXES, parse_sample

WORK, DONE, REJECTS = ".make_shards", "dataset.json", "rejects.jsonl"
# Containers that hold the same streams as those with a member suffix of their own.
VIDEO_SUFFIX = {"mp4": "mp4", "mov": "mp4", "m4v": "mp4", "webm": "webm", "mkv": "webm", "gif": "gif"}
UNLIMITED = 2**31 - 1


# --- input --------------------------------------------------------------------------------------------------------------


def count_records(path: Path) -> int:
    """Records of a file, without keeping them."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(path).metadata.num_rows
    if path.suffix == ".jsonl":
        with open(path, "rb") as stream:
            return sum(1 for line in stream if line.strip())
    return len(_json_list(path))


def read_records(path: Path) -> Iterator[Any]:
    """Records in file order; a line that is no JSON is a SampleError in its place.

    Raises:
        ValueError: the file as a whole cannot be read.
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
                    yield SampleError(f"the line is no JSON in UTF-8 ({error})", "unreadable_text")
    else:
        yield from _json_list(path)


def _json_list(path: Path) -> list:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--input {path} is no JSON in UTF-8 ({error})") from None
    if not isinstance(records, list):
        raise ValueError(f"--input {path} must hold a list of records, not {type(records).__name__}")
    return records


def keyed_records(path: Path, by_number: bool) -> Iterator[tuple[str, Any]]:
    """(key, record or why there is none); the second record of a key is refused."""
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


def with_defaults(record: Any, args: argparse.Namespace) -> Any:
    """A record with what the command line says of records that do not say it themselves."""
    if not isinstance(record, dict):
        return record
    named = {
        name: value
        for name, value in (("problem_type", args.problem_type), ("category", args.category))
        if value and not record.get(name)
    }
    if "category" in named and record.get("task"):
        del named["category"]
    if args.group_field and record.get(args.group_field) not in (None, ""):
        named["question_group"] = str(record[args.group_field])
    return {**record, **named}


# --- one shard ----------------------------------------------------------------------------------------------------------


class ShardMaker:
    """Builds shards in one process."""

    def __init__(self, args: argparse.Namespace):
        import torch

        from megatron_ral.data.processor import PromptProcessor

        torch.set_num_threads(1)
        self.media, self.output, self.args = args.media.resolve(), args.output, args
        self.processor = PromptProcessor(
            args.model,
            args.max_prompt_length or UNLIMITED,
            max_visual_tokens=args.max_visual_tokens,
            prompt_suffix=args.prompt_suffix,
        )
        self.fingerprint = self.processor.fingerprint()

    def build(self, number: int, records: list[tuple[str, Any]]) -> None:
        """Write shard, rejects and, last, the index: a shard with an index is finished."""
        import webdataset

        shard, rejects, lengths = shard_path(self.output, number), [], {}
        partial = shard.with_suffix(".partial")
        with open(partial, "wb") as stream, webdataset.TarWriter(stream, mtime=0, encoder=False) as writer:
            for key, record in records:
                try:
                    members, measured = self._check(key, str(shard), record)
                except SampleError as error:
                    rejects.append({"key": key, "reason": error.reason, "text": str(error)})
                except Exception as error:  # as in the loader: one record must not end the work
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
        """Members and lengths of a sample that the processor has made a prompt of."""
        try:
            if isinstance(record, SampleError):
                raise record
            members = self._members(read_record(with_defaults(record, self.args)))
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
                path = None if isinstance(item, bytes) else self._inside(item)
                if path is not None and path.is_dir() and kind == "video":
                    if len(media) > 1:
                        raise SampleError("a folder of frames must be the only video of a sample", "wrong_field")
                    # of each its true place: a link in the folder may lead out of --media as well
                    members |= {
                        f"frames/{file.name.lower()}": _read(self._inside(f"{item}/{file.name}"))
                        for file in sorted(path.iterdir())
                        if file.suffix[1:].lower() in IMAGE_SUFFIXES
                    }
                else:
                    data = item if path is None else _read(path)
                    members[prefix + _suffix(kind, item, data)] = data
        kind = "video" if raw.videos else "image" if raw.images else "text"
        record = {**raw.fields, "data_type": kind}
        try:
            return {**members, "json": json.dumps(record, ensure_ascii=False, sort_keys=True).encode("utf-8")}
        except UnicodeEncodeError as error:
            raise SampleError(f"its text cannot be written in UTF-8 ({error})", "unreadable_text") from None

    def _inside(self, name: str) -> Path:
        """The path of a media file, links followed."""
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name) or "\0" in name:
            raise SampleError(f"'{name[:200]}' is no local file; only paths inside --media are read", "refused_path")
        try:
            path = (self.media / name).resolve()
            path.is_dir()
        except (OSError, RuntimeError, ValueError) as error:  # a ring of links, a name too long or of half characters
            text = " ".join(str(error).split())[:200].encode("ascii", "backslashreplace").decode()
            raise SampleError(f"'{printable(name[:200])}' is no path ({text})", "refused_path") from None
        if not path.is_relative_to(self.media):
            raise SampleError(f"'{name[:200]}' leads out of --media", "refused_path")
        return path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SampleError(f"'{path.name}' cannot be read ({error.strerror})", "missing_media") from None


def _suffix(kind: str, item: Media, data: bytes) -> str:
    if isinstance(item, str):
        suffix = item.rpartition(".")[2].lower()
        found = VIDEO_SUFFIX.get(suffix) if kind == "video" else suffix if suffix in IMAGE_SUFFIXES else None
        if found is None:
            raise SampleError(
                f"'{item}' is no {kind} of a known kind "
                f"({', '.join(VIDEO_SUFFIX if kind == 'video' else IMAGE_SUFFIXES)})",
                f"broken_{kind}",
            )
        return found
    if kind == "image":
        return "jpg" if data[:2] == b"\xff\xd8" else "webp" if data[8:12] == b"WEBP" else "png"
    return "gif" if data[:3] == b"GIF" else "webm" if data[:4] == b"\x1aE\xdf\xa3" else "mp4"


_maker: ShardMaker


def _start_worker(args: argparse.Namespace) -> None:
    global _maker
    _maker = ShardMaker(args)


def _build_in_worker(number: int, records: list) -> None:
    _maker.build(number, records)


# --- the whole data set ---------------------------------------------------------------------------------------------------


def shard_path(output: Path, number: int) -> Path:
    return output / f"shard-{number:06d}.tar"


def reject_path(output: Path, number: int) -> Path:
    return output / WORK / f"rejects-{number:06d}.jsonl"


def is_finished(output: Path, number: int) -> bool:
    """Whether a shard, its index and its rejects are whole."""
    shard = shard_path(output, number)
    return shard.is_file() and reject_path(output, number).is_file() and not open_index(shard).note


def build_all(args: argparse.Namespace) -> int:
    """Build what is missing; returns the number of shards."""
    from tqdm import tqdm

    def finish(running: dict, until: int) -> None:
        while len(running) > until:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                progress.update(running.pop(future))

    number, records, running = 0, [], {}
    pool = (
        None
        if args.workers < 2
        else ProcessPoolExecutor(
            args.workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(args,)
        )
    )
    maker = None
    with tqdm(total=count_records(args.input), unit="sample", desc="make shards", mininterval=1.0) as progress:
        stream = keyed_records(args.input, args.keys == "number")
        while records := [item for _, item in zip(range(args.shard_size), stream)]:
            if is_finished(args.output, number):
                progress.update(len(records))
            elif pool is None:
                maker = maker or ShardMaker(args)
                maker.build(number, records)
                progress.update(len(records))
            else:
                finish(running, 2 * args.workers - 1)
                running[pool.submit(_build_in_worker, number, records)] = len(records)
            number += 1
        finish(running, 0)
    if pool is not None:
        pool.shutdown()
    return number


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the bytes of the result."""
    digest = blake2b(digest_size=16)
    with open(args.input, "rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    model = {
        name: blake2b((Path(args.model) / name).read_bytes(), digest_size=16).hexdigest()
        for name in ("config.json", "tokenizer.json", "preprocessor_config.json")
        if (Path(args.model) / name).is_file()
    }
    return {
        "input": digest.hexdigest(),
        "model": model,
        "shard_size": args.shard_size,
        "keys": args.keys,
        "prompt_suffix": args.prompt_suffix,
        "max_prompt_length": args.max_prompt_length,
        "max_visual_tokens": args.max_visual_tokens,
        "problem_type": args.problem_type,
        "category": args.category,
        "group_field": args.group_field,
    }


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line; every error names the option and its value."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--input", type=Path, required=True, help=".json, .jsonl or .parquet file")
    parser.add_argument("--media", type=Path, required=True, help="folder that the paths in --input are relative to")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; an unfinished one is gone on with")
    parser.add_argument(
        "--model", required=True, help="Hugging Face folder whose tokenizer and processor make the prompts"
    )
    parser.add_argument("--shard-size", type=int, default=512, help="records per shard")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes")
    add_prompt_suffix(parser)
    parser.add_argument(
        "--keys",
        choices=("id", "number"),
        default="id",
        help="keys are the records' ids (where they have one), or their numbers",
    )
    parser.add_argument(
        "--max-prompt-length", type=int, default=0, help="reject longer prompts; 0: keep (a run filters)"
    )
    parser.add_argument("--max-visual-tokens", type=int, default=0, help="reject prompts with more; 0: keep")
    parser.add_argument("--problem-type", default="", help="of records that name none (README: Rewards)")
    parser.add_argument("--category", default="", help="of records that name none, for the evaluation's table")
    parser.add_argument(
        "--group-field",
        default="",
        help="field that questions which count together share (MME: question_id, with --keys number)",
    )
    args = parser.parse_args(argv)
    try:
        args.prompt_suffix = prompt_suffix(args)
    except ConfigError as error:
        parser.error(f"--config: {error}")
    if args.input.suffix not in (".json", ".jsonl", ".parquet") or not args.input.is_file():
        parser.error(f"--input {args.input} is no .json, .jsonl or .parquet file")
    if not args.media.is_dir():
        parser.error(f"--media {args.media} is no folder")
    for name in ("shard_size", "workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in ("max_prompt_length", "max_visual_tokens"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative, got {getattr(args, name)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Make the shards, or go on making them."""
    args = parse_arguments(argv)
    work, done, settings = args.output / WORK, args.output / DONE, settings_of(args)
    kept = done if done.is_file() else work / "settings.json"
    if kept.is_file() and json.loads(kept.read_text())["settings"] != settings:
        print(
            f"error: --output {args.output} holds shards made from another input or with other arguments; give another "
            "folder",
            file=sys.stderr,
        )
        return 2
    if not kept.is_file() and args.output.is_dir() and any(args.output.iterdir()):
        print(f"error: --output {args.output} is not empty and was not written by this tool", file=sys.stderr)
        return 2
    if not done.is_file():
        work.mkdir(parents=True, exist_ok=True)
        (work / "settings.json").write_text(json.dumps({"settings": settings}))
        try:
            num_shards = build_all(args)
        except ValueError as error:  # the input or the model as a whole
            print(f"error: {error}", file=sys.stderr)
            return 2
        finish_output(args.output, num_shards, settings)
    summary = json.loads(done.read_text())
    print(
        f"{summary['num_samples']} samples in {summary['num_shards']} shards, {summary['num_rejects']} rejected "
        f"({args.output / REJECTS})"
    )
    for reason, count in summary["rejects"].items():
        print(f"  {count:6d} {reason}: {REASONS[reason]}")
    return 0


def finish_output(output: Path, num_shards: int, settings: dict) -> None:
    """Join the rejects and write the summary last."""
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


if __name__ == "__main__":
    sys.exit(main())
