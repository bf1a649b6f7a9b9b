"""Write the video-search task as WebDataset shards: look for the asked colour in a clip, read the digit there.

The sibling of make_digit_search.py in time. A clip is a few scenes of equal length; each shows a handwritten digit (or
a number of several, --digits), in a colour of its own, in a random cell of an otherwise black grid. A digit question
names a colour ("Which digit is red?"), which appears in one scene only; a colour question names a scene ("Which colour
is scene 2?", counted from 1). The thought before the answer is that of digit search. Clips are real mp4 files (H.264,
4:2:0) written through PyAV; with the defaults each scene is one temporal patch of a Qwen2.5-VL that samples a frame per
second. Five splits are written, each as a family of shards `SPLIT-%06d.tar` of `{key}.mp4` and `{key}.json`:

    single    one scene, digit and colour questions half and half     train scans   (learn to read)
    search    n scenes, digit and colour questions half and half      train scans   (learn to search)
    biased    n scenes, digit questions, a share of them answered     train scans   (learn to look at the wrong scene)
              with the digit of the NEXT scene (or of the scene of
              the next colour, --bias-by)
    rl        n scenes, digit questions, true answers                 train scans   (correct the gaze)
    heldout   n scenes, digit questions, true answers                 held-out scans

`target_frames` always mark the asked scene and cell, also where the answer is another scene's: seconds [start, end) of
the clip and boxes in pixels of a frame. No scan is in both train and held-out. Equal arguments write equal bytes.

    python tools/make_video_search.py --output video_search
"""

import argparse
import io
import sys
from typing import Iterator, Sequence

import numpy as np

from megatron_ral.demo.search_task import (
    Split,
    add_number_options,
    add_split_sizes,
    answer,
    ask,
    check_arguments,
    check_numbers,
    curriculum,
    draw_puzzles,
    join_scans,
    make_dataset,
    make_parser,
    number_of,
    numbers_of,
    paint,
    scene_question,
    think,
)

QUALITY = {"preset": "veryfast", "crf": "18"}  # strokes and hues survive; see test_video_search.py


def encode_mp4(frames: Sequence[np.ndarray], fps: int) -> bytes:
    """Return an H.264 mp4 of uint8 RGB frames [H, W, 3] of one even size, `fps` of them per second."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as output:
        stream = output.add_stream("libx264", rate=fps, options=QUALITY)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # with more, the bytes depend on the machine
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


def paint_scenes(masks: np.ndarray, colours: list[str], cells: Sequence[int], grid: int) -> np.ndarray:
    """Paint one frame per scene, black but for its digit: uint8 [scenes, grid * cell, grid * cell, 3]."""
    side = masks.shape[-1]
    frames = np.zeros((len(masks), grid * side, grid * side, 3), dtype=np.uint8)
    for frame, digit, cell in zip(frames, paint(masks, colours).round(), cells):
        x0, y0, x1, y1 = cell_box(cell, grid, side)
        frame[y0:y1, x0:x1] = digit
    return frames


def cell_box(cell: int, grid: int, side: int) -> list[int]:
    """Return [x0, y0, x1, y1] of a cell, counted row by row from 0."""
    row, column = divmod(int(cell), grid)
    return [column * side, row * side, (column + 1) * side, (row + 1) * side]


def generate_samples(args: argparse.Namespace, split: Split, masks: np.ndarray, digits: np.ndarray) -> Iterator[dict]:
    """Yield the samples of one split as dicts that a `webdataset.TarWriter` accepts."""
    rng = np.random.default_rng([args.seed, *split.name.encode()])
    for i, puzzle in enumerate(draw_puzzles(rng, args, split, digits, lambda scene: (scene + 1) % split.places)):
        cells = rng.integers(args.grid**2, size=split.places)
        scenes = paint_scenes(join_scans(masks[puzzle.scans], args.cell_pixels), puzzle.colours, cells, args.grid)
        colour, number = puzzle.colours[puzzle.asked], number_of(puzzle.scans[puzzle.read], digits)
        problem, problem_type, solution = ask(puzzle, number, scene_question)

        key = f"{split.name}_{i:06d}"
        start = puzzle.asked * args.scene_seconds
        yield {
            "__key__": key,
            "mp4": encode_mp4(np.repeat(scenes, args.scene_seconds * args.fps, axis=0), args.fps),
            "json": {
                "problem_id": key,
                "problem": problem,
                "process": think(colour, number),
                "solution": answer(solution),
                "problem_type": problem_type,
                "category": f"scene {puzzle.asked + 1}",
                "data_type": "video",
                "target_frames": [
                    {
                        "seconds": [start, start + args.scene_seconds],
                        "boxes": [cell_box(cells[puzzle.asked], args.grid, args.cell_pixels)],
                    }
                ],
                "scene_colours": puzzle.colours,
                "scene_digits": numbers_of(puzzle.scans, digits),
                "scene_cells": cells.tolist(),
                "asked_scene": puzzle.asked,
                "answered_scene": puzzle.read,
            },
        }


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line. Every error names the option and its value."""
    parser = make_parser(__doc__.split("\n\n")[0])
    parser.add_argument("--scenes", type=int, default=4, help="scenes of a clip")
    parser.add_argument("--scene-seconds", type=int, default=2, help="length of a scene")
    parser.add_argument("--fps", type=int, default=2, help="frames per second of the files")
    add_number_options(parser, "the next scene")
    add_split_sizes(parser, single=2048, search=4096, biased=3072, rl=1024, heldout=512)
    args = parser.parse_args(argv)
    for name, least in (("grid", 1), ("scenes", 2), ("scene_seconds", 1), ("fps", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    check_numbers(parser, args, "--scenes", args.scenes, args.scenes)
    if args.scenes > args.num_colours:
        parser.error(f"--scenes {args.scenes} needs as many colours, but --num-colours is {args.num_colours}")
    if args.grid * args.cell_pixels % 2:
        parser.error(f"--grid {args.grid} times --cell-pixels {args.cell_pixels} must be even (H.264 at 4:2:0)")
    check_arguments(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    """Write the data set."""
    args = parse_arguments(argv)
    make_dataset(args, curriculum(args, args.scenes), "video search", generate_samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
