"""Weights that turn one value per token into one loss, with denominators of the whole optimizer step.

The denominators are counted over all micro-batches and ranks before the first pass. The weighted sums of micro-batches
therefore add up to the loss of the whole batch, however the batch is split. A mean over each micro-batch would not.
"""

from torch import Tensor


def token_weights(
    mask_BGR: Tensor, mode: str, *, num_tokens: int, num_sequences: int, max_response_length: int
) -> Tensor:
    """Return the weight of every token, so that a loss is sum(weight * value).

        token_mean          1 / num_tokens                                  DAPO: every token counts the same
        sequence_mean       1 / (num_sequences * length of the response)    GRPO: every response counts the same
        sequence_sum_norm   1 / (num_sequences * max_response_length)       Dr. GRPO: a sum over a constant

    Args:
        mask_BGR: bool, True at the tokens that count. Either all tokens of a response count or none does.
        mode: one of the three names above.
        num_tokens, num_sequences: tokens and responses that count in the whole optimizer step over all ranks, >= 1.
        max_response_length: limit of the generation, >= 1, not the length of the longest sampled response.

    Returns:
        [B, G, R] float64, 0 where the mask is False. No gradient.

    Raises:
        ValueError: unknown mode.

    Source: DAPO (arXiv 2503.14476) eq. (12), GRPO (arXiv 2402.03300) eq. (3), Dr. GRPO (arXiv 2503.20783) section 3.2.
    """
    mask = mask_BGR.double()
    if mode == "token_mean":
        return mask / num_tokens
    if mode == "sequence_mean":
        return mask / (num_sequences * mask.sum(dim=-1, keepdim=True).clamp(min=1.0))
    if mode == "sequence_sum_norm":
        return mask / (num_sequences * max_response_length)
    raise ValueError(f"aggregation mode '{mode}' is not one of token_mean, sequence_mean, sequence_sum_norm")
