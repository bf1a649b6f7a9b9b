"""Root mean square norm with megatron-core's signature."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """Root mean square norm whose factor is the weight, or 1 + weight where the family centres its weights at zero.

    Args:
        config: Configuration of the model.
        hidden_size: Width of the input.
        eps: Number added to the mean square.
        over_heads: True for norms of heads. Every tensor rank sees other heads there, so that its gradient is a part of
            the whole. Under sequence parallelism this holds for every norm, because ranks see other tokens.
        centred_at_one: True for a norm whose factor is the weight in every family.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-6,
        over_heads: bool = False,
        centred_at_one: bool = False,
        **unused,
    ):
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        self.is_zero_centred = config.layernorm_zero_centered_gamma and not centred_at_one
        cast(Any, self.weight).partial_over_tensor_ranks = over_heads or config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised input [..., hidden_size] in its type; carries gradient."""
        if not self.is_zero_centred:
            return super().forward(x)
        # In float32, because 1 + weight would lose most of the weight in 16 bits.
        return F.rms_norm(x.float(), self.normalized_shape, 1.0 + self.weight.float(), self.eps).type_as(x)
