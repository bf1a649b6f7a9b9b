"""Weights of the policy as a stream of Hugging Face tensors, made whole from ZeRO-3 shards one parameter at a time."""

from typing import Iterator

from megatron_ral.engine.gather import gathered
from megatron_ral.engine.policy import PolicyEngine
from megatron_ral.models.adapters import FUSED, adapted_parts
from megatron_ral.weights.stream import StreamedTensor, stream_weights


def stream_policy(
    policy: PolicyEngine, *, receives: bool, all_stages: bool = False, skip_frozen: bool = False
) -> Iterator[StreamedTensor]:
    """Yield the weights of the policy, whether it is resident or not. All ranks go through the stream to its end.

    Args:
        policy: Policy.
        receives, all_stages: As for `weights.stream.stream_weights`.
        skip_frozen: Leave out weights that no update changes, for a reader that has had them before.
    """
    return stream_weights(
        policy.stage,
        policy.process_groups,
        gathered,
        receives=receives,
        all_stages=all_stages,
        includes=lambda name: not skip_frozen or _changes(policy, name),
    )


def _changes(policy: PolicyEngine, name: str) -> bool:
    """Return whether updates change a weight, by its name inside `MultimodalStage`, or its adapter."""
    if policy.shape.adapter is None:
        return policy.shape.is_trained(name, policy.training.train_vision)
    adapted = (fused for fused in FUSED if adapted_parts(policy.shape.adapter, fused))
    return any(name.endswith(f".{fused}.weight") for fused in adapted)
