"""Import megatron-core without importing the compiler of torch.

megatron-core decorates its fused functions with `torch.compile` when it is imported, which imports torch's compiler, a
second and a half of processor time per process. We use none of these functions. Here they are compiled when they are
first called.

Tried on: megatron-core 0.16.1; torch 2.13.0.
Retired by: `test_megatron_still_compiles_when_imported`.
"""

import functools
import sys
from typing import Any, Callable, Optional

import torch


def compile_when_called(function: Optional[Callable] = None, **options: Any) -> Callable:
    """Return a function that compiles another one when it is first called, or a decorator that does so.

    Args:
        function: Function to compile. None: a decorator is returned.
        options: Options of `torch.compile`.
    """
    if function is None:
        return functools.partial(compile_when_called, **options)
    compiled = functools.cache(lambda: torch.compile(function, **options))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call


def import_megatron() -> None:
    """Import megatron-core. Where it has been imported before, nothing changes."""
    if "megatron.core" in sys.modules:
        return
    real, torch.compile = torch.compile, compile_when_called  # type: ignore[assignment]
    try:
        import megatron.core
    finally:
        torch.compile = real  # type: ignore[assignment]
    assert megatron.core is not None
