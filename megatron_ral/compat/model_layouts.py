"""Use several tensor x pipeline layouts in one process, although megatron-core holds only one.

megatron-core stores the process groups of its layout in module globals of `parallel_state`. A teacher may be divided
over ranks differently from its student. The globals of each layout are therefore saved, and put back while a model of
that layout is built or run. Building alone is not enough: some modules remember their group from when they were built,
others look it up at every call.

DeepSpeed also stores the `mpu` of the engine built last in a global, but reads it only while an engine is built.

Tried on: megatron-core 0.16.1, 0.17.1, 0.18.2 and 0.19.2; DeepSpeed 0.19.8.
Retired by: `test_megatron_still_keeps_one_layout_in_globals`.
"""

from contextlib import contextmanager
from typing import Any, Iterator, Mapping

from megatron.core import parallel_state

Globals = Mapping[str, Any]
"""Name of a global of `parallel_state` -> its value."""


def layout_globals() -> Globals:
    """Return the globals of the layout that is in use."""
    return {name: value for name, value in vars(parallel_state).items() if name.startswith("_") and name.isupper()}


@contextmanager
def use_layout(values: Globals) -> Iterator[None]:
    """Put the globals of a layout in place inside the block. Blocks may be nested."""
    before = layout_globals()
    _set_globals(values)
    try:
        yield
    finally:
        _set_globals(before)


@contextmanager
def no_layout() -> Iterator[None]:
    """Clear the globals inside the block, so that another layout can be built. The earlier layout is restored after."""
    with use_layout({name: {} if isinstance(value, dict) else None for name, value in layout_globals().items()}):
        yield


def _set_globals(values: Globals) -> None:
    for name, value in values.items():
        setattr(parallel_state, name, value)
