"""Describe a folder of shards: counts, lengths, visual tokens, kinds of answers, and a picture of some samples.

    megatron-ral inspect DIR [--output sheet.png] [--num-samples 12] [--seed 0]

Lengths come from the indexes beside the shards (`megatron-ral shards index` writes them). The contact sheet shows
images with their target boxes in red, or four frames of a video, at least one of them annotated where there is one, and
below them question and answer. Also `python tools/inspect_shards.py`.
"""

import argparse
import random
import re
import textwrap
from collections import Counter
from pathlib import Path
from typing import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megatron_ral.commands.common import Arguments, command
from megatron_ral.data.index import UNKNOWN, ShardIndex, open_index
from megatron_ral.data.issues import REASONS, SampleError
from megatron_ral.data.shards import find_shards, parse_sample, read_entry, reference_answer
from megatron_ral.types import Box, Sample

CELL, TEXT_LINES, LINE = 280, 7, 15
"""Side of a sample's picture, lines of text below it, and height of a line, in pixels."""


def answer_type(solution: str) -> str:
    """Return the kind of a reference answer, judged by its form."""
    answer = reference_answer(solution)
    if re.fullmatch(r"\(?[A-Za-z]\)?\.?", answer):
        return "letter"
    if re.fullmatch(r"[-+]?[\d.,]+ ?%?", answer):
        return "number"
    if answer.casefold() in ("yes", "no", "true", "false"):
        return "yes/no"
    return "one word" if len(answer.split()) == 1 else "text" if answer else "empty"


def describe(values: np.ndarray) -> str:
    """Return minimum, median, 95th percentile, maximum and mean of the known lengths as text."""
    known = values[values != UNKNOWN]
    if not len(known):
        return "unknown"
    low, middle, high, top = np.percentile(known, [0, 50, 95, 100])
    return f"min {low:.0f}, median {middle:.0f}, 95 % {high:.0f}, max {top:.0f}, mean {known.mean():.1f}"


def count(indexes: list[ShardIndex]) -> list[str]:
    """Return the lines of the report. Reads the text of every sample and decodes nothing."""
    types, answers, media, reasons, boxes = Counter(), Counter(), Counter(), Counter(), 0
    for index in indexes:
        reasons["truncated"] += bool(index.damage)
        for number in range(len(index)):
            try:
                if number in index.faults:
                    raise SampleError(index.faults[number].text, index.faults[number].reason)
                sample = parse_sample(read_entry(index, number))
            except SampleError as error:
                reasons[error.reason] += 1
                continue
            types[sample.problem_type or "(none)"] += 1
            answers[answer_type(sample.solution)] += 1
            media[f"{len(sample.images)} images, {len(sample.videos)} videos"] += 1
            boxes += bool(sample.target_boxes or sample.target_frames)
    total = sum(map(len, indexes))
    sizes = [len(index) for index in indexes]
    lines = [
        f"{total} samples in {len(indexes)} shards ({min(sizes)} to {max(sizes)} each), "
        f"{boxes} with target boxes or frames"
    ]
    for name in ("prompt_lengths", "visual_tokens"):
        parts = [getattr(index, name) for index in indexes if getattr(index, name) is not None]
        text = describe(np.concatenate(parts)) if parts else "unknown"
        missing = f" ({len(indexes) - len(parts)} shards without index)" if len(parts) < len(indexes) else ""
        lines.append(f"{name.replace('_', ' ')}: {text}{missing}")
    for title, counter in (("media", media), ("problem types", types), ("answers", answers)):
        lines.append(f"{title}: " + ", ".join(f"{name} {number}" for name, number in counter.most_common()))
    return lines + [
        f"not usable: {number} {reason} ({REASONS[reason]})" for reason, number in reasons.most_common() if number
    ]


def draw_sample(sample: Sample) -> Image.Image:
    """Draw one cell of the sheet: picture above, question and answer below."""
    cell = Image.new("RGB", (CELL, CELL + TEXT_LINES * LINE + 8), "white")
    try:
        picture = _picture(sample)
    except Exception as error:  # PIL and FFmpeg raise many types, and each means that the sample cannot be shown
        picture = Image.new("RGB", (CELL, CELL), "lightgrey")
        ImageDraw.Draw(picture).text((4, 4), textwrap.fill(str(error), 42), fill="black")
    picture.thumbnail((CELL - 8, CELL - 8))
    cell.paste(picture, ((CELL - picture.width) // 2, (CELL - picture.height) // 2))
    text = [f"{sample.key}  [{sample.problem_type}]"]
    text += textwrap.wrap(sample.problem, 44)[: TEXT_LINES - 2] + [f"-> {reference_answer(sample.solution)[:40]}"]
    ImageDraw.Draw(cell).multiline_text(
        (4, CELL), "\n".join(text), fill="black", spacing=2, font=ImageFont.load_default(12)
    )
    return cell


def _picture(sample: Sample) -> Image.Image:
    """Draw up to four images, the first with its boxes, or four frames of the first video, an annotated one among
    them."""
    if sample.images:
        from megatron_ral.data.pictures import read_picture

        images = [read_picture(data) for data in sample.images[:4]]
        return _tiles(
            [_framed(image, sample.target_boxes if number == 0 else ()) for number, image in enumerate(images)]
        )
    if sample.videos:
        from megatron_ral.data.targets import in_span
        from megatron_ral.data.video import VideoSettings, read_clip

        clip = read_clip(sample.videos[0], VideoSettings(14, 2, 2, (0.0,) * 3, (1.0,) * 3))
        marks: dict[int, list] = {}
        for target in sample.target_frames:
            for place in in_span(clip.timestamps, target).nonzero().flatten().tolist():
                marks.setdefault(place, []).extend(target.boxes or [(0, 0, *clip.frames.shape[:1:-1])])
        chosen = set(np.linspace(0, len(clip.frames) - 1, 4).round().astype(int).tolist())
        if marks and not chosen & set(marks):
            chosen.remove(min(chosen, key=lambda place: min(abs(place - mark) for mark in marks)))
            chosen.add(min(marks))
        return _tiles(
            [
                _framed(Image.fromarray(clip.frames[place].permute(1, 2, 0).numpy()), marks.get(place, ()))
                for place in sorted(chosen)
            ]
        )
    return Image.new("RGB", (CELL, CELL), "lightgrey")


def _framed(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """Draw boxes on a picture. A small one is enlarged first, so that the boxes can be seen."""
    scale = max(1, CELL // max(image.size))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    for box in boxes:
        ImageDraw.Draw(image).rectangle(
            [scale * value for value in box], outline="red", width=max(2, max(image.size) // 120)
        )
    return image


def _tiles(pictures: list[Image.Image]) -> Image.Image:
    """Arrange pictures two in a row; return a single one unchanged."""
    if len(pictures) == 1:
        return pictures[0]
    width, height = (max(picture.size[axis] for picture in pictures) + 4 for axis in (0, 1))
    sheet = Image.new("RGB", (2 * width, -(-len(pictures) // 2) * height), "white")
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % 2 * width, number // 2 * height))
    return sheet


def contact_sheet(indexes: list[ShardIndex], num_samples: int, seed: int) -> Image.Image:
    """Draw samples chosen at random over all shards, in file order."""
    places = [(index, number) for index in indexes for number in range(len(index)) if number not in index.faults]
    chosen = sorted(random.Random(seed).sample(range(len(places)), min(num_samples, len(places))))
    cells = []
    for place in chosen:
        try:
            cells.append(draw_sample(parse_sample(read_entry(*places[place]))))
        except SampleError:
            continue
    columns = min(4, max(1, len(cells)))
    height = CELL + TEXT_LINES * LINE + 8
    sheet = Image.new("RGB", (columns * CELL, max(1, -(-len(cells) // columns)) * height), "white")
    for number, cell in enumerate(cells):
        sheet.paste(cell, ((number % columns) * CELL, number // columns * height))
    return sheet


@command
def main(argv: Arguments = None) -> int:
    """Print the report and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of shards")
    parser.add_argument("--output", type=Path, help="contact sheet to write (default: contact_sheet.png in the folder)")
    parser.add_argument("--num-samples", type=int, default=12, help="samples on the sheet (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of samples (default: %(default)s)")
    args = parser.parse_args(argv)
    indexes = [open_index(shard) for shard in find_shards(f"{args.folder}/*.tar", "folder")]
    print("\n".join(count(indexes)))
    output = args.output or args.folder / "contact_sheet.png"
    contact_sheet(indexes, args.num_samples, args.seed).save(output)
    print(f"contact sheet in {output}")
    return 0
