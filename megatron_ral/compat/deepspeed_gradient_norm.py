"""Replace DeepSpeed's gradient norm by our own.

ZeRO-3's norm is wrong for a pipeline stage in two ways:

- it counts the last stage's copy of tied embeddings a second time;
- with an offloaded optimizer it is taken while gradients are reduced, which is before the engine sums the gradients
  that tensor-parallel ranks and tied copies share.

Tried on: DeepSpeed 0.19.8.
Retired by: `test_deepspeed_norm_still_counts_tied_copies`,
`test_deepspeed_norm_of_an_offloaded_optimizer_is_still_taken_when_gradients_are_reduced`.
"""

from typing import Any, Callable

from torch import Tensor


def use_gradient_norm(zero_optimizer: Any, norm: Callable[[], Tensor]) -> None:
    """Make ZeRO-3 clip by `norm()` and skip the step where it is not finite.

    Args:
        zero_optimizer: DeepSpeed's ZeRO-3 optimizer.
        norm: Function that returns the global gradient norm, a 0-dim tensor that is equal on every rank.
    """
    zero_optimizer._get_norm_groups = lambda: [norm()]
