"""Attention of responses in two fused calls that are joined (`attention/shared_prompt.py`) against float64.

On a GPU the kernel is torch's flash attention in bfloat16, which no CPU can run. On the CPU it is the CPU's.
"""

from typing import Iterator

import torch
from torch import Tensor

from megatron_ral.attention.group_layout import GroupLayout, PackedGroups
from megatron_ral.attention.shared_prompt import (
    CpuKernel,
    FlashKernel,
    GroupTensors,
    kernel_for,
    shared_prompt_attention,
)
from megatron_ral.types import to_device
from tools.acceptance.part import Figure, Setting, at_most, expect, note, relative_error, seconds_of, start

NAMES = ("output", "dQ", "dK of prompts", "dV of prompts", "dK of responses", "dV of responses")


def make_group(
    device: str, dtype: torch.dtype, sizes: tuple[int, ...], padding: int
) -> tuple[GroupTensors, GroupLayout]:
    """Return random inputs of two prompts, the second of them padded.

    Args:
        device: cuda or cpu.
        dtype: type of all tensors.
        sizes: G, P, R, query heads, key heads, width.
        padding: Padding tokens of the second prompt.
    """
    G, P, R, n, k, D = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = (2 * G * R, n, D), (2, P, k, D), (2, P, k, D), (2, G, R, k, D), (2, G, R, k, D)
    tensors = (torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes)
    lengths = torch.tensor([P, P - padding]), torch.full((2, G), R), P, R
    return GroupTensors(*tensors), to_device(GroupLayout(*lengths, PackedGroups.of(*lengths)), torch.device(device))


def dense(group: GroupTensors, layout: GroupLayout, scale: float) -> Tensor:
    """Return the same attention from its whole score matrix, in the type of the inputs."""
    packed, keys_and_values = group.query_NnD, group[1:]
    query = packed.view(*layout.response_lengths.shape, layout.R, *packed.shape[1:])
    repeats = query.shape[3] // group.prompt_key_BPkD.shape[2]
    prompt_key, prompt_value, own_key, own_value = (
        tensor.repeat_interleave(repeats, dim=-2) for tensor in keys_and_values
    )
    prompt = torch.einsum("bgrnd,bpnd->bgnrp", query, prompt_key)
    own = torch.einsum("bgrnd,bgtnd->bgnrt", query, own_key)
    scores = torch.cat([prompt, own], dim=-1) * scale
    weights = scores.masked_fill(~layout.visible_BGRS[:, :, None], float("-inf")).softmax(dim=-1)
    of_prompt, of_own = weights.split([layout.P, layout.R], dim=-1)
    output = torch.einsum("bgnrp,bpnd->bgrnd", of_prompt, prompt_value)
    return (output + torch.einsum("bgnrt,bgtnd->bgrnd", of_own, own_value)).flatten(0, 2)


def errors(device: str, dtype: torch.dtype, sizes: tuple[int, ...], padding: int) -> dict[str, float]:
    """Return relative errors of the output and of all gradients against float64."""
    group, layout = make_group(device, dtype, sizes, padding)
    scale, kernel = sizes[-1] ** -0.5, FlashKernel() if device == "cuda" else CpuKernel()
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(group.query_NnD.shape, generator=generator).to(device, dtype)  # rounded for both
    wide = GroupTensors(*(tensor.detach().double().requires_grad_() for tensor in group))
    results = []
    for tensors, output in (
        (group, shared_prompt_attention(group, layout, scale, kernel)),
        (wide, dense(wide, layout, scale)),
    ):
        gradients = torch.autograd.grad((output * cotangent.to(output.dtype)).sum(), tensors)
        results.append((output.detach(), *gradients))
    return {name: relative_error(found, wanted) for name, found, wanted in zip(NAMES, *results)}


def run(setting: Setting) -> Iterator[Figure]:
    """Yield errors with and without padding, and times at the lengths of ral_7b."""
    if setting.on_gpu:
        start()
    device = setting.device
    dtype, bound = (torch.bfloat16, 2e-2) if setting.on_gpu else (torch.float32, 1e-5)
    usual, odd = ((8, 1500, 200, 28, 4, 128), (3, 701, 67, 6, 2, 80))
    if not setting.on_gpu:
        usual, odd = (3, 300, 20, 4, 2, 16), (2, 257, 7, 6, 2, 8)
    chosen = kernel_for(torch.empty(1, 1, 1, usual[-1], device=device, dtype=dtype), usual[1])
    wanted = FlashKernel if setting.on_gpu else CpuKernel
    yield expect("kernel", type(chosen).__name__, isinstance(chosen, wanted), wanted.__name__)
    for sizes, padding in ((usual, 0), (usual, 45), (odd, 0), (odd, 13)):
        text = "G {} P {} R {} heads {}/{} width {}".format(*sizes) + (f", padding {padding}" if padding else "")
        found = errors(device, dtype, sizes, padding)
        worst = max(found, key=lambda name: found[name])
        yield at_most(f"{text}: error of {worst}", found[worst], bound)
    if setting.on_gpu:
        yield from times(setting)


def times(setting: Setting) -> Iterator[Figure]:
    """Yield seconds of one layer's responses, forward and backward, and the share of the peak that they reach."""
    sizes = 8, 8192, 1024, 28, 4, 128
    group, layout = make_group(setting.device, torch.bfloat16, sizes, 0)
    kernel, scale = FlashKernel(), sizes[-1] ** -0.5
    cotangent = torch.ones_like(group.query_NnD)

    def work() -> None:
        torch.autograd.grad((shared_prompt_attention(group, layout, scale, kernel) * cotangent).sum(), group)

    seconds = seconds_of(work, setting)
    G, P, R, n, _, D = sizes
    flops = 7 * 2 * 2 * G * n * D * R * (P + R / 2)
    yield note("two prompts of ral_7b, one layer", round(seconds * 1e3, 2), "ms")
    yield note("their products", round(flops / seconds / 1e12, 1), "TFLOP/s", "about 300 to 500 for flash attention")
