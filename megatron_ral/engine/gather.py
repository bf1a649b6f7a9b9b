"""Gathering of a stage's ZeRO-3-sharded parameters from the data-parallel ranks that share them.

`StageEngine.resident` gathers the whole stage at once. A training pass may instead give each layer one of these:

- `ArrivingWeights`: The gathers of all layers begin in order before the pass, and each layer waits for its own alone.
- `LayerWeights`: Each layer is gathered when a pass reaches it, or one layer earlier with overlap, and released behind
  the pass. This holds for the forward pass and for the backward pass, which computes the layer's activations again. It
  serves stages that do not fit into memory as a whole.

All ranks of a data-parallel process group run the same layers in the same order. They therefore begin the same gathers
in the same order.
"""

from contextlib import contextmanager
from typing import Any, Iterator, Optional, Sequence

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor


class Gather:
    """Coalesced all-gather of ZeRO-3-sharded parameters. It begins at construction.

    Args:
        parameters: Parameters to gather. Those that are whole already are left out. All may be read after `wait`.
    """

    def __init__(self, parameters: Sequence[Any]):
        missing: list[Any] = [
            parameter for parameter in parameters if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE
        ]
        self._under_way: Any = missing[0].all_gather_coalesced(missing) if missing else None

    def wait(self) -> None:
        """Wait until the parameters are whole. May be called again.

        On a GPU the current stream waits and the host does not.
        """
        if self._under_way is not None:
            self._under_way.wait()
            self._under_way = None


def release_parameters(parameters: Sequence[Any]) -> None:
    """Release gathered parameters, so that only this rank's shard of each remains. Nothing is sent."""
    whole = [parameter for parameter in parameters if parameter.ds_status == ZeroParamStatus.AVAILABLE]
    if whole:
        whole[0].partition(param_list=whole)


@contextmanager
def gathered(parameter: Any) -> Iterator[None]:
    """Hold one parameter whole inside the context. All data-parallel ranks enter it. One that is whole already stays so
    afterwards."""
    is_sharded = parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE
    Gather([parameter]).wait()
    try:
        yield
    finally:
        if is_sharded:
            release_parameters([parameter])


class ArrivingWeights:
    """Parameters of one layer that stay whole until the engine releases the stage. Their gather begins at construction.

    Args:
        layer: Layer that is gathered.
    """

    def __init__(self, layer: torch.nn.Module):
        self._gather = Gather(list(layer.parameters()))

    def enter(self, hidden: Tensor) -> Tensor:
        """Wait for the layer's parameters before it reads `hidden`. Return `hidden`."""
        self._gather.wait()
        return hidden

    def leave(self) -> None:
        """Do nothing after the layer's forward pass, because the engine releases the parameters."""

    def settle(self) -> None:
        """Wait for a gather that is under way."""
        self._gather.wait()


class LayerWeights:
    """Parameters of one layer that are whole only while a pass is inside the layer.

    The layer must be recomputed in the backward pass (`StageLayer.recompute`), because the weights that its forward
    pass saves are released by then.

    Args:
        layer: Layer that is gathered.
    """

    next_forward: Optional["LayerWeights"] = None
    """Parameters of the layer that a forward pass enters next. Their gather begins while this layer computes. None: no
    gather begins early."""
    next_backward: Optional["LayerWeights"] = None
    """Parameters of the layer that a backward pass enters next, gathered early in the same way."""

    def __init__(self, layer: torch.nn.Module):
        self.parameters = list(layer.parameters())
        self._gather: Optional[Gather] = None

    def fetch(self) -> None:
        """Begin the gather unless it has begun already."""
        if self._gather is None:
            self._gather = Gather(self.parameters)

    def enter(self, hidden: Tensor) -> Tensor:
        """Gather the layer's parameters before it reads `hidden`.

        Returns:
            Tensor equal to `hidden` that the layer must read in its place. Its gradient flows to `hidden`, and in the
            backward pass releases the parameters.
        """
        self.fetch()
        assert self._gather is not None
        self._gather.wait()
        next_layer = self.next_backward if _in_backward() else self.next_forward
        if next_layer is not None:
            next_layer.fetch()
        return _ReleaseWeights.apply(hidden, self) if torch.is_grad_enabled() and hidden.requires_grad else hidden

    def leave(self) -> None:
        """Release the parameters after the layer's forward pass, unless it is the one that the backward pass repeats.

        The gradients of a repeated forward pass still need them. They are released once the gradient of the layer's
        input is formed.
        """
        if not _in_backward():
            self.release()

    def release(self) -> None:
        """Release the parameters, so that only this rank's shard of each remains."""
        release_parameters(self.parameters)
        self._gather = None

    def settle(self) -> None:
        """Wait for a gather that is under way."""
        if self._gather is not None:
            self._gather.wait()


def _in_backward() -> bool:
    """Return whether this code runs inside a backward pass of autograd."""
    return torch._C._current_graph_task_id() != -1


class _ReleaseWeights(torch.autograd.Function):
    """Identity on a layer's input. Its backward pass, the last step of the layer's, releases the layer's weights."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weights: LayerWeights) -> Tensor:
        ctx.weights = weights
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.weights.release()
        return grad, None
