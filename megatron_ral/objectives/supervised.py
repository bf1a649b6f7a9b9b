"""Supervised training: mean cross-entropy of the reference responses."""

from torch import Tensor

from megatron_ral.objectives.base import Metrics, Objective, Term, TokenOutputs
from megatron_ral.types import SftBatch


class CrossEntropyTerm(Term):
    """Mean negative log-likelihood of the response tokens over the whole optimizer step."""

    name = "cross_entropy"
    has_token_loss = True

    def token_loss(self, outputs: TokenOutputs, batch: SftBatch) -> tuple[Tensor, Metrics]:
        mask, num_tokens = batch.loss_mask, batch.totals.num_tokens
        loss = -(outputs.logprobs * mask).sum() / num_tokens
        return loss, {"entropy": (outputs.entropy.detach() * mask).sum() / num_tokens}


def supervised_objective() -> Objective:
    """Return the objective of supervised training."""
    return Objective((CrossEntropyTerm(),), total_tag="loss")
