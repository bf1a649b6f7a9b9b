"""When the parameters of a stage are gathered from the data-parallel ranks that share them.

`StageEngine.resident` gathers the whole stage at once. A training pass can do better, by what it hangs into each layer:

- `ArrivingWeights`: all gathers are begun in order before the pass, and a layer waits for its own alone;
- `LayerWeights`, for memory that the whole stage does not fit into: each layer is gathered when a pass comes to it (one
  layer ahead, where that may overlap) and let go of behind it, forward and, with the layer's activations computed again,
  backward.

Ranks of a data-parallel group run the same layers in the same order, so that they begin the same gathers in one order.
"""

from typing import Optional, Sequence

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor
from torch.nn import Parameter


class Gather:
    """Those of ZeRO-3-sharded `parameters` that are not whole become so, by one coalesced all-gather that has begun; they
    may be read after `wait`."""

    def __init__(self, parameters: Sequence[Parameter]):
        missing = [parameter for parameter in parameters if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        self._under_way = missing[0].all_gather_coalesced(missing) if missing else None

    def wait(self) -> None:
        """On a GPU the current stream waits, not the host. May be called again."""
        if self._under_way is not None:
            self._under_way.wait()
            self._under_way = None


def release_parameters(parameters: Sequence[Parameter]) -> None:
    """Keep only this rank's shard of each; sends nothing."""
    held = [parameter for parameter in parameters if parameter.ds_status == ZeroParamStatus.AVAILABLE]
    if held:
        held[0].partition(param_list=held)


class ArrivingWeights:
    """Parameters of one layer whose gather begins now and which stay until the engine lets go of the stage."""

    def __init__(self, layer: torch.nn.Module):
        self._gather = Gather(list(layer.parameters()))

    def enter(self, hidden: Tensor) -> Tensor:
        """Wait before the layer reads `hidden`."""
        self._gather.wait()
        return hidden

    def leave(self) -> None:
        """Nothing to do."""

    def settle(self) -> None:
        """Wait for what is under way."""
        self._gather.wait()


class LayerWeights:
    """Parameters of one layer, whole only while a pass is in it.

    The layer must be recomputed in the backward pass (`StageLayer.recompute`): what its forward pass saves are weights
    that are gone by then.
    """

    next_forward: Optional["LayerWeights"] = None
    """Of the layer that a forward pass enters next; its gather begins while this layer computes. None: none does."""
    next_backward: Optional["LayerWeights"] = None
    """The same of a backward pass."""

    def __init__(self, layer: torch.nn.Module):
        self.parameters = list(layer.parameters())
        self._gather: Optional[Gather] = None

    def fetch(self) -> None:
        """Begin to gather."""
        if self._gather is None:
            self._gather = Gather(self.parameters)

    def enter(self, hidden: Tensor) -> Tensor:
        """Gather before the layer reads `hidden`; returns what the layer has to read in its place."""
        self.fetch()
        self._gather.wait()
        following = self.next_backward if _in_backward() else self.next_forward
        if following is not None:
            following.fetch()
        return _LetGo.apply(hidden, self) if torch.is_grad_enabled() and hidden.requires_grad else hidden

    def leave(self) -> None:
        """After the layer's forward pass. Where that is its second one, inside the backward pass, the weights are still
        needed; they go when the gradient of the layer's input is there."""
        if not _in_backward():
            self.release()

    def release(self) -> None:
        """Let go."""
        release_parameters(self.parameters)
        self._gather = None

    def settle(self) -> None:
        """Wait for what is under way."""
        if self._gather is not None:
            self._gather.wait()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class _LetGo(torch.autograd.Function):
    """Identity on a layer's input whose backward, the last of the layer's, releases its weights."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weights: LayerWeights) -> Tensor:
        ctx.weights = weights
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.weights.release()
        return grad, None
