"""Training of a tiny model in bfloat16 against float32: the same rollouts, losses and gradients side by side.

Old and reference policies are another model, so that every term of the loss and its gradient is far from zero.
"""

from typing import Iterator

import torch

from tools.acceptance.part import Figure, Setting, at_least, at_most, expect, note, start, tiny_material

COSINE, NORM_DIFFERENCE, LOSS_DIFFERENCE = 0.98, 0.1, 0.05
"""Limits: cosine of both first gradients, relative difference of their norms, and the largest difference of a loss over
all steps (on a CPU 0.999, 0.03, and 0.02 in 20 steps)."""


def training(setting: Setting, dtype: str, process_groups, num_steps: int) -> tuple[torch.Tensor, list[dict]]:
    """Return the first gradient as one vector, and the metrics of every step."""
    from megatron_ral.objectives.base import finish_metrics
    from tests.distributed.cases import fixed_minibatch, open_policy

    policy_path, other, data = tiny_material(setting)
    opened = open_policy(policy_path, 1, 1, process_groups, dtype=dtype, num_groups=8)
    policy, objective = opened[3:]
    minibatch = fixed_minibatch(opened, other, data, 4)
    history, gradient = [], torch.empty(0)
    for step in range(num_steps):
        metrics = finish_metrics(policy.forward_backward(minibatch, objective))
        if step == 0:
            gradient = torch.cat([shard.flatten() for shard in policy.gradient_shards()]).double().cpu()
        result = policy.step()
        history.append({**metrics, "grad_norm": result.grad_norm, "applied": result.applied})
    return gradient, history


def run(setting: Setting) -> Iterator[Figure]:
    """Yield the losses of both precisions, and how far their gradients agree."""
    groups, num_steps = start(), 20 if setting.on_gpu else 2
    (wanted, wide), (found, narrow) = (training(setting, dtype, groups, num_steps) for dtype in ("float32", "bfloat16"))
    cosine = float(torch.nn.functional.cosine_similarity(found, wanted, dim=0))
    yield at_least("cosine of the first gradients", round(cosine, 5), COSINE)
    yield at_most(
        "first gradients' norms differ by", round(abs(float(found.norm() / wanted.norm()) - 1), 5), NORM_DIFFERENCE
    )
    skipped = sum(not step["applied"] for step in narrow)
    yield expect("updates skipped in bfloat16", skipped, skipped == 0, "0")
    for name in [name for name in wide[0] if name.startswith("loss")]:
        pairs = [(one[name], other[name]) for one, other in zip(narrow, wide)]
        yield note(f"{name} of step 1 and {num_steps}, bfloat16", f"{pairs[0][0]:.4f}, {pairs[-1][0]:.4f}")
        yield note(f"{name} of step 1 and {num_steps}, float32", f"{pairs[0][1]:.4f}, {pairs[-1][1]:.4f}")
        difference = max((abs(one - other) for one, other in pairs), default=0.0)
        yield at_most(f"{name}: largest difference of {num_steps} steps", round(difference, 5), LOSS_DIFFERENCE)
