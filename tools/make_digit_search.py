"""Write the digit-search task as WebDataset shards: look for the asked colour in a grid, read the digit there.

An image is a grid of handwritten digits (scikit-learn's bundled 8x8 scans), each cell in a colour of its own on black.
A digit question names a colour ("Which digit is red?"), so it can only be answered by looking at the right cell. A
colour question names a cell ("Which colour is cell 2?", counted row by row from 1) and teaches the words of the
colours. The thought before an answer says what the cell looked at holds, colour and digit ("<think>red7</think>"): the
token that names the colour is the one that has to find the cell. A small model learns to search from that in a few
hundred steps, and does not from answers alone. Five splits are written, each as a family of shards `SPLIT-%06d.tar` of
`{key}.png` and `{key}.json`:

    single    one cell, digit and colour questions half and half     train scans   (learn to read)
    search    n x n, digit and colour questions half and half        train scans   (learn to search)
    biased    n x n, digit questions, a share of them answered       train scans   (learn to look at the wrong cell)
              with the digit of the NEIGHBOURING cell
    rl        n x n, digit questions, true answers                   train scans   (correct the gaze)
    heldout   n x n, digit questions, true answers                   held-out scans

With --digits N a cell shows a number of N digits, at its top. With --bias-by colour the neighbour is the cell of the
next colour, wherever it is: a gaze that is confidently wrong, because it follows from the question. With --distinct
no number stands twice in a picture, so that a wrong cell is never right.

`target_boxes` always mark the asked cell, also where the answer is the neighbour's. No scan is in both train and
held-out. Equal arguments write equal bytes.

    python tools/make_digit_search.py --output digit_search
"""

import argparse
import io
import math
import sys
from typing import Iterator

import numpy as np

from megatron_ral.demo.search_task import (
    Split,
    add_number_options,
    add_split_sizes,
    answer,
    ask,
    check_arguments,
    check_numbers,
    colour_question,
    curriculum,
    draw_puzzles,
    join_scans,
    make_dataset,
    make_parser,
    number_of,
    numbers_of,
    paint,
    think,
)


def paint_grid(masks: np.ndarray, colours: list[str], grid: int) -> np.ndarray:
    """Paint one mask per cell in its colour; return a uint8 image [grid * cell, grid * cell, 3]."""
    cell = masks.shape[-1]
    rows = paint(masks, colours).reshape(grid, grid, cell, cell, 3).transpose(0, 2, 1, 3, 4)
    return rows.reshape(grid * cell, grid * cell, 3).round().astype(np.uint8)


def encode_png(pixels: np.ndarray) -> bytes:
    """Return a uint8 RGB image as PNG bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def neighbour_of(cell: int, grid: int) -> int:
    """Return the index of the cell to the right in the same row; the last column's neighbour is the first."""
    row, column = divmod(cell, grid)
    return row * grid + (column + 1) % grid


def generate_samples(args: argparse.Namespace, split: Split, masks: np.ndarray, digits: np.ndarray) -> Iterator[dict]:
    """Yield the samples of one split as dicts that a `webdataset.TarWriter` accepts."""
    rng = np.random.default_rng([args.seed, *split.name.encode()])
    grid, cell_pixels = math.isqrt(split.places), args.cell_pixels
    for i, puzzle in enumerate(draw_puzzles(rng, args, split, digits, lambda cell: neighbour_of(cell, grid))):
        colour, number = puzzle.colours[puzzle.asked], number_of(puzzle.scans[puzzle.read], digits)
        problem, problem_type, solution = ask(puzzle, number, colour_question)

        key = f"{split.name}_{i:06d}"
        row, column = divmod(puzzle.asked, grid)
        x0, y0 = column * cell_pixels, row * cell_pixels
        yield {
            "__key__": key,
            "png": encode_png(paint_grid(join_scans(masks[puzzle.scans], cell_pixels), puzzle.colours, grid)),
            "json": {
                "problem_id": key,
                "problem": problem,
                "process": think(colour, number),
                "solution": answer(solution),
                "problem_type": problem_type,
                "data_type": "image",
                "target_boxes": [[x0, y0, x0 + cell_pixels, y0 + cell_pixels]],
                "grid": grid,
                "cell_colours": puzzle.colours,
                "cell_digits": numbers_of(puzzle.scans, digits),
                "asked_cell": puzzle.asked,
                "answered_cell": puzzle.read,
            },
        }


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line. Every error names the option and its value."""
    parser = make_parser(__doc__.split("\n\n")[0])
    add_number_options(parser, "the cell to the right")
    add_split_sizes(parser, single=4096, search=8192, biased=4096, rl=2048, heldout=512)
    args = parser.parse_args(argv)
    if args.grid < 2:
        parser.error(f"--grid must be at least 2 (a cell needs a neighbour), got {args.grid}")
    if args.grid**2 > args.num_colours:
        parser.error(f"--grid {args.grid} needs {args.grid**2} colours, but --num-colours is {args.num_colours}")
    check_numbers(parser, args, "--grid", args.grid, args.grid**2)
    check_arguments(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    """Write the data set."""
    args = parse_arguments(argv)
    make_dataset(args, curriculum(args, args.grid**2), "digit search", generate_samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
