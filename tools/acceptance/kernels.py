"""Kernels of the attention term against float64, and their time against the least time of their products and SDPA.

On a GPU they are the Triton kernels. On the CPU PyTorch in float32 stands in their place.
"""

from functools import partial
from typing import Iterator, Optional

import torch
from torch import Tensor

from megatron_ral.attention.backend import RowBackend
from megatron_ral.attention.distribution import attention_distribution
from megatron_ral.attention.formulas import choose_formulas
from megatron_ral.attention.rows import choose_backend, head_mean_attention, row_divergence
from megatron_ral.attention.torch_backend import TorchBackend
from megatron_ral.attention.types import RowKeys, RowQK
from megatron_ral.training.logging.throughput import known_peak_tflops
from tools.acceptance.part import Figure, Setting, at_most, expect, note, relative_error, seconds_of, start

BOUNDS = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
"""Largest |error| / |value| of a gradient by the type of queries and keys. Rows and values are float32 in any case."""
ROWS_BOUND = 1e-5
TIMED = (4096, 512), (8192, 1024), (16384, 2048)
"""Sequence lengths, and response rows in them."""
FLOOR_TIMES = 12.0
"""Least times of the products that a term may take: its products are float32 sums of tiles that are read five times."""


def make_case(
    device: torch.device, dtype: torch.dtype, width: int, lag: int = 0, R: int = 150, P: int = 300
) -> tuple[RowQK, RowKeys, Tensor]:
    """Return rows with grouped heads, a padded prompt and several tiles, and the queries of another model."""
    B, G, k, n = 2, 2, 2, 14
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    lengths = torch.tensor([P, P * 2 // 5], device=device)
    qk = RowQK(make(B, G, R, n, width), make(B, P, k, width), make(B, G, R, k, width), lengths, lag, width**-0.5, n)
    own = torch.arange(R, device=device).expand(B, R) + P - lag
    own = torch.where(own < P, lengths[:, None] - 1, own)
    keys = RowKeys(torch.ones(B, P + R, dtype=torch.bool, device=device), own)
    return qk, keys, make(B, G, R, n, width)


def target_of(qk: RowQK, keys: RowKeys, other: Tensor) -> Tensor:
    """Return the attention distributions of other queries over the same keys, by PyTorch."""
    return attention_distribution(head_mean_attention(qk._replace(query_BGRnD=other), TorchBackend()), keys)[0]


def everything(qk: RowQK, keys: RowKeys, target: Tensor, backend: Optional[RowBackend]) -> tuple[Tensor, ...]:
    """Return rows, divergences from a target, and the gradients of queries and both parts of keys."""
    attention = head_mean_attention(qk, backend)
    value = row_divergence(qk, attention, target, keys, backend=backend)
    weights = torch.linspace(-1, 1, value.numel(), device=value.device, dtype=torch.float64).view_as(value)
    return attention, value.detach(), *torch.autograd.grad((value * weights).sum(), qk[:3])


def errors(device: torch.device, dtype: torch.dtype, width: int, lag: int, backend: RowBackend) -> tuple[float, float]:
    """Return the largest relative errors against float64: of rows and divergences, and of the gradients."""
    qk, keys, other = make_case(device, dtype, width, lag)
    wide = qk._replace(**{name: getattr(qk, name).detach().double().requires_grad_() for name in RowQK._fields[:3]})
    target = target_of(wide, keys, other.double())
    wanted = everything(wide, keys, target, TorchBackend())
    found = everything(qk, keys, target.float(), backend)
    parts = [relative_error(one, true) for one, true in zip(found, wanted)]
    return max(parts[:2]), max(parts[2:])


def run(setting: Setting) -> Iterator[Figure]:
    """Yield errors and times in the type of a run, then errors in float32 and at an odd width.

    Compiling takes most of the time on a GPU, so that other types are left to tests/gpu.
    """
    if not setting.on_gpu:
        yield from accuracy(torch.device("cpu"), torch.float32, 64)
        yield from times(setting)
        return
    start()  # SDPA without cuDNN
    device = torch.device("cuda", 0)
    yield from accuracy(device, torch.bfloat16, 128)
    yield from times(setting)
    yield from accuracy(device, torch.float32, 80)


def accuracy(device: torch.device, dtype: torch.dtype, width: int) -> Iterator[Figure]:
    """Yield the backend that is chosen, and its errors with rows at both positions."""
    name = f"{str(dtype).removeprefix('torch.')} {width}"
    backend, description = choose_backend(device, dtype, width)
    yield expect(f"{name}: rows by", description, device.type == "cpu" or "PyTorch" not in description, "Triton")
    formulas = type(choose_formulas(torch.empty(1, 1, 1, 1, device=device))).__name__
    yield expect(f"{name}: formulas by", formulas, device.type == "cpu" or formulas == "TritonFormulas", "Triton")
    for lag in (0, 1):
        rows, gradients = errors(device, dtype, width, lag, backend)
        yield at_most(f"{name}, lag {lag}: error of rows", rows, ROWS_BOUND)
        yield at_most(f"{name}, lag {lag}: error of gradients", gradients, BOUNDS[dtype])


def times(setting: Setting) -> Iterator[Figure]:
    """Yield the time of the term at the last layer of Qwen2.5-VL-7B against SDPA of that layer and its products."""
    from tools.benchmarks.attention_term import HEADS, KEY_HEADS, WIDTH, make_layer, sdpa, term

    peak = known_peak_tflops(torch.cuda.get_device_name(), "bfloat16") if setting.on_gpu else 0.0
    for S, R in TIMED if setting.on_gpu else ((256, 64),):
        layer = make_layer(S, R, KEY_HEADS, setting.device)
        qk = layer.rows()
        ours, whole = seconds_of(partial(term, qk, layer), setting), seconds_of(partial(sdpa, layer), setting)
        size = f"{S} tokens, {R} rows"
        yield note(f"{size}: SDPA", round(whole * 1e3, 3), "ms")
        if not setting.on_gpu:
            yield note(f"{size}: term", round(ours * 1e3, 3), "ms")
            continue
        yield at_most(f"{size}: term / SDPA", round(ours / whole, 3), 1.0)
        if peak:
            floor = 7 * 2 * HEADS * WIDTH * R * (S - R / 2) / (peak * 1e12)
            yield note(f"{size}: term", round(ours * 1e3, 3), "ms", f"floor {floor * 1e3:.3f} ms")
            yield at_most(f"{size}: term / floor", round(ours / floor, 2), FLOOR_TIMES)
