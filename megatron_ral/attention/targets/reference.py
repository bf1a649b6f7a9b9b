"""Target `reference`: the frozen reference model, which the paper's introduction speaks of.

The signal is of first order as soon as training has moved the policy away from the reference.
"""

from megatron_ral.attention.targets.base import AttentionTarget


class ReferenceTarget(AttentionTarget):
    """Rows of the frozen reference model."""


TARGET = ReferenceTarget()
