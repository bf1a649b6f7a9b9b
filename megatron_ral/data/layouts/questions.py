"""Records of one question and one answer: those of Video-R1 and of the benchmarks."""

import re

from megatron_ral.data.issues import SampleError
from megatron_ral.data.layouts.draft import Draft
from megatron_ral.data.layouts.media import column_media, kind_of_files
from megatron_ral.data.layouts.values import (
    answer_of,
    corners,
    first,
    is_empty,
    lettered_answer,
    options_of,
    shown,
    text_of,
    with_system,
)


def video_r1(record: dict) -> Draft:
    """Read `problem`, `solution` (or `answer`), `path` by `data_type`, or the columns of pictures and videos.

    Of `solution` and `answer` the one is the working and the other the result, unless `solution` has an answer tag.
    """
    kind = record.get("data_type") or ("text" if is_empty(record.get("path")) else kind_of_files(record["path"]))
    if kind not in ("image", "video", "text"):
        raise SampleError(f"data_type {shown(kind)} is none of image, video, text", "wrong_field")
    has_path = not is_empty(record.get("path"))
    if record.get("data_type") == "text" and has_path:
        raise SampleError("data_type is 'text' but 'path' names media", "wrong_field")
    images, videos = (column_media(record, each, ("path",) if kind == each else ()) for each in ("image", "video"))
    if kind != "text" and not (images or videos):
        raise SampleError(f"data_type is '{kind}' but 'path' names nothing", "missing_media")
    names = ("solution", "answer") if "<answer>" in str(record.get("solution")) else ("answer", "solution")
    answer = answer_of(record, *(name for name in names if not is_empty(record.get(name))), "solution")
    question = with_system(text_of(record, "problem"), record)
    return Draft(record, question, answer, record.get("process") or "", images, videos, ("path",))


def benchmark(record: dict) -> Draft:
    """Read `question` (V* `text`, ChartQA `query`), `answer` (`label`, `answers`), options, boxes and media."""
    options, answer = options_of(record), answer_of(record, "answer", "label", "answers", "solution", "ground_truth")
    question = text_of(record, "question", "text", "query")
    if (
        not options
        and re.fullmatch("[A-Z]", str(answer))
        and not record.get("problem_type")
        and len(re.findall(r"^\s*\(?[A-Z][.):]", question, re.MULTILINE)) > 1
    ):
        # V* as published: the options stand in the question alone
        record = {**record, "problem_type": "multiple choice"}
    if first(record, ("target_boxes",)) is None and record.get("bbox"):
        record = {**record, "target_boxes": corners(record["bbox"])}
    images, videos = (column_media(record, kind) for kind in ("image", "video"))
    process = record.get("process") or ""
    question = with_system(question, record)
    return Draft(record, question, lettered_answer(answer, options), process, images, videos, ())
