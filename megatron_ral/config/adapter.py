"""Section `adapter` of a run's configuration: low-rank adapters, trained in place of the weights."""

from typing import Literal

from pydantic.dataclasses import dataclass

from megatron_ral.config.fields import STRICT, NonNegativeInt, PositiveFloat


@dataclass(frozen=True, config=STRICT)
class AdapterConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685): an adapted matrix is W + alpha / rank * B A, and only A and B are
    trained. The base weights stay as they are, without gradients and optimizer state. The vision tower has none."""

    rank: NonNegativeInt = 0
    """Rows of A and columns of B; 0 for no adapters, so that all weights are trained. Adapters want about 10 times the
    learning rate of full training."""
    alpha: PositiveFloat = 32.0
    """Numerator of the scale alpha / rank of the product B A."""
    targets: tuple[Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Adapted matrices of every language layer, by their names in transformers."""
    dropout: float = 0.0
    """Dropout in front of A, which has to be 0: the log-probabilities of one response would differ from pass to pass,
    and every ratio of probabilities would be wrong."""
    path: str = ""
    """PEFT folder (adapter_config.json, adapter_model.safetensors) that the adapters start from; empty for new ones,
    whose B is zero, so that the model starts as model.path."""


PROJECTIONS = AdapterConfig().targets
"""Matrices of a language layer that can have an adapter, by their names in transformers."""
