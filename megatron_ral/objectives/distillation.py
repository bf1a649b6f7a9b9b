"""Distillation from a teacher that reads the student's own rollout: its tokens and its attention.

    L_distill = token_coef * D_tokens(student, teacher) + attention_coef * D_attention(student, teacher)

Both are sums over response tokens divided by those of the whole optimizer step, the attention part a mean over layers,
without advantages. Source: RAL paper (arXiv 2602.04884) eq. (5), (6); GKD (arXiv 2306.13649).
"""

from dataclasses import dataclass
from typing import Any, Optional, Protocol

import torch
from torch import Tensor

from megatron_ral.attention.layer_rows import AttentionRows
from megatron_ral.attention.mass import target_share
from megatron_ral.attention.types import QueryPosition, RowKeys
from megatron_ral.config.distill import DistillConfig
from megatron_ral.functional.distillation_loss import TokenDivergence
from megatron_ral.functional.sampling import uniform_stream
from megatron_ral.objectives.base import Metrics, Term, TokenOutputs
from megatron_ral.parallel.vocab import vocab_parallel_argmax, vocab_parallel_logprobs
from megatron_ral.parallel.vocab_distillation import (
    vocab_parallel_divergence,
    vocab_parallel_top_divergence,
    vocab_parallel_top_tokens,
)
from megatron_ral.types import GroupBatch, RlBatch


class TeacherLmHead(Protocol):
    """The teacher's LM head on this rank's columns of the vocabulary."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return this rank's columns of the teacher's logits."""
        ...

    def mask(self, logits: Tensor) -> Tensor:
        """Return logits with the columns that only one of the models has set to -1e9."""
        ...


@dataclass(frozen=True)
class TokenDistillationTerm(Term):
    """Divergence of the student's token distributions from the teacher's, at `token_coef`."""

    settings: DistillConfig
    process_group: Any
    """Tensor-parallel process group of the student."""
    head: Optional[TeacherLmHead] = None
    """LM head of the teacher on the student's last stage. None elsewhere."""

    name = "distill_tokens"
    has_token_loss = True

    @property
    def is_active(self) -> bool:
        return self.settings.token_coef > 0

    def token_loss(self, outputs: TokenOutputs, batch: RlBatch) -> tuple[Tensor, Metrics]:
        """Return (loss, metrics) on the student's last stage. Teacher logits live until its backward pass ends."""
        settings, num_tokens = self.settings, batch.totals.num_tokens
        assert outputs.logits is not None and outputs.packing is not None  # it is a training pass
        mask, targets = map(outputs.packing.pack, (batch.loss_mask, batch.groups.response_ids))
        if settings.token_divergence == "cross_entropy":
            logprobs, _ = vocab_parallel_logprobs(outputs.logits, targets, self.process_group)
            loss = -(logprobs * mask).sum() / num_tokens
            return settings.token_coef * loss, {"distill/cross_entropy": loss.detach()}
        assert self.head is not None and batch.teacher.hidden is not None  # this is the last stage
        student, teacher = self.head.mask(outputs.logits), self.head.logits(batch.teacher.hidden)
        measure = TokenDivergence(settings.token_divergence, settings.beta, settings.temperature)
        group = self.process_group
        with torch.set_grad_enabled(settings.token_coef > 0):
            if settings.top_tokens:
                top = vocab_parallel_top_tokens(teacher, settings.top_tokens, settings.temperature, group)
                divergence = vocab_parallel_top_divergence(student, top, measure, group)
            else:
                divergence = vocab_parallel_divergence(student, teacher, measure, group)
        agree = vocab_parallel_argmax(student, group) == vocab_parallel_argmax(teacher, group)
        loss = (divergence * mask).sum() / num_tokens
        return settings.token_coef * loss, {
            "distill/token_divergence": loss.detach(),
            "distill/agreement": (agree & mask).sum() / num_tokens,
        }


@dataclass(frozen=True)
class AttentionDistillationTerm(Term):
    """Divergence of the student's attention distributions from the teacher's, at `attention_coef`, mean over layers."""

    settings: DistillConfig
    layers: frozenset[int]
    """0-based layers of the student."""

    name = "distill_attention"

    @property
    def recorded_layers(self) -> frozenset[int]:
        return self.layers

    @property
    def is_active(self) -> bool:
        return self.settings.attention_coef > 0

    @property
    def position(self) -> QueryPosition:
        """Query position of the compared rows."""
        return QueryPosition(self.settings.attention_row)

    def store(self, rows: AttentionRows, groups: GroupBatch) -> Tensor:
        """Return the teacher's attention distributions [B, G, R, S] over the keys that the student's are made of."""
        return rows.distribution(self._keys(rows, groups))

    def attention_loss(self, layer: int, rows: AttentionRows, batch: RlBatch) -> tuple[Optional[Tensor], Metrics]:
        settings, mask, totals = self.settings, batch.loss_mask, batch.totals
        rows, target = rows.at(self.position), batch.teacher.attention[layer]
        with torch.set_grad_enabled(self.is_active and torch.is_grad_enabled()):
            divergence = rows.divergence(target, self._keys(rows, batch.groups), settings.attention_divergence)
        capped = divergence.clamp(max=settings.attention_row_cap) if settings.attention_row_cap else divergence
        rows_in_step = totals.num_tokens if settings.attention_normalizer == "token_mean" else totals.num_sequences
        loss = settings.attention_coef * (capped * mask).sum() / (rows_in_step * len(self.layers))
        metrics = {
            "loss/distill_attention": loss.detach(),
            "distill/attention_divergence:sum": (divergence.detach() * mask).sum(),
            "distill/attention_divergence:count": mask.sum(),
        }
        prompts = batch.groups.prompts
        annotated = mask & prompts.is_annotated[:, None, None]
        for name, distribution in (("student", rows.distribution()), ("teacher", target)):
            share = target_share(distribution, prompts.visual_mask, prompts.target_mask)
            metrics[f"distill/{name}_target_mass:sum"] = (share * annotated).sum()
            metrics[f"distill/{name}_target_mass:count"] = annotated.sum()
        return (loss if loss.requires_grad else None), metrics

    def _keys(self, rows: AttentionRows, groups: GroupBatch) -> RowKeys:
        return rows.named_keys(self.settings.attention_keys, groups.prompts, self.settings.attention_exclude_self)


def shuffled_visual_columns(distribution_BGRS: Tensor, groups: GroupBatch, *identity: object) -> Tensor:
    """Return the teacher's rows with their mass on visual tokens in a random order, one order for each prompt.

    This is a control. How much and how sharply the teacher looks at the picture is preserved; where it looks is lost.

    Args:
        distribution_BGRS: Rows of the teacher.
        groups: Groups of the rows.
        identity: Key of the random stream. The prompt's identity is added.
    """
    result = distribution_BGRS.clone()
    for b, (key, mask) in enumerate(zip(groups.prompts.identities, groups.prompts.visual_mask)):
        columns = mask.nonzero()[:, 0].to(distribution_BGRS.device)
        order = uniform_stream(len(columns), "shuffled teacher", *identity, key).argsort().to(distribution_BGRS.device)
        result[b, ..., columns] = distribution_BGRS[b][..., columns[order]]
    return result
