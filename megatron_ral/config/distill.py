"""Sections of a run that learns from a teacher."""

from typing import Annotated, Literal

from annotated_types import Gt, Lt
from pydantic.dataclasses import dataclass

from megatron_ral.config.fields import STRICT, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat


@dataclass(frozen=True, config=STRICT)
class TeacherConfig:
    """A frozen model of the same family to learn from. It runs on the policy's ranks in a layout of its own."""

    path: str = ""
    """Folder of the teacher (Hugging Face or Megatron); empty for no teacher. Its tokenizer and its picture patches
    must be those of `model.path`."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the teacher's parameters and activations."""
    tensor_model_parallel_size: NonNegativeInt = 0
    """Tensor-parallel ranks of the teacher; 0 for as many as the policy has."""
    pipeline_model_parallel_size: NonNegativeInt = 0
    """Pipeline stages of the teacher; 0 for as many as the policy has."""
    sequence_parallel: bool = False
    """Sequence parallelism of the teacher, as `parallel.sequence_parallel`."""
    cpu_offload: bool = False
    """Storage of the teacher's shards in host memory between uses. Without an accelerator they always are there."""


@dataclass(frozen=True, config=STRICT)
class DistillConfig:
    """Distillation from section `teacher` on the student's own rollouts (RAL paper, equations 5 and 6): token_coef *
    divergence of token distributions + attention_coef * divergence of attention distributions."""

    token_coef: NonNegativeFloat = 1.0
    """Weight of the token divergence (mu in the paper, which reports no value). 0 logs it without training on it."""
    token_divergence: Literal["reverse_kl", "forward_kl", "jsd", "cross_entropy"] = "reverse_kl"
    """Divergence of token distributions. reverse_kl: KL(student || teacher), as in the paper. forward_kl:
    KL(teacher || student). jsd: the generalised Jensen-Shannon divergence with `beta`. cross_entropy: negative
    log-likelihood of the response; with teacher_rollouts = 1 this is supervised training on the teacher's outputs."""
    beta: Annotated[float, Gt(0), Lt(1)] = 0.5
    """Weight of the teacher in the mixture of jsd. Near 0 the divergence approaches forward_kl times beta, near 1
    reverse_kl times 1 - beta."""
    temperature: PositiveFloat = 1.0
    """Temperature of both token distributions, softmax(logits / temperature), independent of rollout.temperature."""
    top_tokens: NonNegativeInt = 0
    """Number of the teacher's most likely tokens that are compared one by one, with all other tokens as one class; 0
    for the whole vocabulary."""
    attention_coef: NonNegativeFloat = 1.0
    """Weight of the attention divergence (gamma_attn in the paper: 0.05, 0.5 or 1). 0 logs it without training on it,
    in the last layer alone where attention_layers is empty."""
    attention_layers: tuple[int, ...] = ()
    """Student layers whose attention is compared, 0-based, negative from the last; empty for all. Each is paired with
    the teacher's layer at the same relative depth, and the term is their mean. The paper: [-1]. The teacher's rows of
    one optimizer step take 4 bytes x layers x response tokens x keys of host memory."""
    attention_row: Literal["token", "predictor"] = "token"
    """Compared query positions, as `loss.attention_row`."""
    attention_exclude_self: bool = True
    """Exclusion of the query's own token, as `loss.attention_exclude_self`."""
    attention_keys: Literal["all", "visual", "prompt"] = "all"
    """Keys of the attention distribution, as `loss.attention_keys`."""
    attention_divergence: Literal["jsd", "forward_kl", "reverse_kl"] = "jsd"
    """Divergence of attention distributions, as `loss.attention_divergence` with the teacher as the target."""
    attention_normalizer: Literal["token_mean", "sequence_sum"] = "token_mean"
    """Denominator of the sum over rows, as `loss.attention_normalizer`."""
    attention_row_cap: NonNegativeFloat = 0.0
    """Divergence of a row above which it gives no gradient, as `loss.attention_row_cap`; 0 for none."""
    attention_rows: Literal["teacher", "shuffled"] = "teacher"
    """Attention rows to learn from. shuffled: a control in which the teacher's mass on the visual tokens of each
    picture is permuted at random."""
    teacher_rollouts: Fraction = 0.0
    """Share of prompts that the teacher answers instead of the student. 0: on-policy. 1: off-policy. Between: the
    mixture of GKD (arXiv 2306.13649, where it is 1 - lambda). Possible only with loss.policy_coef = 0."""
