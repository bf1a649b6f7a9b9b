"""megatron-core and DeepSpeed imported without torch's compiler, which functions of theirs load and we do not call.

megatron-core's fused functions, and DeepSpeed's optimizer Muon, are decorated with `torch.compile` while they are
imported. Decorating alone imports torch's compiler back end, about a sixth of the processor seconds before the first
step of a small model. Here the decorator waits: a function is compiled when it is first called, with the same options
and results.

Tried on: megatron-core 0.16.1, 0.17.1, 0.18.2 and 0.19.2; DeepSpeed 0.19.8.
Retired by: `test_libraries_still_compile_functions_while_they_are_imported`.
"""

import functools
from collections.abc import Callable
from typing import Any, Optional

import torch

_compile = torch.compile


def compile_at_first_call(model: Optional[Callable] = None, **options: Any) -> Callable:
    """Return a function that compiles `model` when it is first called; without `model`, a decorator.

    Args:
        options: those of `torch.compile`.
    """
    if model is None:
        return functools.partial(compile_at_first_call, **options)
    if not callable(model) or isinstance(model, (type, torch.nn.Module)):
        return _compile(model, **options)
    compiled: Optional[Callable] = None

    @functools.wraps(model)
    def call(*args: Any, **named: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            compiled = _compile(model, **options)
        return compiled(*args, **named)

    # A compiled function that calls this one reads `model` into its own graph, as it does behind `torch.compile`.
    # Without this it would read the lines above, and be compiled again once `compiled` is set.
    call._torchdynamo_inline = model  # type: ignore[attr-defined]
    return call


def import_libraries() -> None:
    """Import megatron-core and DeepSpeed, whose functions are compiled at their first call from then on."""
    torch.compile = compile_at_first_call
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  DeepSpeed imports it for every optimizer
        import megatron.core  # noqa: F401
    finally:
        torch.compile = _compile
