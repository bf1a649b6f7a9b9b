"""Rate of the loader against bare PIL on the same pictures and threads, and its memory over many epochs.

    python -m tools.benchmarks.loader [--num-samples 128] [--size 448x336] [--threads 2] [--epochs 20] [--folder DIR]

JPEG shards, their index and a tiny checkpoint are made first. Three rates are measured in one process:

    bare PIL     encoded bytes in memory -> RGB pixels, in a pool of --threads threads
    processor    encoded bytes in memory -> prompt (decode, resize, patches, tokens), one after the other
    loader       shards on disk -> batches of prompts in shuffled order, decoding in --threads threads

The loader's rate includes the work on a prompt besides decoding. `loader / processor` is the time that the loader
itself adds or saves. Resident memory (RSS) is printed after every epoch. The last line is `ratio loader VALUE`, the
loader's rate over bare PIL's.
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
from pathlib import Path

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


def seconds_of(work) -> float:
    """Return the wall seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(folder: Path, args: argparse.Namespace) -> float:
    """Print rates and memory; returns the loader's rate over bare PIL's."""
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

    def decode(sample):
        return Image.open(io.BytesIO(sample.images[0])).convert("RGB").size

    def bare():
        with ThreadPoolExecutor(args.threads) as pool:
            assert len(list(pool.map(decode, samples))) == len(samples)

    def epoch():
        for _ in range(batches):
            assert len(loader.take(batch)) == batch

    prompt = processor(samples[0])
    bare(), epoch()  # once without measuring
    rounds = [
        (
            seconds_of(bare) / len(samples),
            seconds_of(lambda: [processor(sample) for sample in samples]) / len(samples),
            seconds_of(epoch) / (batches * batch),
        )
        for _ in range(args.rounds)
    ]
    pil, alone, whole = (
        sorted(values)[len(values) // 2] for values in zip(*rounds)
    )  # interleaved, so that noise affects all
    held = []
    for _ in range(args.epochs):
        epoch()
        held.append(psutil.Process().memory_info().rss / 2**20)
    print(
        f"{len(samples)} samples of {args.size} pixels, {int(prompt.visual_mask.sum())} visual tokens, "
        f"batches of {batch}, {args.threads} threads, {batches * batch / len(samples):.0%} of an epoch per round"
    )
    print(
        f"bare PIL   {1 / pil:8.1f} samples/s\nprocessor  {1 / alone:8.1f} samples/s\n"
        f"loader     {1 / whole:8.1f} samples/s"
    )
    print("RSS in MiB after each epoch: " + " ".join(f"{value:.0f}" for value in held))
    print(f"RSS of the last epoch minus that of the fifth: {held[-1] - held[min(4, len(held) - 1)]:+.1f} MiB")
    print(f"loader / processor {alone / whole:.3f}")
    return pil / whole


def main() -> None:
    """Make the inputs, measure and print the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--num-samples", type=int, default=128, help="pictures")
    parser.add_argument("--size", default="448x336", help="width x height in pixels")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts taken at a time")
    parser.add_argument("--threads", type=int, default=2, help="threads of bare PIL and of the loader")
    parser.add_argument("--rounds", type=int, default=3, help="measurements; the median counts")
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
        ratio = measure(folder, args)
    print(f"ratio loader {ratio:.3f}")


if __name__ == "__main__":
    main()
