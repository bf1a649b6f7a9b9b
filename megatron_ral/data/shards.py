"""WebDataset shards: finding the files, reading the bytes of one sample, parsing them into a `Sample`.

Departures from plain `webdataset.WebDataset(urls)`:
- Shards must be existing local files. A shard name never reaches a shell (`pipe:` and other schemes are refused).
- A sample is read by its place in the shard (`ShardIndex`), in any order. Members with plain headers are read by
  `archive.plain_members`, which takes a tenth of the time; webdataset reads all others.
- Nothing is decoded here, so nothing is ever unpickled.
"""

import glob
import io
import json
import logging
import os
import re
from pathlib import Path
from typing import Any, Iterator, Sequence

from webdataset.tariterators import tar_file_expander

from megatron_ral.data.archive import plain_members, split_member
from megatron_ral.data.index import ShardIndex, open_index
from megatron_ral.data.issues import SampleError, printable
from megatron_ral.data.targets import parse_boxes, parse_target_frames
from megatron_ral.errors import DataError
from megatron_ral.rewards.answer import reference_answers
from megatron_ral.rewards.options import options_in_question
from megatron_ral.rewards.problem_types import MULTIPLE_CHOICE, rule_name
from megatron_ral.rewards.references import outside_options, reference_problem
from megatron_ral.types import FramePictures, Sample

logger = logging.getLogger(__name__)

REQUIRED_FIELDS = ("problem", "solution")
TEXT_FIELDS = ("process", "problem_type", "category", "question_group")
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
VIDEO_SUFFIXES = ("mp4", "webm", "gif")
NUM_FIRST_SAMPLES = 16
MIN_FPS, MAX_FPS = 1.0e-6, 1.0e6
_IMAGE_MEMBER, _VIDEO_MEMBER = (
    re.compile(rf"(?:([0-9]{{1,9}})\.)?(?:{'|'.join(suffixes)})") for suffixes in (IMAGE_SUFFIXES, VIDEO_SUFFIXES)
)
_FRAME_MEMBER = re.compile(rf"frames/.*\.(?:{'|'.join(IMAGE_SUFFIXES)})")


def find_shards(pattern: str, key: str) -> list[str]:
    """Return the sorted local files of a glob.

    Args:
        pattern: glob of tar files.
        key: setting or option that holds the glob, for the error.

    Raises:
        DataError: a URL scheme, no match, or a match that is no file.
    """
    scheme = pattern.split("/", 1)[0]
    if ":" in scheme:
        refused = scheme.split(":")[0]
        raise DataError(key, pattern, f": only local files are read, '{refused}:' is refused; give a path to tar files")
    shards = sorted(glob.glob(pattern))
    if not shards:
        raise DataError(key, pattern, "matches no file; make the shards first or correct the path")
    for shard in shards:
        if not Path(shard).is_file():
            raise DataError(key, None, f": '{shard}' is not a tar archive; remove or rebuild it")
    return shards


def open_shards(pattern: str, key: str) -> list[ShardIndex]:
    """Return the indexes of the shards of a glob, after a test of each shard.

    The test parses the first samples: a shard in which none of them can be parsed is likely wrong as a whole.

    Args:
        pattern: glob of tar files.
        key: setting or option that holds the glob, for the error.

    Raises:
        DataError: as in `find_shards`; a file that is no tar archive; no sample at all; none of the first
            NUM_FIRST_SAMPLES samples of a shard has the needed fields.
    """
    indexes = []
    for shard in find_shards(pattern, key):
        try:
            indexes.append(open_index(shard))
            _parse_first_samples(indexes[-1])
        except DataError as error:
            raise DataError(key, None, f": {error}") from None
    if not any(len(index) for index in indexes):
        damage = f" ({indexes[0].damage})" if indexes[0].damage else ""
        raise DataError(key, pattern, f": its {len(indexes)} shards hold no sample{damage}; rebuild them")
    return indexes


def _parse_first_samples(index: ShardIndex) -> None:
    """Raise DataError if none of the first samples can be parsed."""
    first_error = None
    for number in range(min(len(index), NUM_FIRST_SAMPLES)):
        if number in index.faults:
            continue
        try:
            parse_sample(read_entry(index, number))
            return
        except SampleError as error:
            first_error = first_error or error
    if first_error is not None:
        raise DataError(f"'{index.shard}'", None, f": {first_error}")


def read_entry(index: ShardIndex, number: int) -> dict[str, Any]:
    """Read the members of one sample.

    Args:
        index: index of the shard.
        number: number of the sample in the shard.

    Returns:
        Suffix -> bytes of each member, and the texts `__key__` and `__url__` (the shard).

    Raises:
        SampleError: other members than the index says stand there, or the disk gives no bytes.
    """
    key = printable(index.keys[number])
    try:
        with open(index.shard, "rb", buffering=0) as stream:
            data = os.pread(stream.fileno(), int(index.sizes[number]), int(index.offsets[number]))
    except OSError as error:
        raise SampleError(
            f"sample '{key}': shard '{index.shard}' cannot be read ({error.strerror})", "cannot_read"
        ) from None
    entry: dict[str, Any] = {"__key__": index.keys[number], "__url__": index.shard}
    try:
        members = plain_members(data)
        if members is None:
            expanded = tar_file_expander([{"url": index.shard, "stream": io.BytesIO(data)}], eof_value=None)
            members = ((member["fname"], member["data"]) for member in expanded)
        for name, content in members:
            found, suffix = split_member(name) or (None, "")
            if found == entry["__key__"]:
                if not suffix.startswith("__"):  # such a name would replace `__key__` or `__url__`
                    entry[suffix] = content
            elif found is not None:
                raise SampleError(
                    f"sample '{key}': '{index.shard}' has sample '{printable(found)}' in its place; make "
                    "the index of this shard again (tools/index_shards.py)",
                    "truncated",
                )
    except SampleError:
        raise
    except Exception as error:  # tarfile raises many types; each of them means that this sample is damaged
        text = error.args[0] if error.args else error
        raise SampleError(f"sample '{key}': its members cannot be read ({text})", "truncated") from None
    return entry


def shard_entries(shards: Sequence[str], num_readers: int = 1) -> Iterator[dict[str, Any]]:
    """Yield the members of all samples in file order. A sample that cannot be used is left out with a warning.

    Args:
        shards: paths of tar files.
        num_readers: processes that read the same shards and must find the same samples.

    Raises:
        DataError: a shard is no tar archive, or the disk of one of several readers fails.
    """
    for shard in shards:
        index = open_index(shard)
        if index.damage:
            logger.warning("shard '%s': %s; the samples before are used", shard, index.damage)
        for number in range(len(index)):
            fault = index.faults.get(number)
            try:
                if fault is not None:
                    raise SampleError(fault.text, fault.reason)
                yield read_entry(index, number)
            except SampleError as error:
                if error.reason == "cannot_read" and num_readers > 1:  # others may have read it
                    raise DataError(f"'{shard}'", None, f": {error}; all ranks have to read the same samples") from None
                logger.warning("left out of '%s': %s", shard, error)


def parse_sample(entry: dict[str, Any]) -> Sample:
    """Return the sample that its members describe.

    Images are the members `.png` (or another suffix), or `.0.png`, `.1.png` .. in the order of the question. Videos are
    `.mp4`, `.webm` or `.gif`, numbered likewise. The pictures `.frames/*` are one more video, shown last, in the order
    of their names (f2 before f10) with the field `fps` (pictures per second, 1 by default).

    Args:
        entry: members as `read_entry` returns them.

    Raises:
        SampleError: a field is missing, of the wrong type or impossible; the text names sample and field.
    """
    key, shard = printable(entry["__key__"]), entry["__url__"]
    record = _record(key, entry)
    for field in REQUIRED_FIELDS:
        if not isinstance(record.get(field), str):
            raise SampleError(f"sample '{key}' has no text field '{field}'", "missing_field")
    for field in TEXT_FIELDS:
        if not isinstance(record.get(field) or "", str):
            raise SampleError(
                f"sample '{key}': field '{field}' must be text, not {type(record[field]).__name__}", "wrong_field"
            )
    for field in (*REQUIRED_FIELDS, *TEXT_FIELDS):
        if re.search("[\\ud800-\\udfff]", record.get(field) or ""):
            raise SampleError(
                f"sample '{key}': field '{field}' holds half a surrogate pair, which is no text", "unreadable_text"
            )
    media: dict[str, tuple] = {}
    for kind, pattern, suffixes in (("image", _IMAGE_MEMBER, IMAGE_SUFFIXES), ("video", _VIDEO_MEMBER, VIDEO_SUFFIXES)):
        numbered = sorted((int(match[1] or 0), name) for name in entry if (match := pattern.fullmatch(name)))
        media[kind] = tuple(entry[name] for _, name in numbered)
        if kind == "video":
            media[kind] += _frame_pictures(key, entry, record)
        if record.get("data_type") == kind and not media[kind]:
            raise SampleError(
                f"sample '{key}' has data_type '{kind}' but no member .{' or .'.join(suffixes)}; add it, or "
                "leave data_type out for text alone",
                "missing_media",
            )
    options = _options(key, record)
    try:
        check_reference(record["solution"], record.get("problem_type") or "", options)
        boxes = parse_boxes(record.get("target_boxes"), "target_boxes")
        target_frames = parse_target_frames(record.get("target_frames"))
    except SampleError as error:
        raise error.of_sample(key) from None
    return Sample(
        key=key,
        shard=shard,
        problem=record["problem"],
        solution=record["solution"],
        process=record.get("process") or "",
        problem_type=record.get("problem_type") or "",
        images=media["image"],
        target_boxes=boxes,
        videos=media["video"],
        target_frames=target_frames,
        category=record.get("category") or "",
        question_group=record.get("question_group") or "",
        options=options or _listed_options(record),
    )


def _record(key: str, entry: dict[str, Any]) -> dict[str, Any]:
    if "json" not in entry:
        raise SampleError(f"sample '{key}' has no .json member", "missing_field")
    try:
        record = json.loads(entry["json"].decode("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, or a number of thousands of digits
        raise SampleError(f"sample '{key}': its .json is unreadable ({error})", "unreadable_text") from None
    if not isinstance(record, dict):
        raise SampleError(f"sample '{key}': its .json is not an object", "unreadable_text")
    return record


def _frame_pictures(key: str, entry: dict[str, Any], record: dict[str, Any]) -> tuple[FramePictures, ...]:
    names = sorted((name for name in entry if _FRAME_MEMBER.fullmatch(name)), key=natural_order)
    fps = record.get("fps", 1.0)
    if names and (isinstance(fps, bool) or not isinstance(fps, (int, float)) or not MIN_FPS <= fps <= MAX_FPS):
        raise SampleError(
            f"sample '{key}': field 'fps' must be a number from {MIN_FPS:g} to {MAX_FPS:g}, not {str(fps)[:40]}",
            "wrong_field",
        )
    return (FramePictures(tuple(entry[name] for name in names), float(fps)),) if names else ()


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sorting key in which numbers count as numbers: `f2.jpg` before `f10.jpg`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split("([0-9]{1,18})", name)]


def _options(key: str, record: dict[str, Any]) -> tuple[str, ...]:
    options = record.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise SampleError(f"sample '{key}': options must be a list of texts", "wrong_field")
    return tuple(options)


def _listed_options(record: dict[str, Any]) -> tuple[str, ...]:
    """Return the options that stand in the question of a multiple choice alone, as in V*."""
    is_choice = rule_name(record.get("problem_type") or "") == MULTIPLE_CHOICE
    return options_in_question(record["problem"]) if is_choice else ()


def check_reference(solution: str, problem_type: str, options: Sequence[str]) -> None:
    """Check that some response can match a solution.

    Args:
        solution: `<answer>..</answer>`, once or several times, or the bare answer.
        problem_type: problem type of the sample; may be empty.
        options: contents of the sample's options; empty where it has none.

    Raises:
        SampleError: no response can. The text does not name the sample's key.
    """
    if reason := reference_problem(solution, problem_type):
        raise SampleError(f"field 'solution' {reason}", "unusable_answer")
    if options and (answer := outside_options(solution, options)) is not None:
        raise SampleError(f"its answer {answer!r} is none of the {len(options)} options", "answer_not_in_options")


def reference_answer(solution: str) -> str:
    """Return the first reference answer of a solution."""
    return reference_answers(solution)[0]
