"""Skip DeepSpeed's gradient reduction after an error.

`engine.coalesce_grad_reduction()` reduces gradients when its block ends, also when an exception ends it. Other ranks
may have failed as well and never join that reduction, so that the exception would be hidden behind a hang.

Tried on: DeepSpeed 0.19.8.
Retired by: `test_deepspeed_still_reduces_after_an_error`.
"""

from contextlib import contextmanager
from typing import Any, Iterator


@contextmanager
def coalesced_reduction(engine: Any) -> Iterator[None]:
    """Run `engine.coalesce_grad_reduction()`, reducing nothing after an exception.

    The engine must not be used any more after an exception.
    """
    with engine.coalesce_grad_reduction():
        try:
            yield
        except BaseException:
            engine._flush_coalesced_reduction_zero3 = lambda optimizer: None
            raise
