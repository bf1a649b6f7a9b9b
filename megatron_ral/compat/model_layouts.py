"""Several tensor x pipeline layouts in one job: megatron-core 0.16.1 keeps one, in module globals of `parallel_state`.

A teacher may be cut otherwise than its student. The globals of a layout are kept aside and put back while a model of that
layout is built or run: some modules keep their group from when they were built, others look it up at every call.
(DeepSpeed 0.19.8 keeps the `mpu` of the engine built last in a global too, but reads it only while an engine is built.)
`tests/unit/test_compat.py` fails once megatron-core no longer keeps its groups in globals.
"""

from contextlib import contextmanager
from typing import Any, Iterator, Mapping

from megatron.core import parallel_state

Globals = Mapping[str, Any]


def layout_globals() -> Globals:
    """Those of the layout in use."""
    return {name: value for name, value in vars(parallel_state).items() if name.startswith("_") and name.isupper()}


@contextmanager
def use_layout(values: Globals) -> Iterator[None]:
    """Put a layout's globals in place while inside; may be nested."""
    before = layout_globals()
    vars(parallel_state).update(values)
    try:
        yield
    finally:
        vars(parallel_state).update(before)


@contextmanager
def no_layout() -> Iterator[None]:
    """As before any layout was built, so that another can be; afterwards the earlier one is in use again."""
    with use_layout({name: {} if isinstance(value, dict) else None for name, value in layout_globals().items()}):
        yield
