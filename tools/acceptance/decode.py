"""Tokens per second of decoding, started kernel by kernel and from a recorded CUDA graph, against the bandwidth.

The model has the widths and the layers of Qwen2.5-VL-7B on a GPU, with random weights. No token ends a response. The
seconds of a token are those of a long generation minus those of a short one. Both ways must draw the same tokens.
"""

import time
from contextlib import contextmanager
from typing import Iterator

import torch
from torch import Tensor

from tools.acceptance.model import config_of, random_groups, random_weights
from tools.acceptance.part import Figure, Setting, at_least, expect, note, seconds_of, start

LEAST_GAIN, LEAST_SHARE = 1.5, 0.3
"""Limits: speed of the graph over kernel by kernel, and the share of the copy bandwidth that it reaches."""


@contextmanager
def recording(is_on: bool) -> Iterator[list[int]]:
    """Let decoding record graphs, or not. On the CPU the recorded operators are run again.

    Yields:
        Numbers of graphs that were recorded, one entry each.
    """
    from megatron_ral.engine import decoding_batch

    plain, can_record, made = decoding_batch.Recorded, decoding_batch.can_record, []
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        kind = plain
    else:
        from tests.distributed.recorded_operations import RecordedOperations as kind

    def record(work):
        made.append(1)
        return kind(work)

    decoding_batch.Recorded, decoding_batch.can_record = record, lambda device: is_on
    try:
        yield made
    finally:
        decoding_batch.Recorded, decoding_batch.can_record = plain, can_record


def copy_bandwidth(setting: Setting) -> float:
    """Return the bytes per second of a copy in the device's memory, read and written bytes counted."""
    source = torch.empty((4 << 30) if setting.on_gpu else (64 << 20), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source), setting)


def step_bytes(engine, groups, length: float) -> int:
    """Return the bytes that a step must read: parameters but the embeddings and the vision tower, and the KV cache."""
    shape, B = engine.shape, len(groups)
    _, G, _ = groups.response_ids.shape
    itemsize = engine.stage.dtype.itemsize
    read = sum(
        parameter.ds_numel
        for name, parameter in engine.stage.named_parameters()
        if not name.startswith("visual.") and "word_embeddings" not in name
    )
    per_token = 2 * shape.num_layers * shape.num_query_groups * shape.kv_channels
    P = groups.prompts.input_ids.shape[1]
    return int(itemsize * (read + per_token * B * (P + G * length)))


def run(setting: Setting) -> Iterator[Figure]:
    """Yield the seconds of a token both ways, whether the tokens agree, and the share of the bandwidth."""
    from megatron_ral.engine.decoding_batch import SamplingSettings
    from megatron_ral.engine.frozen import FrozenEngine
    from megatron_ral.engine.pipelined_decoder import generate
    from megatron_ral.engine.settings import EngineSettings
    from megatron_ral.models.shape import read_shape
    from megatron_ral.planning.launch_plan import LaunchPlan

    layers, prompts, short, long = (28, 8, 8, 200) if setting.on_gpu else (2, 2, 3, 8)
    lengths = ["data.max_prompt_length=2560", "rollout.max_response_length=256"] if setting.on_gpu else []
    config = config_of(setting, layers, *lengths)
    process_groups, shape = start(), read_shape(config.model.path)
    work = LaunchPlan.from_config(config, 1).work
    with random_weights():
        engine = FrozenEngine(shape, process_groups, EngineSettings.from_config(config))
    groups = random_groups(engine, work, prompts)

    def answer(length: int) -> tuple[Tensor, float]:
        settings = SamplingSettings(work.group_size, length, -1, 0)
        begin = time.perf_counter()
        found = generate(engine, groups.prompts, groups.visual_embeds, settings, "acceptance")
        return found.response_ids, time.perf_counter() - begin  # the tokens are in host memory: the device is done

    rows, tokens, per_step = prompts * work.group_size, {}, {}
    with engine.resident():
        for name, is_on in (("kernel by kernel", False), ("graph", True)):
            with recording(is_on) as made:
                answer(short)
                first = answer(short)[1]
                tokens[name], whole = answer(long)
            per_step[name] = max((whole - first) / (long - short), 1e-9)
            yield note(f"{name}: step", round(per_step[name] * 1e3, 3), "ms")
            yield note(f"{name}: tokens per second", round(rows / per_step[name], 1), "1/s")
            if is_on:
                yield expect("graphs recorded", len(made), len(made) > 0, "> 0")
        read = step_bytes(engine, groups, long / 2)
    equal = float((tokens["graph"] == tokens["kernel by kernel"]).float().mean())
    yield expect("equal tokens", equal, equal == 1.0, "1.0")
    yield note("rows, prompt tokens, layers", f"{rows}, {work.prompt_length}, {layers}")
    yield note("a step reads", round(read / 1e9, 3), "GB")
    bandwidth = copy_bandwidth(setting)
    share = read / per_step["graph"] / bandwidth
    yield note("copy bandwidth", round(bandwidth / 1e9, 1), "GB/s")
    if setting.on_gpu:
        yield at_least(
            "graph: speed over kernel by kernel", round(per_step["kernel by kernel"] / per_step["graph"], 2), LEAST_GAIN
        )
        yield at_least("graph: share of the copy bandwidth", round(share, 3), LEAST_SHARE)
    else:
        yield note("graph: share of the copy bandwidth", round(share, 3))
