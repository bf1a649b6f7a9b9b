"""Records of published data sets -> fields and media of a sample: one function per layout, chosen by the fields.

- Video-R1: `problem`, `solution`, `path` (one or several files), `options`, `process`, `problem_type`, `data_type`.
- chat: `messages` of a user and an assistant, content as text or as parts (`text`, `image`, `video`); or text with
  `<image>` and `<video>` and the files in `images`, `videos`. Text of the system is put before the question. Pictures
  are shown before the text, wherever they stood in it.
- V* and the other benchmarks: `question` (V* also `text`, ChartQA `query`) and `image` (MuirBench `image_list`, ChartQA
  `imgname`) or `video`; `answer` (or `label`) as text, letter or number of an option, or a list (VizWiz: `answers`) of
  several right ones; options as `options` (MVBench `candidates`, `choices`); boxes as `target_boxes`, [x0, y0, x1, y1],
  or as `bbox`, [x, y, width, height].

The fields `category` (MuirBench `task`), `question_group`, `problem_type`, `fps`, `target_boxes` and `target_frames`
are copied. Several `<image>` in a text become "[image 1]", "[image 2]", because all pictures are shown before it.
"""

import re
from dataclasses import dataclass
from typing import Any, Optional, Sequence, cast

from megatron_ral.data.issues import SampleError
from megatron_ral.data.shards import check_reference
from megatron_ral.rewards.options import option_letter

Media = str | bytes
_PLACES = re.compile(r"\s*<(image|video)>\s*")
_ID_FIELDS = ("problem_id", "id", "question_id")
_IMAGE_FIELDS = ("image", "images", "image_list", "image_path", "imgname")
_VIDEO_FIELDS = ("video", "videos", "video_path")
_OPTION_FIELDS = ("options", "candidates", "choices")
_MEDIA_NAME = re.compile(r"\S{1,1000}\.(?:png|jpe?g|webp|bmp|tiff?|mp4|m4v|mov|webm|mkv|avi|gif)", re.IGNORECASE)
_TEXTS = {
    "problem",
    "question",
    "text",
    "query",
    "answer",
    "answers",
    "label",
    "solution",
    "process",
    *_OPTION_FIELDS,
    *_ID_FIELDS,
}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class RawSample:
    """Sample made of a record, its media not yet read."""

    fields: dict[str, Any]
    """Fields of the sample's `.json` member."""
    images: tuple[Media, ...]
    """Paths or bytes of the images."""
    videos: tuple[Media, ...]
    """Paths of video files or of folders of frames, or bytes of video files."""


def record_id(record: Any) -> Optional[str]:
    """Return the record's own name, or None if it has none."""
    for name in _ID_FIELDS:
        if isinstance(record, dict) and isinstance(record.get(name), (str, int)) and str(record[name]).strip():
            return str(record[name]).strip()
    return None


def read_record(record: Any) -> RawSample:
    """Return the fields and media of one record of any layout.

    Raises:
        SampleError: no layout fits, or a field is missing or impossible. The text does not name the sample's key.
    """
    if not isinstance(record, dict):
        raise SampleError("the record is not an object", "wrong_field")
    if isinstance(record.get("messages"), list):
        raw = _chat(record)
    elif "problem" in record:
        raw = _video_r1(record)
    elif any(name in record for name in ("question", "text", "query")):
        raw = _v_star(record)
    else:
        raise SampleError("the record has none of the fields 'messages', 'problem' and 'question'", "missing_field")
    if not raw.images and not raw.videos:
        _refuse_unread_media(record)
    return raw


def _refuse_unread_media(record: dict) -> None:
    """Raise SampleError if a field that is not read seems to name media.

    Otherwise a question about a picture would become a question without one.
    """
    for name, value in record.items():
        if name not in _TEXTS and any(map(_is_media, value if isinstance(value, list) else [value])):
            raise SampleError(
                f"field '{name}' seems to name media, but is none that is read ({', '.join(_IMAGE_FIELDS)}, "
                f"{', '.join(_VIDEO_FIELDS)}); rename it",
                "missing_media",
            )


def _is_media(value: Any) -> bool:
    return (
        isinstance(value, bytes)
        or (isinstance(value, dict) and isinstance(value.get("bytes"), bytes))
        or (isinstance(value, str) and _MEDIA_NAME.fullmatch(value) is not None)
    )


def _video_r1(record: dict) -> RawSample:
    paths = _media_list(record.get("path"), "path")
    kind = record.get("data_type") or ("image" if paths else "text")
    if kind not in ("image", "video", "text"):
        raise SampleError(f"data_type {kind!r} is none of image, video, text", "wrong_field")
    if kind == "text" and paths:
        raise SampleError("data_type is 'text' but 'path' names media", "wrong_field")
    if kind != "text" and not paths:
        raise SampleError(f"data_type is '{kind}' but 'path' names nothing", "missing_media")
    return _raw_sample(
        record,
        _text(record, "problem"),
        _solution(_answer(record, "solution")),
        paths if kind == "image" else (),
        paths if kind == "video" else (),
    )


def _v_star(record: dict) -> RawSample:
    options, answer = _options(record), _answer(record, "answer", "label", "answers")
    question = _text(record, "question", "text", "query")
    videos = _media_list(_first(record, _VIDEO_FIELDS), "video")
    if videos and any(record.get(name) is not None for name in ("start", "end")):
        raise SampleError(
            "the question is about a part of its video ('start', 'end'), which is not cut here; cut the file "
            "and remove both fields",
            "wrong_field",
        )
    if options and not isinstance(answer, int):
        answer = option_letter(str(answer), options) or answer
    elif options:
        assert isinstance(answer, int)
        if not 0 <= answer < len(options):
            raise SampleError(f"answer {answer} is none of the {len(options)} options", "answer_not_in_options")
        answer = LETTERS[answer]
    elif (
        re.fullmatch("[A-Z]", str(answer))
        and not record.get("problem_type")
        and len(re.findall(r"^\s*\(?[A-Z][.):]", question, re.MULTILINE)) > 1
    ):
        # V* as published: the options stand in the question alone
        record = {**record, "problem_type": "multiple choice"}
    raw = _raw_sample(record, question, _solution(answer), _media_list(_first(record, _IMAGE_FIELDS), "image"), videos)
    if "target_boxes" not in raw.fields and record.get("bbox"):
        raw.fields["target_boxes"] = _corners(record["bbox"])
    return raw


def _chat(record: dict) -> RawSample:
    texts: dict[str, list[str]] = {"system": [], "user": [], "assistant": []}
    media: dict[str, list[Media]] = {"image": [], "video": []}
    asked = 0
    for turn in record["messages"]:
        role = turn.get("role") if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in texts:
            raise SampleError(f"a message has the role {role!r}, none of {', '.join(texts)}", "wrong_field")
        asked += role == "user"
        if role == "user" and asked > 1:
            raise SampleError("more than one question; only conversations of one turn are read", "wrong_field")
        content = turn.get("content")
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        if not isinstance(content, list):
            raise SampleError("the content of a message is neither text nor a list of parts", "wrong_field")
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            kind = kind.removesuffix("_url") if isinstance(kind, str) else kind
            if kind == "text":
                texts[role].append(_text(part, "text"))
            elif isinstance(kind, str) and kind in media:
                value = part.get(kind, part.get(f"{kind}_url", part.get("path")))
                value = value.get("url") if isinstance(value, dict) and "url" in value else value
                media[kind] += _media_list(value, kind)
            else:
                raise SampleError(
                    f"a part of a message has the type {kind!r}, none of text, image, video", "wrong_field"
                )
    for kind, fields in (("image", _IMAGE_FIELDS), ("video", _VIDEO_FIELDS)):
        media[kind] += _media_list(_first(record, fields), kind)
    question = "\n".join([*texts["system"], " ".join(text.strip() for text in texts["user"])])
    if not _PLACES.sub("", question).strip():
        raise SampleError("no message of the user holds text", "missing_field")
    reply = "".join(texts["assistant"])
    if not reply and not record.get("solution"):
        raise SampleError("no message of the assistant and no field 'solution'", "missing_field")
    tag = "<answer>" if "<answer>" in reply else "</think>"
    thought, found, rest = reply.partition(tag)
    if tag == "</think>" and found:  # a thought, and an answer without a tag
        thought, answer = thought + found, rest.strip()
    else:
        thought, answer = (thought, found + rest) if found else ("", reply)
    if not answer and not record.get("solution"):
        raise SampleError("the message of the assistant ends with its thought and has no answer", "missing_field")
    solution = _answer(record, "solution") if record.get("solution") else answer
    return _raw_sample(
        {"process": thought.strip(), **record},
        question,
        _solution(solution),
        tuple(media["image"]),
        tuple(media["video"]),
    )


def _raw_sample(
    record: dict, problem: str, solution: str, images: tuple[Media, ...], videos: tuple[Media, ...]
) -> RawSample:
    options = _options(record)
    if options and not all(
        re.search(rf"(?<!\w){letter}[.):]\s*{re.escape(text)}", problem)
        for letter, text in zip(LETTERS, _bare(options))
    ):
        problem = "\n".join([problem, "Options:", *map(". ".join, zip(LETTERS, _bare(options)))])
    for kind, media in (("image", images), ("video", videos)):
        problem = _numbered(problem, kind, len(media))
    return RawSample(_fields(record, problem.strip(), solution, options), images, videos)


def _bare(options: list[str]) -> list[str]:
    """Return the options without their letters, if all have one ("A.M." alone has none)."""
    found = [
        re.fullmatch(rf"\s*\(?{letter}[.):]\s*(.*)", option, re.DOTALL) for letter, option in zip(LETTERS, options)
    ]
    return [match[1].strip() for match in found if match] if all(found) else [option.strip() for option in options]


def _numbered(text: str, kind: str, count: int) -> str:
    """Return the text with `<image>` (or `<video>`) replaced by "[image 1]", "[image 2]"; a single one is removed."""
    place = f"<{kind}>"
    named = text.count(place)
    if named and named != count:
        raise SampleError(f"the text has {place} {named} times but there are {count}", "missing_media")
    if named == 1:
        return re.sub(rf"\s*{place}\s*", "\n", text)
    for number in range(1, named + 1):
        text = text.replace(place, f"[{kind} {number}]", 1)
    return text


def _fields(record: dict, problem: str, solution: str, options: list[str]) -> dict[str, Any]:
    check_reference(solution, record.get("problem_type") or "", options)
    process, kind = (record.get(name) or "" for name in ("process", "problem_type"))
    fields = {
        "problem": problem,
        "solution": solution,
        "process": process,
        "problem_type": kind or ("multiple choice" if options else ""),
    }
    if options:
        fields["options"] = options
    for name in ("target_boxes", "target_frames", "fps"):
        if record.get(name):
            fields[name] = record[name]
    for name, value in (
        ("category", _first(record, ("category", "task"))),
        ("question_group", record.get("question_group")),
    ):
        if value not in (None, ""):
            fields[name] = str(value) if type(value) is int else value
    if record_id(record) is not None:
        fields["problem_id"] = record_id(record)
    return fields


def _options(record: dict) -> list[str]:
    options = _first(record, _OPTION_FIELDS) or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise SampleError("'options' must be a list of texts", "wrong_field")
    if len(options) > len(LETTERS):
        raise SampleError(f"{len(options)} options are more than there are letters", "wrong_field")
    return options


def _first(record: dict, names: Sequence[str]) -> Any:
    """Return the first of several fields that exists and is not empty."""
    return next((record[name] for name in names if record.get(name) not in (None, "", [])), None)


def _text(record: dict, *names: str) -> str:
    for name in names:
        if isinstance(record.get(name), str) and record[name].strip():
            return record[name]
    raise SampleError(f"no text field '{names[0]}'", "missing_field")


def _answer(record: dict, *names: str) -> str | int | float:
    """Return the answer; several right answers as one text, each in a tag."""
    for name in names:
        value = record.get(name)
        if isinstance(value, list) and value:
            several: list[Any] = [item.get("answer") if isinstance(item, dict) else item for item in value]
            if not all(isinstance(item, str) and item.strip() for item in several):
                raise SampleError(f"'{name}' must be a list of texts", "wrong_field")
            value = several[0] if len(several) == 1 else "".join(map(_solution, several))
        if isinstance(value, (str, int, float)) and not isinstance(value, bool) and str(value).strip():
            return value
    raise SampleError(f"no field '{names[0]}'", "missing_field")


def _solution(answer: str | int | float) -> str:
    """Return the answer in the tags that the rewards read."""
    return str(answer) if "<answer>" in str(answer) else f"<answer>{answer}</answer>"


def _media_list(value: Any, name: str) -> tuple[Media, ...]:
    """Return paths or bytes; the pictures of a parquet file are {bytes, path}."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    values = [(item.get("bytes") or item.get("path")) if isinstance(item, dict) else item for item in values]
    if not all(isinstance(item, (str, bytes)) and item for item in values):
        raise SampleError(f"'{name}' must name files", "wrong_field")
    return cast(tuple[Media, ...], tuple(values))


def _corners(boxes: Any) -> list[list[float]]:
    """Convert [x, y, width, height] to [x0, y0, x1, y1]."""
    boxes = [boxes] if isinstance(boxes, list) and boxes and not isinstance(boxes[0], list) else boxes
    try:
        return [[x, y, x + width, y + height] for x, y, width, height in (map(float, box) for box in boxes)]
    except (TypeError, ValueError, OverflowError):
        raise SampleError("'bbox' must be a list of [x, y, width, height]", "target_box") from None
