"""When the parameters of a stage are gathered from the data-parallel ranks that share them.

`StageEngine.resident` gathers the whole stage at once. `LayerWeights` is for memory that the whole stage does not fit into:
each layer is gathered when a pass comes to it and let go of behind it, forward and, with the layer's activations computed
again, backward.
"""

from typing import Sequence

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor
from torch.nn import Parameter


def gather_parameters(parameters: Sequence[Parameter]) -> None:
    """Those of ZeRO-3-sharded `parameters` that are not whole become so, by one coalesced all-gather."""
    missing = [parameter for parameter in parameters if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    if missing:
        missing[0].all_gather_coalesced(missing).wait()


def release_parameters(parameters: Sequence[Parameter]) -> None:
    """Keep only this rank's shard of each; sends nothing."""
    held = [parameter for parameter in parameters if parameter.ds_status == ZeroParamStatus.AVAILABLE]
    if held:
        held[0].partition(param_list=held)


class LayerWeights:
    """Parameters of one layer, whole only while a pass is in it.

    The layer must be recomputed in the backward pass (`StageLayer.recompute`): what its forward pass saves are weights
    that are gone by then.
    """

    def __init__(self, layer: torch.nn.Module):
        self.parameters = list(layer.parameters())

    def enter(self, hidden: Tensor) -> Tensor:
        """Gather before the layer reads `hidden`; returns what the layer has to read in its place."""
        gather_parameters(self.parameters)
        return _LetGo.apply(hidden, self) if torch.is_grad_enabled() and hidden.requires_grad else hidden

    def leave(self) -> None:
        """After the layer's forward pass. Where that is its second one, inside the backward pass, the weights are still
        needed; they go when the gradient of the layer's input is there."""
        if torch._C._current_graph_task_id() == -1:
            release_parameters(self.parameters)


class _LetGo(torch.autograd.Function):
    """Identity on a layer's input whose backward, the last of the layer's, releases its weights."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weights: LayerWeights) -> Tensor:
        ctx.weights = weights
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad: Tensor):
        release_parameters(ctx.weights.parameters)
        return grad, None
