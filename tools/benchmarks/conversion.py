"""Conversion of a checkpoint with all tensors of a 72B: peak memory against the largest tensors, seconds against `cp`.

    python -m tools.benchmarks.conversion [--scale 16] [--folder DIR]

A random checkpoint with every tensor of Qwen2.5-VL-72B (80 layers, 64 / 8 heads), whose widths are divided by --scale,
is converted by `to-megatron` (TP=8, PP=4) and `to-hf` in processes of their own. The memory of a process before it
opens the checkpoint is subtracted from its peak (Linux). The last lines are `ratio conversion_memory` (peak over the
two largest tensors) and `ratio conversion_seconds` (to-megatron over cp of the same bytes).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


def write_checkpoint(folder: Path, scale: int) -> tuple[int, list[int]]:
    """Write random bfloat16 weights; returns all bytes and the bytes of each tensor, largest first."""
    import torch

    from megatron_ral.models.parameter_shapes import expected_shapes
    from megatron_ral.models.shape import read_shape
    from megatron_ral.weights.safetensors_files import SafetensorsWriter

    config = json.loads((PROJECT / "pretrained_configs/models/qwen2.5-vl-72b/config.json").read_text())
    text = config["text_config"]
    for key in ("hidden_size", "intermediate_size", "vocab_size"):
        text[key] = text[key] // scale // 64 * 64
    text["head_dim"] = 128 // scale
    text["rope_parameters"]["mrope_section"] = [16 // scale, 24 // scale, 64 // scale - 16 // scale - 24 // scale]
    config["vision_config"].update(
        out_hidden_size=text["hidden_size"],
        hidden_size=1280 // scale * 4 // 64 * 64,
        intermediate_size=3456 // scale // 4 * 4,
        num_heads=16,
    )
    (folder / "config.json").write_text(json.dumps(config))
    shapes = expected_shapes(read_shape(str(folder)))
    writer = SafetensorsWriter(folder / "model.safetensors", [(n, torch.bfloat16, s) for n, s in shapes.items()])
    sizes = [writer.add(name, torch.randn(shape).bfloat16()) for name, shape in shapes.items()]
    writer.close()
    return sum(sizes), sorted(sizes, reverse=True)


def child(command: str, source: str, output: str) -> None:
    """Convert in this process and print seconds, bytes and the growth of its peak memory."""
    from megatron_ral.models.parameter_shapes import visual_shapes
    from megatron_ral.models.shape import read_shape
    from megatron_ral.weights import conversion

    visual_shapes(read_shape(str(source)))  # imported and built before memory is noted
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (ru_maxrss would include the parent's)
    before = memory("VmRSS")
    if command == "to-megatron":
        done = conversion.to_megatron(source, output, 8, 4)
    else:
        done = conversion.to_hf(source, output)
    print(json.dumps({"seconds": done.seconds, "bytes": done.num_bytes, "peak": memory("VmHWM") - before}))


def memory(field: str) -> int:
    """Return the bytes of one line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def run_child(*arguments: object) -> dict:
    """Convert in a process of its own, and return its seconds, bytes and peak memory."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": str(PROJECT)}
    output = subprocess.run(
        [sys.executable, __file__, "--child", *map(str, arguments)],
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    ).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    """Write the checkpoint, convert it and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=4, help="divisor of the widths (1: the real 72B)")
    parser.add_argument("--folder", help="folder to work in (default: a temporary one)")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    root = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        (root / "hf").mkdir()
        total, sizes = write_checkpoint(root / "hf", arguments.scale)
        print(
            f"checkpoint with the key set of 72B, widths / {arguments.scale}: {len(sizes)} tensors, {total:,} bytes, "
            f"largest {sizes[0]:,}"
        )
        started = time.perf_counter()
        shutil.copyfile(root / "hf" / "model.safetensors", root / "copy")
        os.sync()
        copied = time.perf_counter() - started
        print(f"cp: {total:,} bytes in {copied:.2f} s, {total / copied / 1e9:.3f} GB/s")
        rows = {
            "to-megatron": run_child("to-megatron", root / "hf", root / "megatron"),
            "to-hf": run_child("to-hf", root / "megatron", root / "back"),
        }
        for name, row in rows.items():
            print(
                f"{name}: {row['bytes']:,} bytes in {row['seconds']:.2f} s, {row['bytes'] / row['seconds'] / 1e9:.3f} "
                f"GB/s, peak memory +{row['peak']:,} bytes"
            )
        peak = max(row["peak"] for row in rows.values())
        print(f"ratio conversion_memory {peak / (sizes[0] + sizes[1]):.2f}")
        print(f"ratio conversion_seconds {rows['to-megatron']['seconds'] / copied:.2f}")
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
