"""Convert checkpoints between Hugging Face folders and Megatron folders of any layout, and prove that they are equal.

    megatron-ral convert to-megatron --hf DIR --output DIR --tensor-parallel N --pipeline-parallel M
    megatron-ral convert to-hf       --megatron DIR --output DIR
    megatron-ral convert reshard     --megatron DIR --output DIR --tensor-parallel N --pipeline-parallel M
    megatron-ral convert from-run    --checkpoint OUTPUT_DIR/checkpoints/step_N --output DIR [--model DIR]
    megatron-ral convert verify      --hf DIR --megatron DIR [--skip-logits]

`from-run` writes the Hugging Face folder of any step of a training run, whatever its layout. Also
`python tools/convert_checkpoint.py`.

Tensors are read from safetensors one parameter at a time, so that memory stays near the size of the largest few. The
output appears under its name only when it is complete. Exit status: 0 done; 1 `verify` found a difference; 2 wrong
input.
"""

import argparse
import os
from pathlib import Path
from typing import Any, cast

from megatron_ral.commands.common import Arguments, command, quiet_third_parties
from megatron_ral.errors import CheckpointError


def parse_arguments(argv: Arguments) -> argparse.Namespace:
    """Parse the subcommand and its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, about, source, splits in (
        ("to-megatron", "write a Megatron folder of a layout from a Hugging Face folder", "--hf", True),
        ("to-hf", "write a Hugging Face folder from a Megatron folder", "--megatron", False),
        ("reshard", "write a Megatron folder in another layout", "--megatron", True),
        ("from-run", "write a Hugging Face folder from a checkpoint of a training run", "--checkpoint", False),
    ):
        options = subparsers.add_parser(name, help=about, description=about)
        options.add_argument(source, dest="source", required=True, metavar="DIR", help="folder to read")
        options.add_argument("--output", required=True, metavar="DIR", help="folder to write; must not exist")
        if splits:
            options.add_argument(
                "--tensor-parallel", type=int, required=True, metavar="N", help="tensor-parallel ranks to write for"
            )
            options.add_argument(
                "--pipeline-parallel", type=int, required=True, metavar="M", help="pipeline stages to write for"
            )
        else:
            options.add_argument(
                "--max-shard-bytes", type=int, default=5_000_000_000, help="largest output file (default: %(default)s)"
            )
        if name == "from-run":
            options.add_argument(
                "--model", default="", metavar="DIR", help="folder the run started from (default: its model.path)"
            )
            options.add_argument(
                "--adapter", action="store_true", help="write the adapters alone, as PEFT reads them, not merged"
            )
    about = "compare all weights, and the logits of stock transformers with ours"
    verify = subparsers.add_parser("verify", help=about, description=about)
    verify.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder")
    verify.add_argument("--megatron", required=True, metavar="DIR", help="Megatron folder")
    verify.add_argument("--skip-logits", action="store_true", help="compare weights only (a model larger than memory)")
    arguments = parser.parse_args(argv)
    for name in ("tensor_parallel", "pipeline_parallel", "max_shard_bytes"):
        if getattr(arguments, name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    return arguments


def convert(arguments: argparse.Namespace) -> int:
    """Write the folder that the subcommand asks for.

    Raises:
        CheckpointError: the source cannot be used.
        ConfigError: --output exists, or the layout does not fit the model.
    """
    from tqdm import tqdm

    from megatron_ral.models.folder import MANIFEST
    from megatron_ral.training.checkpoint.trained_weights import TrainedWeights
    from megatron_ral.weights import conversion

    if arguments.command in ("to-hf", "reshard") and not (Path(arguments.source) / MANIFEST).is_file():
        raise CheckpointError("--megatron", Path(arguments.source), f"is not a Megatron folder (no {MANIFEST})")
    with tqdm(unit="B", unit_scale=True, desc=arguments.command, mininterval=0.5) as bar:
        if arguments.command == "to-hf":
            done = conversion.to_hf(arguments.source, arguments.output, arguments.max_shard_bytes, bar.update)
        elif arguments.command == "from-run":
            weights = TrainedWeights(arguments.source, arguments.model)
            if arguments.adapter:
                weights.write_adapters(arguments.output)
                print(f"from-run: wrote the adapters to {arguments.output}")
                return 0
            done = conversion.to_hf(
                weights.source, arguments.output, arguments.max_shard_bytes, bar.update, weights, weights.format_tags
            )
        else:
            done = conversion.to_megatron(
                arguments.source, arguments.output, arguments.tensor_parallel, arguments.pipeline_parallel, bar.update
            )
    print(f"{arguments.command}: {done}; wrote {arguments.output}")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Print what differs between two folders; return 1 where anything does."""
    from megatron_ral.weights.conversion import differing_weights, open_weights

    differing = differing_weights(arguments.hf, arguments.megatron)
    print(f"weights: {len(open_weights(arguments.hf))} tensors, {len(differing)} differ")
    for name in differing[:20]:
        print(f"  differs: {name}")
    agree = True
    if not arguments.skip_logits:
        for kind, difference in logit_differences(arguments.hf, arguments.megatron).items():
            print(f"logits on {kind}: largest difference {difference:.3g}")
            agree = agree and difference <= 1e-4  # False for NaN
    return 1 if differing or not agree else 0


def logit_differences(hf: str, megatron: str) -> dict[str, float]:
    """Return the largest difference of logits between stock transformers on one folder and our stage on the other.

    Both run in float32, on text, one image, two images, a video, and an image with a video.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    from megatron_ral.attention.group_layout import GroupLayout
    from megatron_ral.data.processor import PromptProcessor
    from megatron_ral.models.attention_pass import AttentionPass
    from megatron_ral.models.folder import config_folder
    from megatron_ral.models.multimodal import MultimodalStage
    from megatron_ral.models.shape import read_shape
    from megatron_ral.parallel.process_groups import start_groups, stop_groups
    from megatron_ral.types import FramePictures, GroupBatch, Sample, pad_prompts, to_device
    from megatron_ral.weights.stage_weights import load_stage

    process_groups = start_groups(tensor_size=1, pipeline_size=1, seed=0)
    shape = read_shape(str(config_folder(megatron)))
    stage = MultimodalStage(shape, process_groups.layout, torch.float32, process_groups.device)
    load_stage(stage, megatron)
    stock = cast(Any, AutoModelForImageTextToText.from_pretrained(hf, dtype=torch.float32))
    stock = stock.to(process_groups.device).eval()
    processor = PromptProcessor(hf, 10_000)
    result = {}
    video = FramePictures(tuple(test_picture(84, 112, frame) for frame in range(6)), fps=1.0)
    inputs = {
        "text": ([], ()),
        "one image": ([(112, 84)], ()),
        "two images": ([(84, 56), (140, 112)], ()),
        "a video": ([], (video,)),
        "an image and a video": ([(112, 84)], (video,)),
    }
    for kind, (sizes, videos) in inputs.items():
        sample = Sample(
            key=kind,
            shard="verify",
            problem="What is the difference?",
            solution="<answer>none</answer>",
            process="",
            problem_type="",
            images=tuple(test_picture(*size) for size in sizes),
            target_boxes=(),
            videos=videos,
        )
        prompt = processor(sample)
        ids = prompt.response_ids[None, None]
        batch = GroupBatch(pad_prompts([prompt], 0), ids, torch.tensor([[ids.shape[-1]]]))
        layout = to_device(GroupLayout.of(batch), process_groups.device)
        batch = to_device(batch, process_groups.device)
        tokens = torch.cat([prompt.input_ids, prompt.response_ids])
        with torch.no_grad():
            ours = stage(batch, AttentionPass(layout))
            stock_inputs = to_device(processor.stock_inputs(prompt, tokens), process_groups.device)
            theirs = stock(**stock_inputs).logits[0, len(prompt.input_ids) - 1 : -1]
        result[kind] = float((ours - theirs).abs().max())
    stop_groups()
    return result


def test_picture(width: int, height: int, shift: int = 0) -> bytes:
    """Return a PNG of a colour ramp; `shift` gives another one."""
    import io

    import numpy as np
    from PIL import Image

    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(255, 0, height))
    ramp = np.stack([(across + 40 * shift) % 256, down, np.full_like(across, 99)])
    stream = io.BytesIO()
    Image.fromarray(ramp.transpose(1, 2, 0).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@command
def main(argv: Arguments = None) -> int:
    """Convert or verify; return 1 where `verify` found a difference."""
    arguments = parse_arguments(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    quiet_third_parties()
    return verify(arguments) if arguments.command == "verify" else convert(arguments)
