"""Names and sizes of low-rank adapters (LoRA, arXiv 2106.09685). The modules are in `adapted_linear.py`.

An adapted matrix is W + scale * B A. PEFT keeps A and B per matrix of transformers. megatron-core fuses queries, keys
and values, and gate and up, so that a fused matrix has one A with a block of `rank` rows per adapted part. Its one B
has the rows of the fused matrix: each of them reads the block of its own part.
"""

from dataclasses import dataclass
from typing import Mapping

import torch
from torch import Tensor

from megatron_ral.config.adapter import AdapterConfig


@dataclass(frozen=True)
class AdapterShape:
    """Sizes of the adapters of a model."""

    rank: int
    """Rows of A and columns of B."""
    alpha: float
    """Numerator of the scale."""
    targets: tuple[str, ...]
    """Adapted matrices of each language layer, by their names in transformers."""

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return self.alpha / self.rank

    @classmethod
    def from_config(cls, config: AdapterConfig) -> "AdapterShape | None":
        """Return the sizes that the settings ask for; None for no adapters."""
        return cls(config.rank, config.alpha, tuple(config.targets)) if config.rank else None


FUSED: Mapping[str, tuple[str, ...]] = {
    "self_attention.linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "self_attention.linear_proj": ("o_proj",),
    "mlp.linear_fc1": ("gate_proj", "up_proj"),
    "mlp.linear_fc2": ("down_proj",),
}
"""Matrix of a layer in megatron-core -> the matrices of transformers that it is made of."""


def is_adapter(name: str) -> bool:
    """Return whether a parameter of a `MultimodalStage` belongs to an adapter."""
    return ".adapter." in name


def adapted_matrix(name: str) -> str:
    """Return the parameter of a `MultimodalStage` that a factor of an adapter belongs to, or the parameter itself."""
    return f"{name.partition('.adapter.')[0]}.weight" if is_adapter(name) else name


def adapter_weight(weight: str, factor: str) -> str:
    """Return the common name of an adapter's factor.

    Args:
        weight: Common name of the adapted matrix, such as `model.layers.0.self_attn.q_proj.weight`.
        factor: "A" or "B".
    """
    return f"{weight.removesuffix('.weight')}.lora_{factor}.weight"


def adapted_parts(adapter: AdapterShape | None, fused: str) -> tuple[str, ...]:
    """Return the adapted parts of a fused matrix, in its order.

    Args:
        adapter: Sizes of the adapters; None: there are none.
        fused: Key of `FUSED`.
    """
    return tuple(part for part in FUSED[fused] if adapter is not None and part in adapter.targets)


def merge_adapter(weight: Tensor, A_rI: Tensor, B_Or: Tensor, scale: float) -> Tensor:
    """Return W + scale * B A [O, I], computed in float32 and rounded to the type of W.

    Args:
        weight: [O, I].
        A_rI: [rank, I].
        B_Or: [O, rank].
        scale: Factor of the product.
    """
    return torch.addmm(weight.float(), B_Or.float(), A_rI.float(), alpha=scale).to(weight.dtype)


def with_adapter(weight: Tensor, name: str, factors: Mapping[str, Tensor], adapter: AdapterShape | None) -> Tensor:
    """Return a weight with its adapter merged, or the weight itself if it has none.

    Args:
        weight: Whole weight.
        name: Common name of the weight.
        factors: Factors of adapters by common name, those of this weight among them.
        adapter: Sizes of the adapters of the model.
    """
    A, B = (factors.get(adapter_weight(name, factor)) for factor in "AB")
    return weight if A is None or B is None or adapter is None else merge_adapter(weight, A, B, adapter.scale)
