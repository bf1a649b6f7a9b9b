"""Modes under which real code runs on tensors without memory, and that count its memory and arithmetic.

`FakeTensorMode` of torch gives every tensor a size and no contents. This file adds two modes. `KnownIntegers` computes
small integer tensors for real beside their fakes, so that code that asks for the number of visual tokens, or for the
first window, gets an answer. `Watched` follows every storage from its creation to its end and counts arithmetic,
kernels and waits of the host, so that a phase has a peak of live bytes by kind, and FLOPs. `Watched` alone also works
on real tensors.
"""

import math
import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator, Optional, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry

from megatron_ral.attention import blocks
from megatron_ral.planning.gpu_work import (
    ATTENTION,
    add,
    attention_call,
    fused_kernels,
    on_device,
    place,
    replaced,
    starts_kernel,
    tensors_in,
    wait_of,
)

_KNOWN_NUMEL = 1 << 22
"""Largest number of elements of an integer tensor that is computed for real."""


def _known(value: Any) -> Optional[Tensor]:
    return getattr(value, "known_value", None) if isinstance(value, FakeTensor) else value


class KnownIntegers(TorchDispatchMode):
    """Mode that computes integers of fake tensors for real where they come from integers alone.

    A number read from an unknown tensor is 1, and no element of an unknown mask is true, so that no sampled token needs
    the whole vocabulary.

    Args:
        fake_mode: mode that makes the fake tensors.
    """

    def __init__(self, fake_mode: FakeTensorMode):
        super().__init__()
        self._fake_mode = fake_mode

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        flat, _ = tree_flatten((args, kwargs))
        tensors = [value for value in flat if isinstance(value, Tensor)]
        unknown = any(_known(tensor) is None for tensor in tensors)
        if func is torch.ops.aten._local_scalar_dense.default:
            if unknown:
                return _some_number(tensors[0].dtype)
            with unset_fake_temporarily():
                return cast(Tensor, _known(tensors[0])).item()
        if unknown:
            if func is torch.ops.aten.nonzero.default:
                return tensors[0].new_empty(0, tensors[0].dim(), dtype=torch.int64)
            if func is torch.ops.aten.index.Tensor:
                args = (args[0], [self._as_positions(index) for index in args[1]])
            result = func(*args, **kwargs)
            if func._schema.is_mutable:
                for tensor in tensors[:1]:  # the value known of it is outdated
                    if isinstance(tensor, FakeTensor) and hasattr(tensor, "known_value"):
                        del cast(Any, tensor).known_value
            return result
        if not self._is_small_integer_work(func, args, kwargs, tensors):
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            real_args, real_kwargs = tree_map(_on_host, tree_map(_known, (args, kwargs)))
            real = func(*real_args, **real_kwargs)
        try:
            result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            result = tree_map(lambda value: self._fake(value, tensors[0].device), real)
        if not func._schema.is_mutable:
            for fake, value in zip(tensors_in(result), tensors_in(real)):
                cast(Any, fake).known_value = value
        return result

    def _is_small_integer_work(self, func, args, kwargs, tensors: list[Tensor]) -> bool:
        if func.namespace != "aten":
            return False
        if tensors:
            return all(tensor.numel() <= _KNOWN_NUMEL for tensor in tensors) and not any(
                tensor.is_floating_point() for tensor in tensors
            )
        dtype = kwargs.get("dtype")
        numbers = [value for value in tree_flatten(args)[0] if isinstance(value, (int, float))]
        whole = not any(isinstance(value, float) for value in numbers)
        if dtype is not None:
            whole = not (dtype.is_floating_point or dtype.is_complex)
        elif func._opname in ("zeros", "ones", "empty", "rand", "randn", "empty_strided"):
            whole = False
        size = math.prod(args[0]) if args and isinstance(args[0], (list, tuple)) else max(numbers, default=0)
        return whole and size <= _KNOWN_NUMEL

    def _fake(self, real: Any, device: torch.device) -> Any:
        if not isinstance(real, Tensor):
            return real
        fake = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=device)
        cast(Any, fake).known_value = real
        return fake

    def _as_positions(self, index: Optional[Tensor]) -> Optional[Tensor]:
        """Return a known mask as the positions where it is true, because their number is the size of the selection."""
        known = _known(index) if index is not None else None
        if known is None or known.dtype != torch.bool or known.dim() != 1:
            return index
        with unset_fake_temporarily():
            positions = known.nonzero()[:, 0]
        return self._fake(positions, cast(Tensor, index).device)


def _on_host(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _some_number(dtype: torch.dtype) -> Any:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


@dataclass
class Seen:
    """Memory and arithmetic of one phase."""

    peak: Counter = field(default_factory=Counter)
    """Live bytes by kind at the moment of their largest sum."""
    flops: float = 0.0
    """FLOPs of products in 16 bits."""
    wide_flops: float = 0.0
    """FLOPs of products in float32 or wider, which tensor cores do not compute."""
    kernels: Counter = field(default_factory=Counter)
    """Kernels to start by operator: those that make or change a tensor."""
    recorded: Counter = field(default_factory=Counter)
    """Kernels of recorded passes by operator, which a graph starts with one launch for all."""
    waits: Counter = field(default_factory=Counter)
    """Waits of the host for the device by "what file:line"."""
    attention: Counter = field(default_factory=Counter)
    """Calls of fused attention by kernel and shapes."""
    mask_bytes: int = 0
    """Bytes of the largest mask of a call of fused attention."""

    @property
    def peak_bytes(self) -> int:
        """Live bytes at their largest sum."""
        return sum(self.peak.values())


class Watched(TorchDispatchMode):
    """Mode that counts live bytes by kind, and FLOPs, of the code that runs inside.

    Args:
        kind_of: function that names the kind of a new tensor, or returns None for "activations".
        on_gpu: whether to count kernels on CUDA tensors alone, and waits.
    """

    def __init__(self, kind_of: Callable[[Tensor], Optional[str]] = lambda tensor: None, on_gpu: bool = False):
        super().__init__()
        self.seen, self.live, self._kind_of, self.on_gpu = Seen(), Counter(), kind_of, on_gpu
        self.weight = 1.0
        """Factor of FLOPs and calls, more than 1 where one call represents several equal ones."""
        self.is_recording = False
        """True inside the work of a graph."""
        self._total = self._largest = 0
        self._held: dict[int, list] = {}
        self._kind: Optional[str] = None

    @contextmanager
    def phase(self) -> Iterator[Seen]:
        """Start a new count with the bytes that are live now."""
        self.seen, self._largest = Seen(Counter(self.live)), self._total
        yield self.seen

    @contextmanager
    def kind(self, name: str) -> Iterator[None]:
        """Assign a kind to all tensors made inside."""
        before, self._kind = self._kind, name
        try:
            yield
        finally:
            self._kind = before

    def call_it(self, name: str, *tensors: Optional[Tensor]) -> None:
        """Assign a kind to tensors that exist, and follow them from here on."""
        for tensor in tensors:
            if tensor is None:
                continue
            self._follow(tensor, name)
            entry = self._held[tensor.untyped_storage()._cdata]
            self.live[entry[0]] -= entry[1]
            entry[0] = name
            self.live[name] += entry[1]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if result is NotImplemented:
            return result
        makes_or_changes = func._schema.is_mutable
        for tensor in tensors_in(result):
            makes_or_changes |= self._follow(tensor, None)
        if func.namespace in ("aten", "torch_attn"):  # the second has flash attention for variable lengths
            self._count_work(func._opname, args, kwargs, result, makes_or_changes)
            self._count(func, args, kwargs, result)
        return result

    def _count_work(self, name: str, args: tuple, kwargs: dict, result: Any, makes_or_changes: bool) -> None:
        """Count kernels, waits and calls of attention. Tensors of the host count only in a simulation without a GPU."""
        seen, tensors = self.seen, list(tensors_in((args, tuple(kwargs.values()), result)))
        if self.on_gpu and not on_device(tensors):
            return
        if starts_kernel(name, makes_or_changes):
            add(seen.recorded if self.is_recording else seen.kernels, name, self.weight)
        if self.on_gpu and (wait := wait_of(name, args, kwargs, result)):
            add(seen.waits, f"{wait} {place()}", self.weight)
        if name in ATTENTION:
            call, size = attention_call(name, args)
            add(seen.attention, call, self.weight)
            seen.mask_bytes = max(seen.mask_bytes, size)

    def _follow(self, tensor: Tensor, kind: Optional[str]) -> bool:
        """Follow the storage of a tensor, and return whether it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return False
        kind = kind or self._kind or self._kind_of(tensor) or "activations"
        size = storage.nbytes()
        self._held[key] = [kind, size, weakref.ref(storage, lambda _, key=key: self._gone(key))]
        self.live[kind] += size
        self._total += size
        if self._total > self._largest:
            self._largest, self.seen.peak = self._total, Counter(self.live)
        return True

    def _gone(self, key: int) -> None:
        kind, size, _ = self._held.pop(key)
        self.live[kind] -= size
        self._total -= size

    def _count(self, func, args, kwargs, result) -> None:
        name, flops = func._opname, 0
        if "scaled_dot_product" in name:
            flops = _attention_flops(name, args, kwargs)
        elif name in ("_flash_attention_forward", "_flash_attention_backward"):
            flops = _packed_flops(name, args)
        elif func._overloadpacket in flop_registry:
            if func._overloadname == "dtype":  # bmm(.., out_dtype), which torch's counter does not know
                args = args[:2]
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        if flops:
            wide = args[-1].dtype in (torch.float32, torch.float64) if isinstance(args[-1], Tensor) else False
            self.seen.flops += 0 if wide else flops * self.weight
            self.seen.wide_flops += flops * self.weight if wide else 0


def _attention_flops(name: str, args: tuple, kwargs: dict) -> int:
    """Return the FLOPs of attention: two products forward, five backward with recomputed scores, half where causal."""
    backward = "backward" in name
    query, key, value = args[1:4] if backward else args[:3]
    *heads, rows, width = query.shape
    product = 2 * math.prod(heads) * rows * key.shape[-2]
    flops = product * (3 * width + 2 * value.shape[-1] if backward else width + value.shape[-1])
    causal = kwargs.get("is_causal") or any(argument is True for argument in args)
    return flops // 2 if causal else flops


def _packed_flops(name: str, args: tuple) -> int:
    """Return the FLOPs of flash attention over packed sequences, all as long as the longest, causal or not.

    torch's own counter refuses heads that share keys before 2.13.
    """
    backward = "backward" in name
    query, starts, longest = (args[1], args[6], args[8:10]) if backward else (args[0], args[3], args[5:7])
    _, heads, width = query.shape
    return (5 if backward else 2) * 2 * (len(starts) - 1) * heads * longest[0] * longest[1] * width


@contextmanager
def first_chunks(watched: Watched, count: int = 2) -> Iterator[None]:
    """Let the first chunks of attention rows represent all chunks of the code that runs inside.

    Attention rows are computed in many chunks of one size, one after the other. Peaks are the same, because no two
    chunks exist at a time.

    Args:
        watched: mode that counts the chunks.
        count: number of chunks that run.
    """
    original = blocks.row_blocks

    def chunks(*arguments: Any) -> Iterator[Any]:
        every = list(original(*arguments))
        before = watched.weight
        for chunk in every[:count]:
            watched.weight = before * len(every) / len(every[:count])
            yield chunk
        watched.weight = before

    with replaced(blocks, "row_blocks", chunks):
        yield


@contextmanager
def counted_graphs(watched: Watched) -> Iterator[None]:
    """Count the work of recorded decoding passes as such, and one kernel for the launch of each.

    Args:
        watched: mode that counts it.
    """
    from megatron_ral.engine import decoding_batch

    class Recorded:
        def __init__(self, work: Callable[[], Any]):
            self.work = work

        def __call__(self) -> Any:
            watched.seen.kernels["graph"] += 1
            watched.is_recording = True
            try:
                return self.work()
            finally:
                watched.is_recording = False

    with replaced(decoding_batch, "Recorded", Recorded):
        yield


class _CountedKernel:
    """Stand-in for a Triton kernel: `kernel[grid](...)` counts a launch and does nothing."""

    def __init__(self, name: str, watched: Watched):
        self.name, self.watched = name, watched

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any, **constants: Any) -> None:
        add(self.watched.seen.kernels, self.name, self.watched.weight)


@contextmanager
def counted_triton(watched: Watched) -> Iterator[None]:
    """Form attention rows by the backend of a GPU, whose kernels are counted and not run.

    Args:
        watched: mode that counts them.
    """
    from megatron_ral.attention import formulas, rows, triton_backend, triton_formulas

    def choose(device: torch.device, dtype: torch.dtype, width: int) -> tuple[triton_backend.TritonBackend, str]:
        return triton_backend.TritonBackend(), "Triton kernels, counted"

    kernels = (
        *((triton_backend, name) for name in ("_row_statistics", "_head_mean", "_query_gradient", "_key_gradient")),
        *((triton_formulas, f"_{what}_of_rows") for what in ("mass", "distribution", "masses", "divergence", "slope")),
    )
    with ExitStack() as stack:
        for module, name in kernels:
            stack.enter_context(replaced(module, name, _CountedKernel(name, watched)))
        stack.enter_context(replaced(triton_backend, "device_of", lambda tensor: nullcontext()))
        stack.enter_context(replaced(rows, "choose_backend", choose))
        stack.enter_context(replaced(formulas, "_of_device", lambda device: triton_formulas.TritonFormulas()))
        yield


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Give no memory to tensors made inside, and compute integers that come from integers."""
    with ExitStack() as stack:
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(KnownIntegers(mode))
        stack.enter_context(fused_kernels())
        yield mode
