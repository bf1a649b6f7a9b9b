"""Attention distribution of a row: head-averaged attention over some of its keys, renormalised (RAL paper, eq. 2)."""

from torch import Tensor

from megatron_ral.attention.formulas import choose_formulas
from megatron_ral.attention.types import RowKeys


def key_mass(attention_BGRS: Tensor, keys: RowKeys) -> Tensor:
    """Return Z of `attention_distribution`, [B, G, R], without gradient."""
    return choose_formulas(attention_BGRS).key_mass(attention_BGRS, keys)


def attention_distribution(attention_BGRS: Tensor, keys: RowKeys) -> tuple[Tensor, Tensor]:
    """Renormalise head-averaged attention over the included keys.

        p[i] = a[i] / Z,   Z = sum of a over the included keys

    Heads are averaged first and the average is renormalised. The other order gives another distribution.

    Args:
        attention_BGRS: Head-averaged attention, float32.
        keys: Keys that the distribution is made of.

    Returns:
        (p of the same shape, Z [B, G, R]). A row without mass on its keys gives p = 0 and Z = 0. No gradient.

    Source: RAL paper (arXiv 2602.04884) eq. (2).
    """
    return choose_formulas(attention_BGRS).distribution(attention_BGRS, keys)
