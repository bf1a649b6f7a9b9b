"""megatron-core's pipeline schedule over micro-batches of different lengths."""

from typing import Any, Callable, Iterator, Optional, Sequence

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_ral.models.multimodal import MultimodalStage

Shape = tuple[int, ...]


class KnownShapes(P2PCommunicator):
    """Communicator of hidden states between stages whose shapes the receiver knows.

    With `variable_seq_lengths` megatron-core sends the shape of each tensor before the tensor, which costs a message
    and a synchronisation of the device. Here shapes need not be sent, because every stage reads the same micro-batches
    and receives them in their order in both directions.

    Args:
        group: Process group of the pipeline stages.
        config: Configuration of the stage's model.
        shapes: Shape of the hidden states between stages for each micro-batch.
    """

    def __init__(self, group: torch.distributed.ProcessGroup, config: Any, shapes: Sequence[Shape]):
        super().__init__(group, config)
        self._hidden, self._gradients = iter(shapes), iter(shapes)

    def _communicate_shapes(
        self, tensor_send_next: Optional[Tensor], tensor_send_prev: Optional[Tensor], recv_prev: bool, recv_next: bool
    ) -> tuple[Optional[Shape], Optional[Shape]]:
        """Return the shapes of the tensors that are received next, from the previous stage and from the next one.

        None stands for a tensor that is not received.
        """
        return next(self._hidden) if recv_prev else None, next(self._gradients) if recv_next else None


def run_schedule(
    forward_step: Callable, data: Iterator[Any], stage: MultimodalStage, shapes: Sequence[Shape], *, forward_only: bool
) -> None:
    """Run a forward pass over micro-batches, and a backward pass, in the layout in which megatron-core is active.

    Args:
        forward_step: Function of one micro-batch with the signature that megatron-core's schedule calls.
        data: Micro-batches.
        stage: This rank's stage.
        shapes: Shape of the hidden states between stages for each micro-batch, (sequence on one rank, B, H).
        forward_only: Whether the backward pass is left out.
    """
    arguments = {}
    if stage.layout.pipeline_size > 1:
        process_groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "pp", "cp", "embd", "pos_embd", "dp_cp"])
        arguments = {
            "p2p_communicator": KnownShapes(process_groups.pp, stage.config, shapes),
            "pg_collection": process_groups,
        }
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=data,
        model=stage,
        num_microbatches=len(shapes),
        seq_length=shapes[0][0],
        micro_batch_size=shapes[0][1],
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
        **arguments,
    )
