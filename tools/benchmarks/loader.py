"""Rate of the loader against its limit: decoding plus one resize per picture, by the same number of threads.

    python -m tools.benchmarks.loader [--num-samples 128] [--size 640x480] [--threads 2] [--epochs 20] [--folder DIR]

JPEG shards, their index and a tiny checkpoint are made first. Libraries that resize are compared on these pictures: the
limit takes the fastest of them whose bytes are those of the Hugging Face image processor. torchvision is among them
where it is installed. Then four rates are measured in one process:

    decoding     encoded bytes in memory -> RGB pixels (Pillow), in a pool of --threads threads
    limit        the same, and one resize to the size of the image processor
    processor    encoded bytes in memory -> prompt (decode, resize, patches, tokens), one after the other
    loader       shards on disk -> batches of prompts in shuffled order, decoding in --threads threads

A prompt of the loader has its picture as bytes; the vision tower looks up the normalised numbers. Their time is printed
as `numbers`, beside the rates, because another thread or a GPU spends it. Rates are samples per second of the clock,
times are processor milliseconds per sample over all threads. Resident memory (RSS) is printed after every epoch. The
last lines are `ratio loader_processor_time VALUE`, processor time of the limit over that of the loader, and `ratio
loader VALUE`, the loader's rate over the limit's.
"""

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Callable, Sequence

PROJECT = Path(__file__).resolve().parents[2]


def make_data(folder: Path, num_samples: int, width: int, height: int, num_shards: int = 4) -> None:
    """Write JPEG pictures of a smooth background with grain, about as compressible as photographs."""
    import json

    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:height, 0:width]
    text = json.dumps(
        {"problem": "Which digit is red?", "solution": "<answer>7</answer>", "data_type": "image"}
    ).encode()
    with contextlib.ExitStack() as stack:
        archives = [stack.enter_context(tarfile.open(folder / f"s-{shard}.tar", "w")) for shard in range(num_shards)]
        for number in range(num_samples):
            waves = [128 + 90 * np.sin(rows / rng.uniform(9, 60) + columns / rng.uniform(9, 60)) for _ in range(3)]
            pixels = (np.stack(waves, axis=2) + rng.normal(0, 12, (height, width, 1))).clip(0, 255).astype(np.uint8)
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "JPEG", quality=88)
            for suffix, data in (("jpg", stream.getvalue()), ("json", text)):
                info = tarfile.TarInfo(f"k{number:05d}.{suffix}")
                info.size = len(data)
                archives[number % num_shards].addfile(info, io.BytesIO(data))


def seconds_of(work) -> tuple[float, float]:
    """Return the wall seconds and the processor seconds (of all threads) of one call."""
    started, spent = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - spent


def resizers() -> dict[str, Callable]:
    """Return functions (picture, width, height) -> RGB picture or array, by the name of their library."""
    import numpy as np
    import torch
    from PIL import Image

    def as_tensor(picture):
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]

    def interpolate(picture, width, height):
        options = {"size": (height, width), "mode": "bicubic", "antialias": True}
        return torch.nn.functional.interpolate(as_tensor(picture), **options)[0].permute(1, 2, 0)

    found: dict[str, Callable] = {
        "Pillow": lambda picture, width, height: picture.resize((width, height), Image.Resampling.BICUBIC),
        "Pillow, reducing_gap=2": lambda picture, width, height: picture.resize(
            (width, height), Image.Resampling.BICUBIC, reducing_gap=2.0
        ),
        "torch.nn.functional.interpolate": interpolate,
    }
    with contextlib.suppress(ImportError, RuntimeError):  # a build for another torch fails in its own way
        import torchvision.transforms.v2.functional as transforms  # pyright: ignore[reportMissingImports]
        from torchvision.transforms import InterpolationMode  # pyright: ignore[reportMissingImports]

        found["torchvision.transforms.v2"] = lambda picture, width, height: transforms.resize(
            as_tensor(picture)[0], [height, width], InterpolationMode.BICUBIC, antialias=True
        ).permute(1, 2, 0)
    return found


def fastest_equal_resizer(pictures: Sequence, width: int, height: int, image_processor) -> Callable:
    """Print the time of every library and whether it equals the image processor; returns the fastest that does."""
    import numpy as np
    from transformers.image_processing_backends import PilBackend
    from transformers.image_utils import SizeDict

    equal: dict[float, Callable] = {}
    wanted = [
        PilBackend.resize(  # the resize itself, to a size that is given
            image_processor, np.array(picture).transpose(2, 0, 1), SizeDict(height=height, width=width), 3
        ).transpose(1, 2, 0)
        for picture in pictures
    ]

    def resize_all(resize):
        return [resize(picture, width, height) for picture in pictures]

    for name, resize in resizers().items():
        resized = [np.asarray(picture) for picture in resize_all(resize)]
        differing = float(np.mean([(ours != theirs).mean() for ours, theirs in zip(resized, wanted)]))
        spent = min(seconds_of(partial(resize_all, resize))[1] for _ in range(3)) / len(pictures)
        if not differing:
            equal[spent] = resize
        verdict = f"{differing:.1%} of bytes differ from the image processor" if differing else "equal bit for bit"
        print(f"resize     {1000 * spent:8.2f} ms  {name}: {verdict}")
    return equal[min(equal)]


def measure(folder: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Print rates and memory; returns the ratios of processor time and of rates."""
    import psutil
    import torch
    from PIL import Image

    from megatron_ral.commands.shards import index
    from megatron_ral.config.sections import DataConfig
    from megatron_ral.data.loader import PromptLoader, open_sources
    from megatron_ral.data.processor import PromptProcessor
    from megatron_ral.data.shards import parse_sample, shard_entries

    torch.set_num_threads(1)
    index([f"{folder}/*.tar", "--model", str(folder / "model")])
    processor = PromptProcessor(str(folder / "model"), 16384)
    [source] = open_sources([(f"{folder}/*.tar", 0)], "shards")
    samples = [parse_sample(entry) for entry in shard_entries(source.shards)]
    loader = PromptLoader([source], processor, DataConfig(decode_workers=args.threads), dp_rank=0, dp_size=1, seed=0)
    batch = min(args.batch_size, len(samples))
    batches = len(samples) // batch
    prompt = processor(samples[0])
    height, width = (prompt.grid_thw[0, 1:] * processor.rules.patch_size).tolist()

    def decoded(sample):
        picture = Image.open(io.BytesIO(sample.images[0]))
        picture.load()  # JPEG gives RGB, so that a conversion would only copy it
        assert picture.mode == "RGB"
        return picture

    pictures = [decoded(sample) for sample in samples[:16]]
    resize = fastest_equal_resizer(pictures, width, height, processor.image_processor)

    def in_threads(work):
        with ThreadPoolExecutor(args.threads) as pool:
            assert len(list(pool.map(work, samples))) == len(samples)

    def epoch():
        for _ in range(batches):
            assert len(loader.take(batch)) == batch

    sides = {
        "decoding": (lambda: in_threads(lambda sample: decoded(sample).size), len(samples)),
        "limit": (lambda: in_threads(lambda sample: resize(decoded(sample), width, height) is not None), len(samples)),
        "processor": (lambda: [processor(sample) for sample in samples], len(samples)),
        "loader": (epoch, batches * batch),
        "numbers": (lambda: [prompt.pixel_values for _ in samples], len(samples)),
    }
    for work, _ in sides.values():  # once without measuring
        work()
    # Interleaved, so that noise affects all sides.
    rounds = [{name: seconds_of(work) for name, (work, _) in sides.items()} for _ in range(args.rounds)]
    walls, spent = (
        {name: median(each[name][clock] for each in rounds) / count for name, (_, count) in sides.items()}
        for clock in (0, 1)
    )
    held = []
    for _ in range(args.epochs):
        epoch()
        held.append(psutil.Process().memory_info().rss / 2**20)
    print(
        f"{len(samples)} samples of {args.size} pixels, resized to {width}x{height}, {int(prompt.visual_mask.sum())} "
        f"visual tokens, batches of {batch}, {args.threads} threads"
    )
    for name in sides:
        print(f"{name:10} {1 / walls[name]:8.1f} samples/s {1000 * spent[name]:8.2f} ms of a processor")
    print("RSS in MiB after each epoch: " + " ".join(f"{value:.0f}" for value in held))
    print(f"RSS of the last epoch minus that of the fifth: {held[-1] - held[min(4, len(held) - 1)]:+.1f} MiB")
    return spent["limit"] / spent["loader"], walls["limit"] / walls["loader"]


def main() -> None:
    """Make the inputs, measure and print the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--num-samples", type=int, default=128, help="pictures")
    parser.add_argument("--size", default="640x480", help="width x height in pixels")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts taken at a time")
    parser.add_argument("--threads", type=int, default=2, help="threads of the limit and of the loader")
    parser.add_argument("--rounds", type=int, default=5, help="measurements; the median counts")
    parser.add_argument("--epochs", type=int, default=20, help="epochs over which memory is printed")
    parser.add_argument("--folder", type=Path, help="folder of the shards (default: a temporary one)")
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [sys.executable, str(PROJECT / "tools/make_tiny_model.py"), "--output", str(folder / "model")],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
        )
        make_data(folder, args.num_samples, width, height)
        by_time, by_rate = measure(folder, args)
    print(f"ratio loader_processor_time {by_time:.3f}\nratio loader {by_rate:.3f}")


if __name__ == "__main__":
    main()
