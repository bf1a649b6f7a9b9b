"""Target `old`: the policy that made the rollout (RAL paper, eq. 3).

In the first update of a rollout value and gradient are exactly 0, because the policy still is its own target. The
signal is of second order in the distance that the other updates moved the policy.
"""

from megatron_ral.attention.targets.base import AttentionTarget


class OldTarget(AttentionTarget):
    """Rows of the policy that made the rollout, from a pass of the training engine."""


TARGET = OldTarget()
