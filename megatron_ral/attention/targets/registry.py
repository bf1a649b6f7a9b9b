"""Table of the attention targets. It imports no torch, so that settings are checked before anything is loaded.

A target is one row here and one file of this folder, `<name>.py`, whose class `TARGET` holds its mathematics (see
`base.py`).
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Mapping


class TargetPass(Enum):
    """Forward pass without gradient that a target's rows come from."""

    ROLLOUT_POLICY = "rollout_policy"
    """The policy before the first update of a rollout. In that update its own pass serves."""
    REFERENCE = "reference"
    """The frozen reference model."""
    ROLLOUT = "rollout"
    """No pass of its own: decoding recorded the rows, under each response's own noise."""
    NONE = "none"
    """The target needs no pass."""


@dataclass(frozen=True)
class TargetRules:
    """Settings that a target allows, and the pass that a run has to make for it."""

    needs: TargetPass
    keys: tuple[str, ...] = ("all", "visual", "prompt")
    """Values of `loss.attention_keys` that it allows."""
    keys_reason: str = ""
    """Reason why it allows no others, as the rest of a sentence about them."""
    stores: tuple[str, ...] = ("rows", "qk")
    """Values of `loss.attention_store` that it allows."""
    is_zero_on_policy: bool = False
    """Value and gradient are exactly 0 as long as the policy is the one that made the rollout."""
    needs_noise: bool = False
    """Without `rollout.attention_noise` it has next to no signal, because responses hardly look at other places."""
    unused_settings: Mapping[str, str] = field(default_factory=dict)
    """Setting of section `loss` -> why it has no effect with this target."""


_NO_SIGN = "its rows have no negative weight"
_PREDICTING = "its rows are those that predict each token"

TARGETS: Mapping[str, TargetRules] = {
    "old": TargetRules(TargetPass.ROLLOUT_POLICY, is_zero_on_policy=True),
    "reference": TargetRules(TargetPass.REFERENCE),
    "hindsight": TargetRules(
        TargetPass.ROLLOUT_POLICY,
        keys=("visual", "prompt"),
        keys_reason="it compares different responses over the keys they share",
        stores=("rows",),
        unused_settings={"attention_negative_weight": _NO_SIGN},
    ),
    "oracle": TargetRules(
        TargetPass.NONE,
        keys=("visual",),
        keys_reason="its target is the annotated box",
        stores=("rows",),
        unused_settings={"attention_negative_weight": _NO_SIGN, "attention_advantages": _NO_SIGN},
    ),
    "evidence": TargetRules(
        TargetPass.NONE,
        keys=("visual",),
        keys_reason="its target is the annotated region",
        stores=("rows",),
        unused_settings={"attention_negative_weight": _NO_SIGN},
    ),
    "explored": TargetRules(
        TargetPass.ROLLOUT,
        stores=("rows",),
        needs_noise=True,
        unused_settings={"attention_row": _PREDICTING},
    ),
    "contrast": TargetRules(
        TargetPass.ROLLOUT,
        keys=("visual",),
        keys_reason="it compares where responses looked in the picture",
        stores=("rows",),
        needs_noise=True,
        unused_settings={
            "attention_row": _PREDICTING,
            "attention_divergence": "it is a cross-entropy",
            "attention_row_cap": "a cross-entropy of two signs has no bound",
        },
    ),
}
"""By the value of `loss.attention_target`."""
