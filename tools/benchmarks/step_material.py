"""Material of the benchmarks of a training step.

It holds models with the proportions of Qwen2.5-VL-7B, prompts of an exact length about pictures of noise, the settings
of the published runs, and a clock.

Every width of the 7B and its vocabulary are divided by one number (`scale`); the width of a head stays. The work of a
linear layer falls by the square of `scale`, in the layers as in the LM head, so that the head costs as much beside 28
layers as in the 7B. Attention and elementwise work fall by `scale` alone and therefore weigh `scale` times more than in
the 7B.
"""

import io
import json
import math
import os
import sys
import time
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Iterator, Sequence

PROJECT = Path(__file__).resolve().parents[2]
PUBLISHED = PROJECT / "pretrained_configs"
REAL = json.loads((PUBLISHED / "models/qwen2.5-vl-7b/config.json").read_text())["text_config"]
REAL_LAYERS = REAL["num_hidden_layers"]
SCALES = (1, 2, 4)
"""Divisors of the 7B's 28 heads and 4 key/value heads."""


def make_model(folder: Path, scale: int, num_layers: int, vocab_size: int, seed: int = 0) -> str:
    """Make a random Qwen2.5-VL with the 7B's widths / scale in Hugging Face format; returns its folder."""
    sizes = {
        "hidden-size": "hidden_size",
        "intermediate-size": "intermediate_size",
        "num-heads": "num_attention_heads",
        "num-kv-heads": "num_key_value_heads",
    }
    options = {name: REAL[key] // scale for name, key in sizes.items()}
    options |= {
        "num-layers": num_layers,
        "vocab-size": vocab_size,
        "rope-theta": 10000,
        "initializer-range": 0.02,
        "seed": seed,
        "output": folder,
    }
    from transformers.utils.logging import disable_progress_bar

    from tools import make_tiny_model

    disable_progress_bar()
    with redirect_stdout(io.StringIO()):
        make_tiny_model.main(["--untied", *(f"--{name}={value}" for name, value in options.items())])
    return str(folder)


def make_prompts(processor, count: int, length: int) -> list:
    """Return prompts of exactly `length` tokens about one picture of noise each, with as little text as possible.

    Raises:
        ConfigError: so few tokens have no room for a picture.
    """
    import numpy as np
    from PIL import Image

    from megatron_ral.errors import ConfigError
    from megatron_ral.types import Sample

    rng = np.random.default_rng(0)

    def prompt(number: int, columns: int, rows: int, more: int):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (28 * rows, 28 * columns, 3), dtype=np.uint8)).save(stream, "PNG")
        return processor(
            Sample(
                f"k{number}",
                "noise",
                "Which digit is red?" + "1" * more,
                "<answer>1</answer>",
                "",
                "",
                (stream.getvalue(),),
                (),
            )
        )

    room = length - (len(prompt(0, 1, 1, 0).input_ids) - 1)  # a digit is one token
    if room < 1:
        raise ConfigError("--prompt-length", length, f"has no room for a picture; take at least {length + 1 - room}")
    columns = math.isqrt(room)
    rows = room // columns
    prompts = [prompt(number, columns, rows, room - columns * rows) for number in range(count)]
    assert {len(item.input_ids) for item in prompts} == {length}
    return prompts


def make_scaled(folder: str | Path, scale: int, num_layers: int) -> str:
    """Make a random model with the 7B's widths / scale and its share of words where none is; returns its folder."""
    model = Path(folder) / "model"
    if not (model / "config.json").exists():
        make_model(model, scale, num_layers, REAL["vocab_size"] // scale * num_layers // REAL_LAYERS)
    return str(model)


def open_scaled(folder: str, scale: int, num_layers: int, process_groups):
    """Return policy and objective of `ral_7b` on a random model with the 7B's widths / scale and its share of words.

    Args:
        folder: Folder of the model, see `make_scaled`.
        scale: Divisor of the widths.
        num_layers: Layers. The vocabulary is reduced in their proportion.
        process_groups: Process groups of this process.
    """
    from megatron_ral.models.shape import read_shape
    from megatron_ral.training.build import build_objective, build_policy

    config = settings_of("ral_7b", make_scaled(folder, scale, num_layers), [])
    policy = build_policy(config, read_shape(config.model.path), process_groups)
    return policy, build_objective(config, policy.shape, process_groups)


def make_text_and_picture(length: int, number: int, text: int = 40):
    """Return a prompt of `length` tokens of which the last `text` are text, without pixels."""
    import torch

    from megatron_ral.types import Prompt, Sample

    ids = torch.arange(length) % 97 + 11 + number
    return Prompt(
        sample=Sample(f"k{number}", "drawn", "", "", "", "", (), ()),
        input_ids=ids,
        position_ids=torch.arange(length).expand(3, -1),
        next_position=length,
        patches=(),
        grid_thw=torch.zeros(0, 3, dtype=torch.int64),
        is_video=torch.zeros(0, dtype=torch.bool),
        seconds_per_grid=torch.zeros(0),
        visual_mask=torch.arange(length) < length - text,
        target_mask=torch.zeros(length, dtype=torch.bool),
        response_ids=ids[:0],
    )


def make_update(policy, prompts, responses, num_tokens: int = 0) -> list:
    """Return the micro-batches of one update on random responses, with visual embeddings in place of pictures.

    Args:
        policy: Trained engine.
        prompts: Tokens of each prompt, [X] int64.
        responses: Tokens of each response, [X, G] int64.
        num_tokens: Tokens of a micro-batch. 0: one group.
    """
    import torch

    from megatron_ral.rollout.assemble import global_totals
    from megatron_ral.rollout.lengths import MicroBatchSettings, cut_into_micro_batches
    from megatron_ral.types import GroupBatch, RlBatch, pad_prompts

    lengths = (prompts + responses.sum(dim=1)).tolist()
    totals = global_totals([responses], int(responses.max()), policy.process_groups)
    batches = []
    for part in cut_into_micro_batches(lengths, len(lengths), MicroBatchSettings(1, num_tokens), policy.process_groups):
        own = responses[part]
        size, chosen = (
            (*own.shape, int(own.max())),
            [make_text_and_picture(int(prompts[index]), index) for index in part],
        )
        embeds = (torch.randn(int(prompt.visual_mask.sum()), 1, policy.shape.hidden_size) for prompt in chosen)
        advantages = torch.linspace(-1, 1, size[1]).expand(own.shape).contiguous()
        batches.append(
            RlBatch(
                GroupBatch(pad_prompts(chosen, 0), torch.randint(11, 100, size), own, tuple(embeds)),
                totals,
                torch.ones(len(part), dtype=torch.bool),
                advantages,
                advantages,
                torch.zeros(size),
                torch.zeros(len(part), dtype=torch.bool),
                is_on_policy=True,
                compares_sampler=False,
            )
        )
    return batches


def settings_of(run: str, model: str, overrides: Sequence[str]):
    """Return the configuration of a published run on this model, in float32 and one process.

    The reference model, recomputed activations and tensor parallelism are off, because they are the same for all sides
    or need more ranks.
    """
    from megatron_ral.config import load_config

    return load_config(
        PUBLISHED / f"runs/{run}.yaml",
        [
            f"model.path={model}",
            "model.dtype=float32",
            "parallel.tensor_model_parallel_size=1",
            "parallel.sequence_parallel=false",
            "parallel.recompute_activations=false",
            "loss.kl_coef=0.0",
            "optimizer.warmup_steps=0",
            "train.micro_batch_size=1",
            "rollout.num_minibatches=1",
            *overrides,
        ],
    )


def open_processor(model: str):
    """Return a processor without an end token, so that all responses have the length of the limit."""
    from megatron_ral.data.processor import PromptProcessor

    processor = PromptProcessor(model, 1 << 14)
    processor.end_token_id = -1
    return processor


def with_advantages(rollout: Sequence) -> list:
    """Return the rollout with advantages from -1 to 1 in each group, because a random model's rewards are all equal."""
    import torch

    result = []
    for scored in rollout:
        advantages = torch.linspace(-1, 1, scored.advantages.shape[1]).expand_as(scored.advantages)
        result.append(replace(scored, advantages=advantages, attention_advantages=advantages))
    return result


STEADY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 33), "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}
"""Environment in which glibc does not return freed memory to the system. Otherwise a tenth to a third of the seconds
are page faults, and their number varies by chance."""


def start(threads: int):
    """Start the process groups of one process with so many threads. The process is restarted with `STEADY` memory."""
    steady = {**STEADY, "OMP_NUM_THREADS": str(threads)}
    if any(os.environ.get(name) != value for name, value in steady.items()):
        environment = {**os.environ, **steady, "PYTHONPATH": f"{PROJECT}:{os.environ.get('PYTHONPATH', '')}"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    import torch

    from megatron_ral.commands.common import import_libraries, quiet_third_parties

    torch.set_num_threads(threads)
    quiet_third_parties()
    import_libraries()
    from megatron_ral.parallel.process_groups import start_groups

    return start_groups(tensor_size=1, pipeline_size=1, seed=0)


def versions() -> str:
    """Return the versions of the packages in which the time is spent."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "megatron-core", "deepspeed"))


@dataclass
class Clock:
    """Stopwatch with one value for every measurement of a name."""

    seconds: dict[str, dict[str, list[float]]] = field(default_factory=lambda: {"cpu": {}, "wall": {}})
    """Seconds by clock (cpu, wall) and name."""

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure the code inside: processor seconds of all threads of this process, and wall seconds."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds["cpu"].setdefault(name, []).append(time.process_time() - cpu)
        self.seconds["wall"].setdefault(name, []).append(time.perf_counter() - wall)

    def clear(self) -> None:
        """Drop all measurements, because the first ones include taking memory and loading code."""
        self.seconds = {"cpu": {}, "wall": {}}

    def median(self, name: str, clock: str) -> float:
        """Return the median seconds of a name by a clock (cpu or wall)."""
        values = sorted(self.seconds[clock][name])
        middle = len(values) // 2
        return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2
