r"""Places of pictures and videos in a text, `<image>` and `<video>`.

All pictures are shown before the text. A single place is removed, and several become "[image 1]", "[image 2]". A tag
that means no picture is written `\<image>`. A text without any media keeps its tags, unless one stands where data sets
put a place: there the picture is lost.
"""

import re

from megatron_ral.data.issues import SampleError
from megatron_ral.data.layouts.values import shown

_ESCAPED = re.compile(r"\\(<(?:image|video)>)")
_PLACE = r"(?<!\\)<(?:image|video)>"
_LOST = re.compile(
    rf"^\s*{_PLACE}"  # at the begin of a line
    rf"|(?<!\n[A-Z])[.?!:]\s*{_PLACE}\s*$"  # after the last sentence of a line, but not as one of the options
    rf"|(?:\n[A-Z]\. {_PLACE}\s*){{2}}",  # as two of the options
    re.MULTILINE,
)
"""Position in which data sets put a place."""
_NAMED = re.compile(r"<img>[^<>\s]+\.\w+</img>")
_EMBEDDED = re.compile(r"^\s*(?:<img\s[^<>]*\bsrc\s*=[^<>]*>|!\[[^\]\n]*\]\([^()\s]+\))", re.MULTILINE | re.IGNORECASE)
"""Picture in HTML or Markdown at the begin of a line."""


def has_places(text: str) -> bool:
    """Return True if a text has the place of a picture or video."""
    return re.search(_PLACE, text) is not None


def without_places(text: str) -> str:
    """Return a text without its places."""
    return re.sub(_PLACE, "", text)


def unescaped(text: str) -> str:
    """Return a text with its escaped tags as tags."""
    return _ESCAPED.sub(r"\1", text)


def placed(text: str, num_images: int, num_videos: int, *, is_text: bool) -> str:
    """Return a question with its places numbered or removed, and its escaped tags as tags.

    Args:
        text: the question.
        num_images: pictures of the sample.
        num_videos: videos of the sample.
        is_text: True if the record says that it has no media, so that no tag is a place.

    Raises:
        SampleError: places and media differ in number.
    """
    if _NAMED.search(text):
        raise SampleError("the text names a picture in <img>..</img>; name it in 'images'", "missing_media")
    if not num_images and not num_videos:
        embedded = None if is_text else _EMBEDDED.search(text)
        if embedded:
            raise SampleError(
                f"the text shows a picture ({shown(embedded[0].strip())}) but the record names none; name it in "
                "'images', or give the record data_type 'text'",
                "missing_media",
            )
        lost = None if is_text else _LOST.search(text)
        if lost:
            kind = "image" if "<image>" in lost[0] else "video"
            raise _wrong_count(kind, _count(text, kind), 0, ", or give the record data_type 'text'")
        return unescaped(text)
    for kind, count in (("image", num_images), ("video", num_videos)):
        text = _numbered(text, kind, count)
    return unescaped(text)


def _numbered(text: str, kind: str, count: int) -> str:
    place, named = rf"(?<!\\)<{kind}>", _count(text, kind)
    if named and named != count:
        raise _wrong_count(kind, named, count)
    if named == 1:
        return re.sub(rf"\s*{place}\s*", "\n", text)
    for number in range(1, named + 1):
        text = re.sub(place, f"[{kind} {number}]", text, count=1)
    return text


def _count(text: str, kind: str) -> int:
    return len(re.findall(rf"(?<!\\)<{kind}>", text))


def _wrong_count(kind: str, named: int, count: int, way: str = "") -> SampleError:
    return SampleError(
        f"the text has <{kind}> {named} times but there are {count}; write \\<{kind}> where none is meant{way}",
        "missing_media",
    )
