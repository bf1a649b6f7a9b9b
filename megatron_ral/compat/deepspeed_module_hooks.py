"""Remove DeepSpeed's per-module hooks, because the engine gathers parameters itself.

The hooks fetch and release the parameters of each module around its forward pass. They compare the order of modules
over all ranks; pipeline stages hold different modules, so that the comparison would hang. They would also gather every
parameter again for each micro-batch.

Tried on: DeepSpeed 0.19.8.
Retired by: `test_deepspeed_still_compares_module_order_over_all_ranks`.
"""

import torch


def remove_module_hooks(module: torch.nn.Module) -> None:
    """Remove all forward hooks from a module and its submodules. Call this right after `deepspeed.initialize`."""
    for child in module.modules():
        for hooks in (
            child._forward_pre_hooks,
            child._forward_hooks,
            child._forward_pre_hooks_with_kwargs,
            child._forward_hooks_with_kwargs,
            child._forward_hooks_always_called,
        ):
            hooks.clear()
