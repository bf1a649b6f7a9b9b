"""Modes under which real code runs on tensors without memory, and that count its memory and arithmetic.

`FakeTensorMode` of torch gives every tensor a size and no contents. This file adds two modes. `KnownIntegers` computes
small integer tensors for real beside their fakes, so that code that asks for the number of visual tokens, or for the
first window, gets an answer. `Watched` follows every storage from its creation to its end and counts arithmetic, so
that a phase has a peak of live bytes by kind, and FLOPs. `Watched` alone also works on real tensors.
"""

import math
import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator, Optional, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry

from megatron_ral.attention import blocks

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
            real_args, real_kwargs = tree_map(_known, (args, kwargs))
            real = func(*real_args, **real_kwargs)
        if func._schema.is_mutable:
            return func(*args, **kwargs)
        return (
            tree_map(lambda value: self._fake(value) if isinstance(value, Tensor) else value, real)
            if any(isinstance(value, Tensor) for value in tree_flatten(real)[0])
            else real
        )

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

    def _fake(self, real: Tensor) -> Tensor:
        fake = self._fake_mode.fake_tensor_converter.from_real_tensor(self._fake_mode, real)
        cast(Any, fake).known_value = real
        return fake

    def _as_positions(self, index: Optional[Tensor]) -> Optional[Tensor]:
        """Return a known mask as the positions where it is true, because their number is the size of the selection."""
        known = _known(index) if index is not None else None
        if known is None or known.dtype != torch.bool or known.dim() != 1:
            return index
        with unset_fake_temporarily():
            positions = known.nonzero()[:, 0]
        return self._fake(positions)


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
    calls: float = 0.0
    """Operations that make or change a tensor, a lower bound of the kernels to launch."""

    @property
    def peak_bytes(self) -> int:
        """Live bytes at their largest sum."""
        return sum(self.peak.values())


class Watched(TorchDispatchMode):
    """Mode that counts live bytes by kind, and FLOPs, of the code that runs inside.

    Args:
        kind_of: function that names the kind of a new tensor, or returns None for "activations".
    """

    def __init__(self, kind_of: Callable[[Tensor], Optional[str]] = lambda tensor: None):
        super().__init__()
        self.seen, self.live, self._kind_of = Seen(), Counter(), kind_of
        self.weight = 1.0
        """Factor of FLOPs and calls, more than 1 where one call represents several equal ones."""
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
        made = func._schema.is_mutable
        for value in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(value, Tensor):
                made |= self._follow(value, None)
            elif isinstance(value, (list, tuple)):
                for item in value:
                    if isinstance(item, Tensor):
                        made |= self._follow(item, None)
        if func.namespace in ("aten", "torch_attn"):  # the second has flash attention for variable lengths
            self.seen.calls += made * self.weight
            self._count(func, args, kwargs, result)
        return result

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
        elif func._overloadpacket in flop_registry:
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

    blocks.row_blocks = chunks
    try:
        yield
    finally:
        blocks.row_blocks = original


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Give no memory to tensors made inside, and compute integers that come from integers."""
    with ExitStack() as stack:
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(KnownIntegers(mode))
        yield mode
