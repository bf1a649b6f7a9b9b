"""Records of published data sets -> what a shard holds of them: one function per layout, chosen by the fields present.

- Video-R1: `problem`, `solution`, `path` (one or several files), `options`, `process`, `problem_type`, `data_type`.
- chat: `messages` of a user and an assistant, content as text or as parts (`text`, `image`, `video`); or text with
  `<image>` and `<video>` and the files in `images`, `videos`. Earlier systems' text stands before the question. Pictures
  are shown before the text, wherever they stood in it.
- V*: `question` (or `text`) and `image`, `answer` (or `label`) as text, letter or number of an option, and boxes:
  `target_boxes` as [x0, y0, x1, y1], or `bbox` as [x, y, width, height].
"""

import re
from dataclasses import dataclass
from typing import Any, Optional

from megatron_ral.data.faults import SampleError
from megatron_ral.data.shards import option_letter, reference_answer

Media = str | bytes
_PLACES = re.compile(r"\s*<(image|video)>\s*")
_ID_FIELDS = ("problem_id", "id", "question_id")


@dataclass(frozen=True)
class RawSample:
    """A record, its media not yet looked at."""

    fields: dict[str, Any]
    """Of the sample's `.json` member."""
    images: tuple[Media, ...]
    """Paths, or the bytes themselves."""
    videos: tuple[Media, ...]
    """Paths of files or of folders of frames, or bytes."""


def record_id(record: Any) -> Optional[str]:
    """What the record calls itself; None: nothing."""
    for name in _ID_FIELDS:
        if isinstance(record, dict) and isinstance(record.get(name), (str, int)) and str(record[name]).strip():
            return str(record[name]).strip()
    return None


def read_record(record: Any) -> RawSample:
    """Fields and media of one record of any layout.

    Raises:
        SampleError: no layout fits, or a field is missing or impossible. The caller knows the key and puts it before.
    """
    if not isinstance(record, dict):
        raise SampleError("the record is not an object", "wrong_field")
    if isinstance(record.get("messages"), list):
        return _chat(record)
    if "problem" in record:
        return _video_r1(record)
    if "question" in record or "text" in record:
        return _v_star(record)
    raise SampleError("the record has none of the fields 'messages', 'problem' and 'question'", "missing_field")


def _video_r1(record: dict) -> RawSample:
    paths = _media_list(record.get("path"), "path")
    kind = record.get("data_type") or ("image" if paths else "text")
    if kind not in ("image", "video", "text"):
        raise SampleError(f"data_type {kind!r} is none of image, video, text", "wrong_field")
    if kind == "text" and paths:
        raise SampleError("data_type is 'text' but 'path' names media", "wrong_field")
    if kind != "text" and not paths:
        raise SampleError(f"data_type is '{kind}' but 'path' names nothing", "missing_media")
    return RawSample(_fields(record, _text(record, "problem"), _solution(_answer(record, "solution"))),
                     paths if kind == "image" else (), paths if kind == "video" else ())


def _v_star(record: dict) -> RawSample:
    options, answer = record.get("options") or [], _answer(record, "answer", "label")
    if options and not isinstance(answer, int):
        answer = option_letter(str(answer), _options(record)) or answer
    elif options:
        if not 0 <= answer < len(options):
            raise SampleError(f"answer {answer} is none of the {len(options)} options", "answer_not_in_options")
        answer = chr(ord("A") + answer)
    fields = _fields(record, _text(record, "question", "text"), _solution(answer))
    if "target_boxes" not in fields and record.get("bbox"):
        fields["target_boxes"] = _corners(record["bbox"])
    return RawSample(fields, _media_list(record.get("image", record.get("images")), "image"),
                     _media_list(record.get("video", record.get("videos")), "video"))


def _chat(record: dict) -> RawSample:
    texts: dict[str, list[str]] = {"system": [], "user": [], "assistant": []}
    media: dict[str, list[Media]] = {"image": [], "video": []}
    asked = 0
    for turn in record["messages"]:
        role = turn.get("role") if isinstance(turn, dict) else None
        if role not in texts:
            raise SampleError(f"a message has the role {role!r}, none of {', '.join(texts)}", "wrong_field")
        asked += role == "user"
        if role == "user" and asked > 1:
            raise SampleError("more than one question; only conversations of one turn are read", "wrong_field")
        content = turn.get("content")
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or []:
            kind = part.get("type") if isinstance(part, dict) else None
            kind = kind.removesuffix("_url") if isinstance(kind, str) else kind
            if kind == "text":
                texts[role].append(_text(part, "text"))
            elif kind in media:
                value = part.get(kind, part.get(f"{kind}_url", part.get("path")))
                value = value.get("url") if isinstance(value, dict) and "url" in value else value
                media[kind] += _media_list(value, kind)
            else:
                raise SampleError(f"a part of a message has the type {kind!r}, none of text, image, video", "wrong_field")
    question = " ".join(text.strip() for text in texts["user"])
    for kind in media:
        listed, named = _media_list(record.get(f"{kind}s"), f"{kind}s"), question.count(f"<{kind}>")
        if named and named != len(listed) + len(media[kind]):
            raise SampleError(f"the text has <{kind}> {named} times but there are {len(listed) + len(media[kind])}",
                              "missing_media")
        media[kind] += listed
    question = "\n".join([*texts["system"], _PLACES.sub("\n", question).strip()])
    if not question.strip():
        raise SampleError("no message of the user holds text", "missing_field")
    reply = "".join(texts["assistant"])
    if not reply and not record.get("solution"):
        raise SampleError("no message of the assistant and no field 'solution'", "missing_field")
    thought, tag, rest = reply.partition("<answer>")
    fields = _fields({"process": thought.strip() if tag else "", **record}, question,
                     _solution(record.get("solution") or tag + rest or reply))
    return RawSample(fields, tuple(media["image"]), tuple(media["video"]))


def _fields(record: dict, problem: str, solution: str) -> dict[str, Any]:
    options = _options(record)
    if options and not all(option in problem for option in options):
        lines = [option if re.match(rf"\(?{letter}[.):]", option) else f"{letter}. {option}"
                 for letter, option in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", options)]
        problem = "\n".join([problem, "Options:", *lines])
    if options and option_letter(reference_answer(solution), options) is None:
        raise SampleError(f"its answer {reference_answer(solution)!r} is none of the {len(options)} options",
                          "answer_not_in_options")
    process, kind = (record.get(name) or "" for name in ("process", "problem_type"))
    fields = {"problem": problem, "solution": solution, "process": process,
              "problem_type": kind or ("multiple choice" if options else "")}
    if options:
        fields["options"] = options
    for name in ("target_boxes", "category", "fps"):
        if record.get(name):
            fields[name] = record[name]
    if record_id(record) is not None:
        fields["problem_id"] = record_id(record)
    return fields


def _options(record: dict) -> list[str]:
    options = record.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise SampleError("'options' must be a list of texts", "wrong_field")
    return options


def _text(record: dict, *names: str) -> str:
    for name in names:
        if isinstance(record.get(name), str) and record[name].strip():
            return record[name]
    raise SampleError(f"no text field '{names[0]}'", "missing_field")


def _answer(record: dict, *names: str) -> str | int | float:
    for name in names:
        value = record.get(name)
        if isinstance(value, (str, int, float)) and not isinstance(value, bool) and str(value).strip():
            return value
    raise SampleError(f"no field '{names[0]}'", "missing_field")


def _solution(answer: str | int | float) -> str:
    """In the tags that the rewards look for."""
    return str(answer) if "<answer>" in str(answer) else f"<answer>{answer}</answer>"


def _media_list(value: Any, name: str) -> tuple[Media, ...]:
    """Paths or bytes; a parquet file's pictures are {bytes, path}."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    values = [(item.get("bytes") or item.get("path")) if isinstance(item, dict) else item for item in values]
    if not all(isinstance(item, (str, bytes)) and item for item in values):
        raise SampleError(f"'{name}' must name files", "wrong_field")
    return tuple(values)


def _corners(boxes: Any) -> list[list[float]]:
    """[x, y, width, height] -> [x0, y0, x1, y1]."""
    boxes = [boxes] if isinstance(boxes, list) and boxes and not isinstance(boxes[0], list) else boxes
    try:
        return [[x, y, x + width, y + height] for x, y, width, height in boxes]
    except (TypeError, ValueError):
        raise SampleError("'bbox' must be a list of [x, y, width, height]", "target_box") from None

