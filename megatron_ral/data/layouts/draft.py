"""The one way from what a layout finds in a record to a sample: media, places, options, answer and marks."""

import re
from dataclasses import dataclass
from typing import Any

from megatron_ral.data.issues import SampleError
from megatron_ral.data.layouts.media import (
    COLUMNS,
    RATES,
    File,
    Medium,
    rate_of,
    refuse_change,
    refuse_unread,
)
from megatron_ral.data.layouts.places import placed, unescaped
from megatron_ral.data.layouts.values import (
    LETTERS,
    Answer,
    bare,
    first,
    is_empty,
    options_of,
    record_id,
    refuse_several,
    settled,
    solution_text,
)


@dataclass(frozen=True)
class RawSample:
    """Sample made of a record, its media not yet read."""

    fields: dict[str, Any]
    """Fields of the sample's `.json` member."""
    images: tuple[File, ...]
    """Paths or bytes of the images."""
    videos: tuple[File | tuple[File, ...], ...]
    """Paths of video files or of folders of frames, bytes of video files, or the pictures of a video."""


@dataclass(frozen=True)
class Draft:
    """Question, answer and media that a layout finds in a record."""

    record: dict
    """The record, for the fields that mean the same in all layouts."""
    question: str
    """Question with its places."""
    answer: Answer
    """Answer: text with or without tags, a number, a boolean, or the number of an option."""
    process: str
    """Reasoning before the answer, or empty."""
    images: tuple[Medium, ...]
    """Pictures in the order of the question."""
    videos: tuple[Medium, ...]
    """Videos in the order of the question."""
    read: tuple[str, ...]
    """Fields that this layout reads besides those that all read."""


def finished(draft: Draft) -> RawSample:
    """Return the sample of a draft.

    Raises:
        SampleError: a field is impossible, would change the media, or names media that are not read.
    """
    record, media = draft.record, (*draft.images, *draft.videos)
    _check_kind(record, draft)
    refuse_unread(record, (*COLUMNS["image"], *COLUMNS["video"], *draft.read), media)
    for kind, named in (("image", draft.images), ("video", draft.videos)):
        if named:
            refuse_change({name: value for name, value in record.items() if name not in RATES}, kind, "the record")
    options, problem_type = options_of(record), record.get("problem_type") or ""
    refuse_several(record, options)
    solution = solution_text(settled(draft.answer, options, str(problem_type)))
    problem = placed(
        _with_options(draft.question, options),
        len(draft.images),
        len(draft.videos),
        is_text=record.get("data_type") == "text",
    )
    fields = {
        "problem": problem.strip(),
        "solution": solution,
        "process": draft.process,
        "problem_type": problem_type or ("multiple choice" if options else ""),
    }
    if options:
        fields["options"] = [unescaped(option) for option in options]
    rate = rate_of(record, draft.videos) if draft.videos else record.get("fps")
    marks = {"fps": rate, **{name: record.get(name) for name in ("target_boxes", "target_frames")}}
    fields |= {name: value for name, value in marks.items() if not is_empty(value)}
    for name, value in (
        ("category", first(record, ("category", "task"))),
        ("question_group", record.get("question_group")),
    ):
        if not is_empty(value):
            fields[name] = str(value) if type(value) is int else value
    if record_id(record) is not None:
        fields["problem_id"] = record_id(record)
    return RawSample(
        fields,
        tuple(medium.file for medium in draft.images if not isinstance(medium.file, tuple)),
        tuple(medium.file for medium in draft.videos),
    )


def _check_kind(record: dict, draft: Draft) -> None:
    """Raise SampleError if the record says that its media are of another kind than they are."""
    kind = record.get("data_type")
    if kind == "text" and (draft.images or draft.videos):
        raise SampleError("data_type is 'text' but the record names media", "wrong_field")
    if (kind == "image" and not draft.images) or (kind == "video" and not draft.videos):
        raise SampleError(f"data_type is '{kind}' but the record names no {kind}", "missing_media")


def _with_options(question: str, options: list[str]) -> str:
    """Return a question that lists its options, each with its letter."""
    listed = list(zip(LETTERS, bare(options)))
    if all(re.search(rf"(?<!\w){letter}[.):]\s*{re.escape(text)}", question) for letter, text in listed):
        return question
    return "\n".join([question, "Options:", *map(". ".join, listed)])
