"""Scans, colours, questions, splits and shards of the search tasks (tools/make_digit_search.py, make_video_search.py).

In both tasks digits of scikit-learn's bundled 8x8 scans are painted in colours on black and a question names a colour.
The scans are split once and for all, whatever the seed: no scan is in both train and held-out. Equal arguments write
equal bytes.
"""

import argparse
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, cast

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
    """Content of one family of shards."""

    name: str
    num_samples: int
    places: int  # that a digit can be asked for in: cells of an image, scenes of a clip
    colour_share: float  # share of the questions that ask for a colour
    bias: float  # share of the digit questions that are answered with the neighbour's digit
    heldout_scans: bool


@dataclass(frozen=True)
class Puzzle:
    """One question before it is painted."""

    scans: np.ndarray  # [places, digits of a number] int, which scans stand in each place
    colours: list[str]  # [places]
    asked: int  # place that the question is about
    read: int  # place whose digit is the answer: the asked one or, where the gaze is biased, its neighbour
    asks_colour: bool


def digit_question(colour: str, num_digits: int = 1) -> str:
    """Return the question for the number of one colour."""
    return f"Which digit is {colour}?" if num_digits == 1 else f"Which digits are {colour}?"


def colour_question(cell: int) -> str:
    """Return the question for the colour of one cell, counted row by row from 1."""
    return f"Which colour is cell {cell}?"


def scene_question(scene: int) -> str:
    """Return the question for the colour of one scene, counted from 1."""
    return f"Which colour is scene {scene}?"


def ask(puzzle: Puzzle, number: str, colour_question: Callable[[int], str]) -> tuple[str, str, str]:
    """Return problem, problem type and answer of a puzzle.

    Args:
        number: digits that are the answer of a digit question.
        colour_question: makes the question for the colour of a place, 1-based.
    """
    colour = puzzle.colours[puzzle.asked]
    if puzzle.asks_colour:
        return colour_question(puzzle.asked + 1), "free-form", colour
    return digit_question(colour, len(number)), "numerical", number


def think(colour: str, number: str) -> str:
    """Return the thought before the answer for supervised fine-tuning: colour and digits with nothing in between."""
    return f"<think>{colour}{number}</think>"


def number_of(scans: np.ndarray, digits: np.ndarray) -> str:
    """Return the digits of some scans, from left to right."""
    return "".join(str(int(digits[scan])) for scan in scans)


def next_colour(colour_names: list[str]) -> Callable[[int, list[str]], int]:
    """Return a function (place, colours of all places) -> the place of the next colour of the palette that is shown."""

    def find(place: int, colours: list[str]) -> int:
        order = sorted(range(len(colours)), key=lambda other: colour_names.index(colours[other]))
        return order[(order.index(place) + 1) % len(order)]

    return find


def numbers_of(scans: np.ndarray, digits: np.ndarray) -> list[int] | list[str]:
    """Return the numbers that stand in all places, for the record of a sample: single digits as int, else text.

    Args:
        scans: int [places, digits of a number].
        digits: digit of each scan.
    """
    numbers = [number_of(place, digits) for place in scans]
    return [int(number) for number in numbers] if scans.shape[-1] == 1 else numbers


def answer(text: str) -> str:
    """Return an answer in the tags that the rewards search for."""
    return f"<answer>{text}</answer>"


def load_scans(cell_pixels: int, heldout: bool) -> tuple[np.ndarray, np.ndarray]:
    """Load the scans of one side of the fixed split, enlarged to nearly fill a cell.

    Returns (masks, digits): masks float32 [count, cell_pixels, cell_pixels] in [0, 1], digits int [count].
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = cast(Any, load_digits())
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


def join_scans(masks: np.ndarray, cell_pixels: int) -> np.ndarray:
    """Put the scans of a number side by side at the top, [cells, digits, side, side] to [cells, cell, cell] float32."""
    cells, digits, side, _ = masks.shape
    joined = np.zeros((cells, cell_pixels, cell_pixels), dtype=np.float32)
    left = (cell_pixels - digits * side) // 2
    joined[:, :side, left : left + digits * side] = masks.transpose(0, 2, 1, 3).reshape(cells, side, -1)
    return joined


def paint(masks: np.ndarray, colours: list[str]) -> np.ndarray:
    """Paint each mask [side, side] in its colour; return levels, float32 [count, side, side, 3]."""
    rgb = np.array([PALETTE[colour] for colour in colours], dtype=np.float32)
    return masks[:, :, :, None] * rgb[:, None, None, :]


def marked_share(rng: np.random.Generator, count: int, share: float) -> np.ndarray:
    """Return bool [count] with exactly round(share * count) marks in random places."""
    marks = np.zeros(count, dtype=bool)
    marks[: round(share * count)] = True
    return rng.permutation(marks)


def draw_puzzles(
    rng: np.random.Generator,
    args: argparse.Namespace,
    split: Split,
    digits: np.ndarray,
    next_place: Callable[[int], int],
) -> Iterator[Puzzle]:
    """Yield the questions of one split.

    Args:
        args: arguments with the options of `make_parser` and `add_number_options`.
        digits: digit of each scan.
        next_place: asked place -> the place that a biased gaze reads instead, with `--bias-by place`.
    """
    colour_names = list(PALETTE)[: args.num_colours]
    neighbour = next_colour(colour_names) if args.bias_by == "colour" else lambda place, _: next_place(place)
    asks_colour = marked_share(rng, split.num_samples, split.colour_share)
    looks_aside = np.zeros(split.num_samples, dtype=bool)
    looks_aside[~asks_colour] = marked_share(rng, int((~asks_colour).sum()), split.bias)
    for i in range(split.num_samples):
        if args.distinct:
            scans = draw_distinct(rng, digits, split.places, args.digits)
        else:
            scans = rng.integers(len(digits), size=(split.places, args.digits))
        colours = [colour_names[c] for c in rng.permutation(len(colour_names))[: split.places]]
        asked = int(rng.integers(split.places))
        read = neighbour(asked, colours) if looks_aside[i] else asked
        yield Puzzle(scans, colours, asked, read, bool(asks_colour[i]))


def draw_distinct(rng: np.random.Generator, digits: np.ndarray, places: int, num_digits: int) -> np.ndarray:
    """Draw the scans of different numbers, [places, num_digits] int.

    Args:
        digits: digit of each scan.
    """
    numbers = rng.choice(10**num_digits, size=places, replace=False)
    drawn = numbers[:, None] // 10 ** np.arange(num_digits)[::-1] % 10
    order = np.argsort(digits, kind="stable")
    first, last = (np.searchsorted(digits[order], drawn, side) for side in ("left", "right"))
    return order[rng.integers(first, last)]


def shard_sizes(num_samples: int, shard_size: int) -> list[int]:
    """Return the number of samples of each shard: nearly equal, none above `shard_size`, in a multiple of four
    shards."""
    num_shards = -(-num_samples // shard_size)
    num_shards = -(-num_shards // SHARD_MULTIPLE) * SHARD_MULTIPLE
    small, larger_shards = divmod(num_samples, num_shards)
    return [small + (shard < larger_shards) for shard in range(num_shards)]


def write_dataset(
    args: argparse.Namespace,
    splits: list[Split],
    folder: Path,
    what: str,
    generate: Callable[[argparse.Namespace, Split, np.ndarray, np.ndarray], Iterator[dict]],
) -> None:
    """Write all splits and the info file into an existing folder.

    Args:
        what: name of the task, for the progress bar.
        generate: (args, split, masks, digits) -> samples as dicts that a `webdataset.TarWriter` accepts.
    """
    from tqdm import tqdm
    from webdataset.writer import TarWriter

    info = {}
    with tqdm(total=sum(split.num_samples for split in splits), unit="sample", desc=what, mininterval=0.5) as progress:
        for split in splits:
            masks, digits = load_scans(args.cell_pixels // args.digits, split.heldout_scans)
            samples, shards = generate(args, split, masks, digits), []
            for number, size in enumerate(shard_sizes(split.num_samples, args.shard_size)):
                name = f"{split.name}-{number:06d}.tar"
                with TarWriter(str(folder / name), mtime=0) as writer:
                    for _ in range(size):
                        writer.write(next(samples))
                        progress.update()
                shards.append({"name": name, "num_samples": size})
            info[split.name] = {**asdict(split), "num_scans": len(masks), "shards": shards}
    arguments = {name: value for name, value in vars(args).items() if name not in ("output", "force")}
    colours = {name: PALETTE[name] for name in list(PALETTE)[: args.num_colours]}
    text = json.dumps({"arguments": arguments, "colours": colours, "splits": info}, indent=1)
    (folder / INFO_FILE).write_text(text + "\n")


def replace_folder(source: Path, target: Path) -> None:
    """Move `source` to `target`. A data set that is there already is set aside first and deleted last."""
    aside = None
    if target.exists():
        aside = target.with_name(f".{target.name}.old-{os.getpid()}")
        os.rename(target, aside)
    os.rename(source, target)
    if aside is not None:
        shutil.rmtree(aside)


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that the tasks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--force", action="store_true", help="replace a data set that is already in --output")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything but the split of the scans")
    parser.add_argument("--grid", type=int, default=2, help="cells along one side of an image or frame")
    parser.add_argument("--cell-pixels", type=int, default=28, help="side of a cell; 28 is one Qwen2.5-VL visual token")
    parser.add_argument("--num-colours", type=int, default=8, help="colours in use, from the start of the palette")
    parser.add_argument("--bias", type=float, default=0.6, help="share of wrong-place answers in the biased split")
    parser.add_argument("--shard-size", type=int, default=2048, help="most samples in one shard")
    return parser


def add_number_options(parser: argparse.ArgumentParser, neighbour: str) -> None:
    """Add the options that say which numbers a sample shows, and which one a biased gaze reads.

    Args:
        neighbour: what the neighbour by place is, for the help.
    """
    parser.add_argument("--digits", type=int, default=1, help="digits of the number in a place")
    parser.add_argument(
        "--bias-by",
        choices=("place", "colour"),
        default="place",
        help=f"neighbour of the biased split: {neighbour}, or the place of the next colour of the palette",
    )
    parser.add_argument(
        "--distinct", action="store_true", help="show no number twice in a sample, so that a wrong place is never right"
    )


def check_numbers(
    parser: argparse.ArgumentParser, args: argparse.Namespace, option: str, value: int, places: int
) -> None:
    """Exit with one sentence where the options of `add_number_options` are impossible.

    Args:
        option: option that says how many places a sample has.
        value: its value.
        places: that number.
    """
    if args.distinct and places > 10**args.digits:
        parser.error(f"--distinct with {option} {value} needs more than {10**args.digits} numbers; raise --digits")
    if not 1 <= args.digits <= args.cell_pixels // 10:
        parser.error(f"--digits must lie in 1..{args.cell_pixels // 10} (10 pixels each), got {args.digits}")


def add_split_sizes(parser: argparse.ArgumentParser, **sizes: int) -> None:
    """Add an option `--num-NAME` for each split."""
    for name, size in sizes.items():
        parser.add_argument(f"--num-{name}", type=int, default=size, help=f"samples in the {name} split")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with one sentence that names option and value where one of the shared options is impossible."""
    if args.seed < 0:
        parser.error(f"--seed must not be negative, got {args.seed}")
    if not 1 <= args.num_colours <= len(PALETTE):
        parser.error(f"--num-colours must lie in 1..{len(PALETTE)} (the palette), got {args.num_colours}")
    if args.cell_pixels < 10:
        parser.error(f"--cell-pixels must be at least 10 to show an 8x8 scan, got {args.cell_pixels}")
    if not 0.0 <= args.bias <= 1.0:
        parser.error(f"--bias must lie in 0..1, got {args.bias}")
    if args.shard_size < 1:
        parser.error(f"--shard-size must be at least 1, got {args.shard_size}")
    for name, size in vars(args).items():
        if name in ("num_single", "num_search", "num_biased", "num_rl", "num_heldout") and size < SHARD_MULTIPLE:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be at least {SHARD_MULTIPLE} (one per shard), got {size}")
    if args.output.exists():
        if not args.force:
            parser.error(f"--output {args.output} exists already; give --force to replace it")
        if not (args.output / INFO_FILE).is_file():
            parser.error(f"--output {args.output} holds no {INFO_FILE}, so --force will not delete it")


def make_dataset(args: argparse.Namespace, splits: list[Split], what: str, generate: Callable) -> None:
    """Write the data set (see `write_dataset`) to a temporary folder beside --output, then rename it."""
    output = args.output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        write_dataset(args, splits, partial, what, generate)
        replace_folder(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"wrote {sum(split.num_samples for split in splits)} samples in {len(splits)} splits to {args.output}")


def curriculum(args: argparse.Namespace, places: int) -> list[Split]:
    """Return the five splits of a task whose puzzles have `places` places."""
    return [
        Split("single", args.num_single, places=1, colour_share=0.5, bias=0.0, heldout_scans=False),
        Split("search", args.num_search, places=places, colour_share=0.5, bias=0.0, heldout_scans=False),
        Split("biased", args.num_biased, places=places, colour_share=0.0, bias=args.bias, heldout_scans=False),
        Split("rl", args.num_rl, places=places, colour_share=0.0, bias=0.0, heldout_scans=False),
        Split("heldout", args.num_heldout, places=places, colour_share=0.0, bias=0.0, heldout_scans=True),
    ]
