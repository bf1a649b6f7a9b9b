"""Write the digit-search task as WebDataset shards: look for the asked colour in a grid, read the digit there.

An image is a grid of handwritten digits (scikit-learn's bundled 8x8 scans), each cell in a colour of its own on black.
A digit question names a colour ("Which digit is red?"), so it can only be answered by looking at the right cell. A
colour question names a cell ("Which colour is cell 2?", counted row by row from 1) and teaches the words of the colours.
The thought before an answer says what the cell looked at holds, colour and digit ("<think>red7</think>"): the token that
names the colour is the one that has to find the cell. A small model learns to search from that in a few hundred steps,
and does not from answers alone. Five splits are written, each as a family of shards `SPLIT-%06d.tar` of `{key}.png` and
`{key}.json`:

    single    one cell, digit and colour questions half and half     train scans   (learn to read)
    search    n x n, digit and colour questions half and half        train scans   (learn to search)
    biased    n x n, digit questions, a share of them answered       train scans   (learn to look at the wrong cell)
              with the digit of the NEIGHBOURING cell
    rl        n x n, digit questions, true answers                   train scans   (correct the gaze)
    heldout   n x n, digit questions, true answers                   held-out scans

`target_boxes` always mark the asked cell, also where the answer is the neighbour's. The scans are split once and for all,
whatever the seed: no scan is in both train and held-out. Equal arguments write equal bytes.

    python tools/make_digit_search.py --output digit_search
"""

import argparse
import io
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Colours of clearly different hue: the strokes of a scan are shaded, so two colours must not be shades of one another.
PALETTE = {
    "red": (255, 0, 0),
    "green": (0, 190, 0),
    "blue": (40, 70, 255),
    "yellow": (255, 235, 0),
    "cyan": (0, 235, 255),
    "magenta": (255, 0, 220),
    "white": (255, 255, 255),
    "orange": (255, 125, 0),
    "purple": (130, 0, 230),
}
HELDOUT_SHARE = 0.2
SCAN_SPLIT_SEED = 1797  # fixed: the split of the scans does not depend on --seed
SHARD_MULTIPLE = 4  # up to four data-parallel ranks get whole shards
INFO_FILE = "dataset_info.json"


@dataclass(frozen=True)
class Split:
    """What one family of shards holds."""

    name: str
    num_samples: int
    grid: int  # cells along one side
    colour_share: float  # share of the questions that ask for a colour
    bias: float  # share of the digit questions that are answered with the neighbour's digit
    heldout_scans: bool


def digit_question(colour: str) -> str:
    """Question for the digit of one colour."""
    return f"Which digit is {colour}?"


def colour_question(cell: int) -> str:
    """Question for the colour of one cell, counted row by row from 1."""
    return f"Which colour is cell {cell}?"


def think(colour: str, digit: int) -> str:
    """Thought before the answer, for supervised fine-tuning: colour and digit with nothing in between."""
    return f"<think>{colour}{digit}</think>"


def answer(text: str) -> str:
    """Answer in the tags that the rewards look for."""
    return f"<answer>{text}</answer>"


def load_scans(cell_pixels: int, heldout: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scans of one side of the fixed split, enlarged to nearly fill a cell.

    Returns (masks, digits): masks float32 [count, cell_pixels, cell_pixels] in [0, 1], digits int [count].
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(SCAN_SPLIT_SEED).permutation(len(bunch.target))
    num_heldout = round(HELDOUT_SHARE * len(order))
    chosen = order[:num_heldout] if heldout else order[num_heldout:]

    margin = max(1, cell_pixels // 14)
    side = cell_pixels - 2 * margin
    masks = np.zeros((len(chosen), cell_pixels, cell_pixels), dtype=np.float32)
    for mask, scan in zip(masks, bunch.images[chosen]):
        enlarged = Image.fromarray((scan / 16.0).astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR)
        mask[margin : margin + side, margin : margin + side] = np.asarray(enlarged)
    return masks, bunch.target[chosen]


def paint_grid(masks: np.ndarray, colours: list[str], grid: int) -> np.ndarray:
    """Paint one mask per cell in its colour; returns a uint8 image [grid * cell, grid * cell, 3]."""
    cell = masks.shape[-1]
    rgb = np.array([PALETTE[colour] for colour in colours], dtype=np.float32)
    cells = masks[:, :, :, None] * rgb[:, None, None, :]
    rows = cells.reshape(grid, grid, cell, cell, 3).transpose(0, 2, 1, 3, 4)
    return rows.reshape(grid * cell, grid * cell, 3).round().astype(np.uint8)


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG bytes of a uint8 RGB image."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def neighbour_of(cell: int, grid: int) -> int:
    """Index of the cell to the right in the same row; the last column's neighbour is the first."""
    row, column = divmod(cell, grid)
    return row * grid + (column + 1) % grid


def marked_share(rng: np.random.Generator, count: int, share: float) -> np.ndarray:
    """Bool [count] with exactly round(share * count) marks in random places."""
    marks = np.zeros(count, dtype=bool)
    marks[: round(share * count)] = True
    return rng.permutation(marks)


def generate_samples(split: Split, masks: np.ndarray, digits: np.ndarray, colour_names: list[str], seed: int):
    """Yield the samples of one split as dicts that a `webdataset.TarWriter` accepts."""
    rng = np.random.default_rng([seed, *split.name.encode()])
    asks_colour = marked_share(rng, split.num_samples, split.colour_share)
    looks_aside = np.zeros(split.num_samples, dtype=bool)
    looks_aside[~asks_colour] = marked_share(rng, int((~asks_colour).sum()), split.bias)

    num_cells = split.grid**2
    cell_pixels = masks.shape[-1]
    for i in range(split.num_samples):
        scans = rng.integers(len(masks), size=num_cells)
        colours = [colour_names[c] for c in rng.permutation(len(colour_names))[:num_cells]]
        asked = int(rng.integers(num_cells))
        read = neighbour_of(asked, split.grid) if looks_aside[i] else asked
        digit = int(digits[scans[read]])
        if asks_colour[i]:
            problem, problem_type, solution = colour_question(asked + 1), "free-form", colours[asked]
        else:
            problem, problem_type, solution = digit_question(colours[asked]), "numerical", str(digit)

        key = f"{split.name}_{i:06d}"
        row, column = divmod(asked, split.grid)
        x0, y0 = column * cell_pixels, row * cell_pixels
        yield {
            "__key__": key,
            "png": encode_png(paint_grid(masks[scans], colours, split.grid)),
            "json": {
                "problem_id": key,
                "problem": problem,
                "process": think(colours[asked], digit),
                "solution": answer(solution),
                "problem_type": problem_type,
                "data_type": "image",
                "target_boxes": [[x0, y0, x0 + cell_pixels, y0 + cell_pixels]],
                "grid": split.grid,
                "cell_colours": colours,
                "cell_digits": [int(digits[s]) for s in scans],
                "asked_cell": asked,
                "answered_cell": read,
            },
        }


def shard_sizes(num_samples: int, shard_size: int) -> list[int]:
    """Samples of each shard: as even as can be, a multiple of four shards, none above `shard_size`."""
    num_shards = -(-num_samples // shard_size)
    num_shards = -(-num_shards // SHARD_MULTIPLE) * SHARD_MULTIPLE
    small, larger_shards = divmod(num_samples, num_shards)
    return [small + (shard < larger_shards) for shard in range(num_shards)]


def write_split(folder: Path, split: Split, args: argparse.Namespace, progress) -> dict:
    """Write the shards of one split; returns their entry in the info file."""
    import webdataset

    masks, digits = load_scans(args.cell_pixels, split.heldout_scans)
    samples = generate_samples(split, masks, digits, list(PALETTE)[: args.num_colours], args.seed)
    shards = []
    for number, size in enumerate(shard_sizes(split.num_samples, args.shard_size)):
        name = f"{split.name}-{number:06d}.tar"
        with webdataset.TarWriter(str(folder / name), mtime=0) as writer:
            for _ in range(size):
                writer.write(next(samples))
                progress.update()
        shards.append({"name": name, "num_samples": size})
    return {
        "num_samples": split.num_samples,
        "grid": split.grid,
        "colour_share": split.colour_share,
        "bias": split.bias,
        "scans": "heldout" if split.heldout_scans else "train",
        "num_scans": len(masks),
        "shards": shards,
    }


def write_dataset(args: argparse.Namespace, splits: list[Split], folder: Path) -> None:
    """Write all splits and the info file into an existing folder."""
    from tqdm import tqdm

    with tqdm(total=sum(split.num_samples for split in splits), unit="sample", desc="digit search", mininterval=0.5) as progress:
        info = {split.name: write_split(folder, split, args, progress) for split in splits}
    arguments = {name: value for name, value in vars(args).items() if name not in ("output", "force")}
    colours = {name: PALETTE[name] for name in list(PALETTE)[: args.num_colours]}
    text = json.dumps({"arguments": arguments, "colours": colours, "splits": info}, indent=1)
    (folder / INFO_FILE).write_text(text + "\n")


def replace_folder(source: Path, target: Path) -> None:
    """Move `source` to `target`; a data set already there is set aside first and deleted last."""
    aside = None
    if target.exists():
        aside = target.with_name(f".{target.name}.old-{os.getpid()}")
        os.rename(target, aside)
    os.rename(source, target)
    if aside is not None:
        shutil.rmtree(aside)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line; every error names the option and its value."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--force", action="store_true", help="replace a data set that is already in --output")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything but the split of the scans")
    parser.add_argument("--grid", type=int, default=2, help="cells along one side of an image")
    parser.add_argument("--cell-pixels", type=int, default=28, help="side of a cell; 28 is one Qwen2.5-VL visual token")
    parser.add_argument("--num-colours", type=int, default=8, help="colours in use, from the start of the palette")
    parser.add_argument("--bias", type=float, default=0.6, help="share of wrong-cell answers in the biased split")
    parser.add_argument("--shard-size", type=int, default=2048, help="most samples in one shard")
    parser.add_argument("--num-single", type=int, default=4096, help="samples in the single split")
    parser.add_argument("--num-search", type=int, default=8192, help="samples in the search split")
    parser.add_argument("--num-biased", type=int, default=4096, help="samples in the biased split")
    parser.add_argument("--num-rl", type=int, default=2048, help="samples in the rl split")
    parser.add_argument("--num-heldout", type=int, default=512, help="samples in the heldout split")
    args = parser.parse_args(argv)

    if args.seed < 0:
        parser.error(f"--seed must not be negative, got {args.seed}")
    if args.grid < 2:
        parser.error(f"--grid must be at least 2 (a cell needs a neighbour), got {args.grid}")
    if not 1 <= args.num_colours <= len(PALETTE):
        parser.error(f"--num-colours must lie in 1..{len(PALETTE)} (the palette), got {args.num_colours}")
    if args.grid**2 > args.num_colours:
        parser.error(f"--grid {args.grid} needs {args.grid**2} colours, but --num-colours is {args.num_colours}")
    if args.cell_pixels < 10:
        parser.error(f"--cell-pixels must be at least 10 to show an 8x8 scan, got {args.cell_pixels}")
    if not 0.0 <= args.bias <= 1.0:
        parser.error(f"--bias must lie in 0..1, got {args.bias}")
    if args.shard_size < 1:
        parser.error(f"--shard-size must be at least 1, got {args.shard_size}")
    for name in ("single", "search", "biased", "rl", "heldout"):
        if getattr(args, f"num_{name}") < SHARD_MULTIPLE:
            parser.error(
                f"--num-{name} must be at least {SHARD_MULTIPLE} (one per shard), got {getattr(args, f'num_{name}')}"
            )
    if args.output.exists():
        if not args.force:
            parser.error(f"--output {args.output} exists already; give --force to replace it")
        if not (args.output / INFO_FILE).is_file():
            parser.error(f"--output {args.output} holds no {INFO_FILE}, so --force will not delete it")
    return args


def main(argv: list[str] | None = None) -> int:
    """Write the data set to a temporary folder beside --output, then rename it."""
    args = parse_arguments(argv)
    splits = [
        Split("single", args.num_single, grid=1, colour_share=0.5, bias=0.0, heldout_scans=False),
        Split("search", args.num_search, grid=args.grid, colour_share=0.5, bias=0.0, heldout_scans=False),
        Split("biased", args.num_biased, grid=args.grid, colour_share=0.0, bias=args.bias, heldout_scans=False),
        Split("rl", args.num_rl, grid=args.grid, colour_share=0.0, bias=0.0, heldout_scans=False),
        Split("heldout", args.num_heldout, grid=args.grid, colour_share=0.0, bias=0.0, heldout_scans=True),
    ]
    output = args.output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        write_dataset(args, splits, partial)
        replace_folder(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"wrote {sum(split.num_samples for split in splits)} samples in {len(splits)} splits to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
