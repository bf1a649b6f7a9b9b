"""Time and memory of the attention term at the last layer of Qwen2.5-VL 7B, against eager attention with autograd.

    python -m tools.benchmarks.attention_term [--shapes 4096x512 8192x1024] [--repeats 3] [--clock cpu]
    python -m tools.benchmarks.attention_term --device cuda [--shapes 8192x1024 32768x4096] [--peak-tflops 989]

One sequence has S tokens, the last R of them the response, with 28 heads and 4 key/value heads of width 128, in float32
on CPU and bfloat16 on CUDA. The loss is the mean JSD between the head-averaged attention of the R rows (own token left
out) and a fixed target, plus the layer's output times a fixed cotangent. Forward and backward passes to q, k and v:

    eager layer   layer without this project: scores of all S x S per head, softmax in float32, output = weights @ v,
                  rows = mean over heads of the same weights, autograd through output and loss
    our layer     SDPA for the output, and the term from the recorded queries and keys
    SDPA          that output alone without a loss: the cost of the layer in any case
    term          our loss alone: `head_mean_attention` and `row_divergence`, to q (R rows) and k
    eager rows    the loss alone, by autograd through a softmax over heads x R x S

Repetitions of all cases are interleaved, and the least time counts. On a machine with other work, `--clock cpu`
(processor seconds of all threads) with OMP_NUM_THREADS=1 is the steadier measure. Memory is the peak above the inputs,
counted by the allocator in a pass of its own. It includes the gradients of the inputs, which are printed apart; `extra`
is without them. Where the eager layer needs more than `--eager-memory` GiB, it runs with fewer key/value heads and the
query heads that share them, and its time and memory are multiplied. Such lines are marked. On CUDA the time of the term
is also compared with the least time of its matrix products. The last line is `ratio attention_term VALUE`: time of the
term over that of the eager layer, the largest over the shapes.
"""

import argparse
import sys
import time
from typing import Callable, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_ral.attention.distribution import attention_distribution
from megatron_ral.attention.rows import head_mean_attention, row_divergence
from megatron_ral.attention.types import RowKeys, RowQK

HEADS, KEY_HEADS, WIDTH = 28, 4, 128
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MAPS = 5
"""Approximate number of maps of heads x S x S in float32 that the eager layer holds at its peak."""


class Layer(NamedTuple):
    """Inputs of one layer."""

    query: Tensor
    """Queries [1, n, S, D]."""
    key: Tensor
    """Keys [1, k, S, D]."""
    value: Tensor
    """Values [1, k, S, D]."""
    cotangent: Tensor
    """Cotangent of the output [1, n, S, D]."""
    R: int
    """Response tokens."""
    keys: RowKeys
    """Keys of the rows' distributions."""
    target: Tensor
    """Target distributions of the rows."""

    def rows(self) -> RowQK:
        """Return the record of an engine, as new leaves: queries of the response, keys of prompt and response."""
        P = self.key.shape[2] - self.R
        query, prompt, own = (
            tensor.detach().transpose(1, 2).clone().requires_grad_()
            for tensor in (self.query[:, :, P:], self.key[:, :, :P], self.key[:, :, P:])
        )
        return RowQK(
            query[:, None], prompt, own[:, None], torch.tensor([P], device=query.device), 0, WIDTH**-0.5, query.shape[2]
        )


def make_layer(S: int, R: int, key_heads: int, device: str) -> Layer:
    """Return random inputs. The target is the attention distribution of other queries."""
    generator = torch.Generator().manual_seed(0)
    dtype, heads = torch.float32 if device == "cpu" else torch.bfloat16, HEADS // KEY_HEADS * key_heads

    def make(n: int) -> Tensor:
        return torch.randn(1, n, S, WIDTH, generator=generator).to(device, dtype)

    query, key, value, cotangent, other = make(heads), make(key_heads), make(key_heads), make(heads), make(heads)
    keys = RowKeys(torch.ones(1, S, dtype=torch.bool, device=device), torch.arange(S - R, S, device=device)[None])
    layer = Layer(other, key, value, cotangent, R, keys, key)
    target = attention_distribution(head_mean_attention(layer.rows()), keys)[0]
    leaves = (tensor.requires_grad_() for tensor in (query, key, value))
    return Layer(*leaves, cotangent / S, R, keys, target)


def eager_jsd(rows: Tensor, layer: Layer) -> Tensor:
    """Return the mean JSD of head-averaged rows [R, S] in its plain form."""
    chosen = torch.arange(rows.shape[1], device=rows.device) != layer.keys.own_BR[0, :, None]
    distribution, target = rows * chosen, layer.target[0, 0]
    distribution = distribution / distribution.sum(dim=-1, keepdim=True)
    mean = (distribution + target) / 2
    terms = (row * (row.clamp(min=1e-30).log() - mean.clamp(min=1e-30).log()) for row in (distribution, target))
    return 0.5 * sum(term.sum(dim=-1) for term in terms).mean()


def eager_weights(layer: Layer, first_row: int) -> Tensor:
    """Return the softmax attention [n, S - first_row, S] of the rows from `first_row`."""
    query, S = layer.query[0, :, first_row:], layer.key.shape[2]
    key = layer.key[0].repeat_interleave(len(query) // layer.key.shape[1], dim=0)
    later = torch.arange(S, device=key.device) > torch.arange(first_row, S, device=key.device)[:, None]
    scores = (query @ key.mT * WIDTH**-0.5).masked_fill_(later, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32)


def eager_layer(layer: Layer) -> tuple[Tensor, ...]:
    """Return the gradients of q, k and v."""
    weights = eager_weights(layer, 0)
    value = layer.value[0].repeat_interleave(len(weights) // layer.value.shape[1], dim=0)
    output = weights.to(value.dtype) @ value
    loss = eager_jsd(weights[:, -layer.R :].mean(dim=0), layer)
    del weights
    return torch.autograd.grad((output * layer.cotangent[0]).sum() + loss, layer[:3])


def eager_rows(layer: Layer) -> tuple[Tensor, ...]:
    """Return the gradients of q and k from the loss alone."""
    first = layer.query.shape[2] - layer.R
    return torch.autograd.grad(eager_jsd(eager_weights(layer, first).mean(dim=0), layer), layer[:2])


def sdpa(layer: Layer) -> tuple[Tensor, ...]:
    """Return the gradients of q, k and v from the output alone."""
    output = scaled_dot_product_attention(*layer[:3], is_causal=True, enable_gqa=True)
    return torch.autograd.grad((output * layer.cotangent).sum(), layer[:3])


def term(qk: RowQK, layer: Layer) -> tuple[Tensor, ...]:
    """Return the gradients of recorded queries and keys from our loss."""
    value = row_divergence(qk, head_mean_attention(qk), layer.target, layer.keys)
    return torch.autograd.grad(value.mean(), qk[:3])


def our_layer(layer: Layer) -> tuple[Tensor, ...]:
    """Return the gradients of q, k and v."""
    P = layer.key.shape[2] - layer.R
    output = scaled_dot_product_attention(*layer[:3], is_causal=True, enable_gqa=True)
    query, key = layer.query.transpose(1, 2), layer.key.transpose(1, 2)
    qk = RowQK(
        query[:, None, P:],
        key[:, :P],
        key[:, None, P:],
        torch.tensor([P], device=key.device),
        0,
        WIDTH**-0.5,
        query.shape[2],
    )
    loss = row_divergence(qk, head_mean_attention(qk), layer.target, layer.keys).mean()
    return torch.autograd.grad((output * layer.cotangent).sum() + loss, layer[:3])


def seconds(function: Callable, device: str, clock: Callable[[], float]) -> float:
    """Return the seconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def peak_bytes(function: Callable, device: str) -> int:
    """Return the largest number of bytes allocated during one call, above those before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = function()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak


def measure(S: int, R: int, arguments: argparse.Namespace) -> float:
    """Measure and print one shape; returns the time of the term over that of the eager layer."""
    device = arguments.device
    fitting = [k for k in (4, 2, 1) if HEADS // KEY_HEADS * k * S * S * 4 * MAPS <= arguments.eager_memory * 2**30]
    part = fitting[0] if fitting else 0
    layer, few = make_layer(S, R, KEY_HEADS, device), make_layer(S, R, part, device) if part else None
    qk = layer.rows()
    cases = {
        "eager layer": lambda: eager_layer(few),
        "our layer": lambda: our_layer(layer),
        "SDPA": lambda: sdpa(layer),
        "term": lambda: term(qk, layer),
        "eager rows": lambda: eager_rows(layer),
    }
    if not part:
        del cases["eager layer"]
    map_bytes, inputs = R * S * 4, {"term": qk[:3], "eager layer": (few or layer)[:3], "eager rows": layer[:2]}
    if part == KEY_HEADS:
        for ours, eager in zip(our_layer(layer), eager_layer(layer)):
            assert torch.allclose(
                ours.float(), eager.float(), rtol=0, atol=(1e-5 if device == "cpu" else 2e-2) * float(eager.abs().max())
            ), "ours and eager differ"
    peaks = {name: peak_bytes(case, device) for name, case in cases.items()}
    times = {name: [] for name in cases}
    for _ in range(arguments.repeats):
        for name, case in cases.items():
            times[name].append(seconds(case, device, CLOCKS[arguments.clock]))
    print(
        f"S={S} R={R}: {HEADS} heads, {KEY_HEADS} key/value heads, width {WIDTH}, {layer.query.dtype}; a map of rows "
        f"(R x S x 4) is {map_bytes / 1e6:.1f} MB"
    )
    print(f"{'':14}{'least s':>10}{'most s':>10}{'peak MB':>12}{'gradients MB':>14}{'extra MB':>12}{'extra, maps':>13}")
    least = {}
    for name in cases:
        factor = KEY_HEADS // part if name == "eager layer" else 1
        gradients = sum(tensor.numel() * tensor.element_size() for tensor in inputs.get(name, layer[:3])) * factor
        least[name], extra = min(times[name]) * factor, peaks[name] * factor - gradients
        note = f"  ({part} of {KEY_HEADS} key/value heads, x {factor})" if factor > 1 else ""
        print(
            f"{name:14}{least[name]:10.4f}{max(times[name]) * factor:10.4f}{peaks[name] * factor / 1e6:12.1f}"
            f"{gradients / 1e6:14.1f}{extra / 1e6:12.1f}{extra / map_bytes:13.2f}{note}"
        )
    share = least["term"] / least["SDPA"]
    print(f"term / eager rows {least['term'] / least['eager rows']:.3f}; term / SDPA {share:.3f}")
    if device == "cuda":
        # The kernels compute scores five times (normaliser, map, statistics, dq, dk) and take two more products.
        floor = 7 * 2 * HEADS * WIDTH * R * (S - R / 2) / (arguments.peak_tflops * 1e12)
        print(
            f"term {least['term'] * 1e3:.3f} ms, floor of its matrix products {floor * 1e3:.3f} ms: "
            f"{least['term'] / floor:.1f} times"
        )
    if not part:
        print("eager layer: more memory than --eager-memory for one key/value head; left out")
        return 0.0
    eager, ratio = least["eager layer"], least["term"] / least["eager layer"]
    print(
        f"our layer / eager layer {least['our layer'] / eager:.3f}; term / (eager layer - SDPA) "
        f"{least['term'] / max(eager - least['SDPA'], 1e-9):.3f}; term / eager layer {ratio:.3f}\n"
    )
    return ratio


def main() -> None:
    """Measure all shapes and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device of the measurement")
    parser.add_argument("--shapes", nargs="+", help="shapes as S x R, such as 4096x512")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions; the least time counts")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="clock of the seconds")
    parser.add_argument("--eager-memory", type=float, default=10.0, help="GiB that the eager layer may take")
    parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="TFLOP/s of dense bfloat16 products, for their least time"
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and arguments.clock != "wall":
        parser.error("--clock cpu: kernels on a GPU take no processor time; use --clock wall")
    shapes = arguments.shapes or (
        ["4096x512", "8192x1024"]
        if arguments.device == "cpu"
        else ["4096x512", "8192x1024", "16384x2048", "32768x4096"]
    )
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(
        f"torch {torch.__version__}, Python {sys.version.split()[0]}, {name}, {arguments.repeats} repetitions, "
        f"{arguments.clock} clock\n"
    )
    ratios = [measure(*map(int, shape.split("x")), arguments) for shape in shapes]
    print(f"ratio attention_term {max(ratios):.3f}")


if __name__ == "__main__":
    main()
