"""Output gate of attention where there are more tensor ranks than key/value heads.

megatron-core then gathers queries, gates, keys and values of all ranks and takes this rank's heads of the queries, but
of all gates it takes those of the whole key/value head. The product of outputs and gates has the wrong shape and fails.

Tried on: megatron-core 0.16.1.
Retired by: `test_megatron_still_forgets_to_cut_the_output_gate`.
"""

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_rank
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor


class GatedSelfAttention(SelfAttention):
    """Self-attention whose outputs are multiplied by a sigmoid of gates from the same projection as the queries."""

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return outputs [S, B, n D] times the sigmoid of their gates; carries gradient.

        Args:
            x: Outputs of this rank's heads, [S, B, n D].
            gate: Gates of these heads, or of all heads of the key/value head that they share, [S, B, heads, D].
        """
        heads = x.shape[2] // gate.shape[3]
        if gate.shape[2] != heads:
            start = get_tensor_model_parallel_rank() * heads % gate.shape[2]
            gate = gate[:, :, start : start + heads]
        return (x * torch.sigmoid(gate.flatten(2).float())).to(x.dtype)
