"""Media that a record names: paths, bytes, data: URLs and base64 text, in columns or in the parts of a message.

Other programs read more than a file from such an entry: a part of a clip, another number of frames, another size. A
field that would change the picture or clip is refused here for all layouts, because a question about seconds 5 to 9 is
another question when the whole clip is shown.
"""

import base64
import posixpath
import re
from dataclasses import dataclass, replace
from typing import Any, Iterable, Iterator, Optional, Sequence, cast
from urllib.parse import unquote_to_bytes

from megatron_ral.data.issues import SampleError
from megatron_ral.data.layouts.values import ID_FIELDS, OPTION_FIELDS, first, is_empty, shown
from megatron_ral.data.shards import IMAGE_SUFFIXES
from megatron_ral.data.video import VideoSettings

File = str | bytes
"""Path or content of a file."""
COLUMNS = {
    "image": ("image", "images", "image_list", "image_path", "imgname"),
    "video": ("video", "videos", "video_path"),
}
RATES = ("fps", "sample_fps")
_HARMLESS = re.compile(
    "type|path|url|bytes|id|uuid|index|name|file_?name|width|height|duration|format|(?:mime|media)_type"
)
"""Fields of an entry that name the file or describe it."""
_OF = "(?:(?:video|clip|frame|time|temporal|segment|accurate)_?)?"
_CUT = re.compile(f"{_OF}(?:start|end|begin|stop)(?:_?(?:time|frame|sec(?:ond)?s?|s|pts))?", re.IGNORECASE)
_RANGE = re.compile(f"{_OF}(?:span|range|window|interval|segment|bounds?|clip|cut|trim|time_?stamps?)", re.IGNORECASE)
_TIMES = re.compile(r"\s*[0-9][0-9:.]*\s*s?\s*(?:[-–~,;]|to)\s*[0-9][0-9:.]*\s*s?\s*")
_SAMPLED = re.compile("(?:sample_)?fps|n_?frames?|(?:min|max)_(?:num_)?frames|frames?_(?:ind(?:ices|exes)|ids)")
_SIZED = re.compile("(?:(?:image|video|frame)_)?(?:resized_(?:height|width)|(?:min|max|total)_pixels)|max_image_size")
_TREATED = re.compile("crop(?:_box)?|(?:mm_processor|processor|images?|videos?)_kwargs")
_MEDIA_NAME = re.compile(
    r"\S{1,1000}\.(?:png|jpe?g|jfif|webp|avif|heic|bmp|tiff?|mp4|m4v|mov|webm|mkv|avi|gif|wav|mp3|flac|ogg|m4a)",
    re.IGNORECASE,
)
_MEDIA_FIELD = re.compile("image|img|pic|photo|video|clip|frame|media|audio", re.IGNORECASE)
_ORIGIN_FIELD = re.compile("(?:^|_)(?:id|name|source|origin|url|file)s?(?:_|$)", re.IGNORECASE)
_BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|UklGR|R0lGOD)[A-Za-z0-9+/\s]{60,}={0,2}\s*")
"""Base64 text of a JPEG, PNG, WebP or GIF file."""
_VIDEO_FILE = re.compile(r"\.(?:mp4|mov|m4v|webm|mkv|gif|avi)$", re.IGNORECASE)
_PICTURE_FILE = re.compile(rf"\.(?:{'|'.join(IMAGE_SUFFIXES)})$", re.IGNORECASE)
_TEXT_FIELD = re.compile(
    "problem|question|text|query|prompt|instruction|input|system|answers?|label|solution|process|completion|response|"
    f"output|ground_truth|{'|'.join((*ID_FIELDS, *OPTION_FIELDS))}"
)


@dataclass(frozen=True)
class Medium:
    """Picture or video that a record names."""

    file: File | tuple[File, ...]
    """Path or bytes; several: pictures that are the frames of a video."""
    name: str
    """Name of the file, also of bytes that came with one, or empty."""
    fps: Optional[float]
    """Frames per second that its entry states, or None."""

    def is_same(self, other: "Medium") -> bool:
        """Return True if both are known to be the same: equal bytes or path, or bytes that bear the other's name."""
        if isinstance(self.file, str) and isinstance(other.file, str):
            return self.name == other.name
        if type(self.file) is type(other.file):
            return self.file == other.file
        return bool(self.name) and posixpath.basename(self.name) == posixpath.basename(other.name)


def read_media(value: Any, kind: str, where: str) -> tuple[Medium, ...]:
    """Return the pictures or videos of a column, or of one part of a message.

    Args:
        value: path, bytes, data: URL or base64 text, an object with one of them, or a list; None for nothing. Pictures
            in a list of videos are the frames of one.
        kind: image or video.
        where: field or part, for errors.

    Raises:
        SampleError: something else, or an entry with a field that would change what is shown.
    """
    if is_empty(value):
        return ()
    if isinstance(value, dict):
        fps = stated_rate(value, kind, where)
        found = read_media(first(value, ("bytes", kind, f"{kind}_url", "url", "path")), kind, where)
        name = value["path"] if isinstance(value.get("path"), str) and len(found) == 1 else ""
        if found:
            return tuple(
                replace(medium, fps=only_rate((fps, medium.fps)), name=medium.name or name) for medium in found
            )
    if isinstance(value, list):
        if kind == "video" and any(map(_is_picture, value)):
            return (_frames(value, where),)
        if not any(is_empty(item) or (kind == "image" and isinstance(item, list)) for item in value):
            return tuple(medium for item in value for medium in read_media(item, kind, where))
    if not isinstance(value, (str, bytes)):
        raise SampleError(f"'{where}' must name files, which {shown(value)} does not", "wrong_field")
    file = _decoded(value, where) if isinstance(value, str) else value
    return (Medium(file, posixpath.normpath(file.removeprefix("file://")) if isinstance(file, str) else "", None),)


def _frames(values: list, where: str) -> Medium:
    if not all(map(_is_picture, values)):
        raise SampleError(
            f"'{where}' mixes pictures and other files; a list of pictures is one video, a list of video files several",
            "wrong_field",
        )
    return Medium(tuple(cast(File, frame.file) for frame in read_media(values, "image", where)), "", None)


def _is_picture(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_is_picture(value.get(name)) for name in ("bytes", "image", "image_url", "url", "path"))
    if isinstance(value, bytes):
        return value[:2] == b"\xff\xd8" or value[:4] == b"\x89PNG" or value[8:12] == b"WEBP"
    return isinstance(value, str) and (
        value.startswith("data:image/") or bool(_PICTURE_FILE.search(value) or _BASE64.fullmatch(value))
    )


def _decoded(text: str, where: str) -> File:
    """Return the bytes of a data: URL or of base64 text, or the path as it is."""
    try:
        if _BASE64.fullmatch(text):
            return base64.b64decode(text)
        if not text.startswith("data:"):
            return text
        head, comma, data = text.partition(",")
        if not comma:
            raise ValueError("it has no comma")
        is_base64 = head.endswith(";base64")
        found = base64.b64decode("".join(data.split()), validate=True) if is_base64 else unquote_to_bytes(data)
        if not found:
            raise ValueError("it is empty")
        return found
    except ValueError as error:
        raise SampleError(f"the base64 text or data: URL in '{where}' is broken ({error})", "wrong_field") from None


def stated_rate(entry: dict, kind: str, where: str) -> Optional[float]:
    """Return the frames per second that an entry states.

    Raises:
        SampleError: it has a field that would change what is shown, or that is not known.
    """
    stated = {name: entry[name] for name in RATES if kind == "video" and not is_empty(entry.get(name))}
    others = {
        name: value
        for name, value in entry.items()
        if not (is_empty(value) or name in (kind, f"{kind}_url", *stated) or _HARMLESS.fullmatch(name))
        and (name, value) not in (("detail", "auto"), ("detail", "high"))  # OpenAI's words for the full size
    }
    refuse_change(others, kind, f"'{where}'")
    for name, value in others.items():
        if kind == "image" or not _CUT.fullmatch(name):
            raise SampleError(
                f"'{where}' has the field '{name}' = {shown(value)}, which is not known here and may change the "
                f"{kind}; remove it, and change the file itself if it is meant to",
                "wrong_field",
            )
    return only_rate(stated.values())


def refuse_change(fields: dict, kind: str, where: str) -> None:
    """Raise SampleError for fields that ask for another part, rate, size or treatment of a picture or video.

    Args:
        fields: a record, a message, or an entry of a picture or video.
        kind: image or video. A part or a rate means a video's alone.
        where: the record, or the part of it, for the error.
    """
    given = {name: value for name, value in fields.items() if not is_empty(value)}
    cut = {name: value for name, value in given.items() if kind == "video" and _CUT.fullmatch(name)}
    cut |= {
        name: value for name, value in given.items() if kind == "video" and _RANGE.fullmatch(name) and _is_range(value)
    }
    if any(value not in (0, "0") or not re.search("start|begin", name, re.IGNORECASE) for name, value in cut.items()):
        raise SampleError(
            f"the question is about a part of its video ({_listed(cut)}), which is not cut here; cut the file "
            f"(ffmpeg -ss START -to END) and remove {_them(cut)}",
            "wrong_field",
        )
    for pattern, meaning, kinds in (
        (_SAMPLED, f"other frames than the {VideoSettings.fps:g} per second that are read", ("video",)),
        (_SIZED, "another size, which is the image processor's choice here", ("image", "video")),
        (_TREATED, "another treatment than the file's own picture", ("image", "video")),
    ):
        asked = {name: value for name, value in given.items() if pattern.fullmatch(name)}
        if asked and kind in kinds:
            raise SampleError(
                f"{_listed(asked)} of {where} asks for {meaning}; change the file itself if it is needed, and remove "
                f"{_them(asked)}",
                "wrong_field",
            )


def _is_range(value: Any) -> bool:
    """Return True for two or more numbers, or for a text of two ("00:05-00:09")."""
    if isinstance(value, (list, dict)):
        numbers = list(value.values()) if isinstance(value, dict) else value
        return len(numbers) > 1 and all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers)
    return isinstance(value, str) and _TIMES.fullmatch(value) is not None


def _listed(fields: dict) -> str:
    return ", ".join(f"'{name}' = {shown(value)}" for name, value in fields.items())


def _them(fields: dict) -> str:
    return "the field" if len(fields) == 1 else "the fields"


def rate_of(record: dict, videos: Sequence[Medium]) -> Optional[float]:
    """Return the frames per second of the pictures that are a sample's video, or None if nothing states it.

    Raises:
        SampleError: another rate than the one at which files of videos are read here, or several different ones.
    """
    rate = only_rate([video.fps for video in videos] + [record.get(name) for name in RATES])
    files = any(isinstance(v.file, bytes) or (isinstance(v.file, str) and _VIDEO_FILE.search(v.file)) for v in videos)
    if files and rate not in (None, VideoSettings.fps):
        raise SampleError(
            f"'fps' = {shown(rate)} of its video asks for other frames than the {VideoSettings.fps:g} per second "
            "that are read; remove the field, or give the frames as a list of pictures",
            "wrong_field",
        )
    return rate


def only_rate(stated: Iterable[Any]) -> Optional[float]:
    """Return the only one of several stated rates that is not empty, or None.

    Raises:
        SampleError: two differ.
    """
    rates: list = []
    for rate in stated:
        rate = _number(rate)
        if not is_empty(rate) and rate not in rates:
            rates.append(rate)
    if len(rates) > 1:
        raise SampleError(
            f"its video has several rates ('fps' = {', '.join(map(shown, rates))}); keep one", "wrong_field"
        )
    return rates[0] if rates else None


def _number(rate: Any) -> Any:
    """Return a rate that is written as text (Qwen's examples: 'sample_fps': '1') as a number, others as they are."""
    try:
        return float(rate) if isinstance(rate, str) else rate
    except ValueError:
        return rate


def kind_of_files(value: Any) -> str:
    """Return `video` where all files are named as videos, otherwise `image`."""
    files = value if isinstance(value, list) else [value]
    return "video" if all(isinstance(file, str) and _VIDEO_FILE.search(file) for file in files) else "image"


def names_media(value: Any) -> bool:
    """Return True for bytes, and for a text that is the name of a file of pictures, video or sound."""
    return isinstance(value, bytes) or (isinstance(value, str) and _MEDIA_NAME.fullmatch(value) is not None)


def column_media(record: dict, kind: str, fields: Iterable[str] = ()) -> tuple[Medium, ...]:
    """Return what the columns of a record name, once if several columns name the same.

    Args:
        record: the record.
        kind: image or video.
        fields: fields that are read besides the columns of this kind.

    Raises:
        SampleError: two columns name different files, or files that cannot be told to be the same.
    """
    found: tuple[Medium, ...] = ()
    source = ""
    for name in (*fields, *COLUMNS[kind]):
        media = read_media(record.get(name), kind, name)
        if media and found:
            found = merged(found, media, f"the field '{source}'", f"the field '{name}'")
        elif media:
            found, source = media, name
    return found


def merged(one: Sequence[Medium], other: Sequence[Medium], where: str, elsewhere: str) -> tuple[Medium, ...]:
    """Return media that two places of a record name, once.

    Raises:
        SampleError: they are not known to be the same.
    """
    if len(one) != len(other) or not all(left.is_same(right) for left, right in zip(one, other)):
        raise SampleError(
            f"{where} and {elsewhere} both name media, and not the same; remove those of one of them", "wrong_field"
        )
    # bytes are there already; a path may lead nowhere
    return tuple(
        replace(right if isinstance(right.file, bytes) else left, fps=only_rate((left.fps, right.fps)))
        for left, right in zip(one, other)
    )


def refuse_unread(fields: dict, read: Sequence[str], media: Sequence[Medium]) -> None:
    """Raise SampleError if a field that is not read seems to name media.

    Otherwise a question about a picture would become a question without one, or about fewer.

    Args:
        fields: a record, or a message of it.
        read: fields that are read.
        media: pictures and videos of the sample.
    """
    names = {posixpath.basename(medium.name) for medium in media} - {""}
    for name, value in fields.items():
        if _TEXT_FIELD.fullmatch(name) or name in read:
            continue
        found = [item for item in _leaves(value) if names_media(item)]
        if media:  # a name of its own, such as that of the scene or in a description, says nothing about what is shown
            listed = value if isinstance(value, list) else [value]
            is_field = _MEDIA_FIELD.search(name) and not _ORIGIN_FIELD.search(name)
            others = [item for item in listed if is_field and names_media(item) and _basename(item) not in names]
            found = [item for item in found if isinstance(item, bytes)] + others
        if found or (name in ("audio", "audios") and not is_empty(value)):
            columns = ", ".join((*COLUMNS["image"], *COLUMNS["video"]))
            raise SampleError(
                f"field '{name}' seems to name media, but is none that is read ({columns}); rename or remove it",
                "missing_media",
            )


def _basename(item: str | bytes) -> str:
    return posixpath.basename(item) if isinstance(item, str) else ""


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the values in a value, however deep."""
    if isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value
