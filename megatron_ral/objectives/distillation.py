"""What a student learns from a teacher that reads the student's own rollout: its tokens and its attention.

    L_distill = token_coef * D_tokens(student, teacher) + attention_coef * D_attention(student, teacher)

both sums over response tokens divided by those of the whole optimizer step, the attention part a mean over layers, without
advantages. Source: RAL paper (arXiv 2602.04884) eq. (5), (6); GKD (arXiv 2306.13649).
"""

from dataclasses import dataclass
from typing import Mapping, Optional, Protocol

import torch
from torch import Tensor

from megatron_ral.config.distill import DistillConfig
from megatron_ral.attention.layer_rows import AttentionRows
from megatron_ral.objectives.base import TokenOutputs
from megatron_ral.functional.distillation_loss import TokenDivergence
from megatron_ral.functional.sampling import uniform_stream
from megatron_ral.parallel.vocab_distillation import (
    vocab_parallel_divergence,
    vocab_parallel_top_divergence,
    vocab_parallel_top_tokens,
)
from megatron_ral.parallel.vocab import vocab_parallel_argmax, vocab_parallel_logprobs
from megatron_ral.objectives.attention import row_keys
from megatron_ral.types import GroupBatch, TrainBatch

Metrics = Mapping[str, Tensor]


class Head(Protocol):
    """The teacher's LM head on this rank's columns."""

    def logits(self, hidden: Tensor) -> Tensor: ...

    def mask(self, logits: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class DistillTerm:
    """The two losses at their coefficients.

    Args:
        settings: which.
        layers: 0-based layers of the student whose attention is compared.
        tensor_group: the student's tensor-parallel group.
        head: on the student's last stage; None elsewhere.
    """

    settings: DistillConfig
    layers: frozenset[int]
    tensor_group: object
    head: Optional[Head] = None

    @property
    def row_kind(self) -> str:
        return self.settings.attention_row

    def keep(self, rows: AttentionRows, groups: GroupBatch) -> Tensor:
        """The teacher's attention policies [B, G, R, S] over the keys that the student's will be made of."""
        return rows.policy(self._keys(rows, groups))

    def token_loss(self, outputs: TokenOutputs, batch: TrainBatch) -> tuple[Tensor, Metrics]:
        """Loss on the student's last stage; the teacher's logits live while it is formed and until its backward pass."""
        settings, mask, num_tokens = self.settings, batch.loss_mask, batch.totals.num_tokens
        if settings.token_divergence == "cross_entropy":
            logprobs, _ = vocab_parallel_logprobs(outputs.logits, batch.groups.response_ids, self.tensor_group)
            loss = -(logprobs * mask).sum() / num_tokens
            return settings.token_coef * loss, {"distill/cross_entropy": loss.detach()}
        student, teacher = self.head.mask(outputs.logits), self.head.logits(batch.teacher_hidden)
        measure = TokenDivergence(settings.token_divergence, settings.beta, settings.temperature)
        with torch.set_grad_enabled(settings.token_coef > 0):
            if settings.top_tokens:
                top = vocab_parallel_top_tokens(teacher, settings.top_tokens, settings.temperature, self.tensor_group)
                divergence = vocab_parallel_top_divergence(student, top, measure, self.tensor_group)
            else:
                divergence = vocab_parallel_divergence(student, teacher, measure, self.tensor_group)
        agree = vocab_parallel_argmax(student, self.tensor_group) == vocab_parallel_argmax(teacher, self.tensor_group)
        loss = (divergence * mask).sum() / num_tokens
        return settings.token_coef * loss, {
            "distill/token_divergence": loss.detach(),
            "distill/agreement": (agree & mask).sum() / num_tokens,
        }

    def attention_loss(self, layer: int, rows: AttentionRows, batch: TrainBatch) -> tuple[Optional[Tensor], Metrics]:
        """Loss of one layer on the stage that owns it."""
        settings, mask, totals = self.settings, batch.loss_mask, batch.totals
        rows, target = rows.of_kind(self.row_kind), batch.teacher_attention[layer]
        with torch.set_grad_enabled(settings.attention_coef > 0 and torch.is_grad_enabled()):
            divergence = rows.divergence(target, self._keys(rows, batch.groups), settings.attention_divergence)
        capped = divergence.clamp(max=settings.attention_row_cap) if settings.attention_row_cap else divergence
        rows_in_step = totals.num_tokens if settings.attention_normalizer == "token_mean" else totals.num_sequences
        loss = settings.attention_coef * (capped * mask).sum() / (rows_in_step * len(self.layers))
        metrics = {
            "loss/distill_attention": loss.detach(),
            "distill/attention_divergence:sum": (divergence.detach() * mask).sum(),
            "distill/attention_divergence:count": mask.sum(),
        }
        annotated = mask & batch.groups.prompts.target_mask.any(dim=-1)[:, None, None]
        for name, policy in (("student", rows.policy()), ("teacher", target)):
            metrics[f"distill/{name}_target_mass:sum"] = (_target_share(policy, batch.groups) * annotated).sum()
            metrics[f"distill/{name}_target_mass:count"] = annotated.sum()
        return (loss if loss.requires_grad else None), metrics

    def _keys(self, rows: AttentionRows, groups: GroupBatch):
        return row_keys(rows, groups.prompts, self.settings.attention_keys, self.settings.attention_exclude_self)


def _target_share(policy_BGRS: Tensor, groups: GroupBatch) -> Tensor:
    """[B, G, R]: mass on the annotated visual tokens / mass on all visual tokens."""
    prompts = groups.prompts
    P = prompts.input_ids.shape[1]
    visual, target = (
        torch.einsum("bgrp,bp->bgr", policy_BGRS[..., :P], mask.to(policy_BGRS.dtype))
        for mask in (prompts.visual_mask, prompts.target_mask)
    )
    return target / visual.clamp(min=torch.finfo(visual.dtype).tiny)


def shuffled_visual_columns(policy_BGRS: Tensor, groups: GroupBatch, *identity: object) -> Tensor:
    """A control: the teacher's rows with their mass on visual tokens in another order, one order for each prompt. What is
    left is how much, and how sharply, the teacher looks at the picture; where is lost."""
    result = policy_BGRS.clone()
    for b, (key, mask) in enumerate(zip(groups.prompts.identities, groups.prompts.visual_mask)):
        columns = mask.nonzero()[:, 0].to(policy_BGRS.device)
        order = uniform_stream(len(columns), "shuffled teacher", *identity, key).argsort().to(policy_BGRS.device)
        result[b, ..., columns] = policy_BGRS[b][..., columns[order]]
    return result
