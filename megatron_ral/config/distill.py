"""The sections of a configuration that concern a teacher."""

from typing import Annotated, Literal

from annotated_types import Gt, Lt
from pydantic.dataclasses import dataclass

from megatron_ral.config.fields import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, STRICT


@dataclass(frozen=True, config=STRICT)
class TeacherConfig:
    """A frozen model of the same family to learn from, on the same ranks as the policy, in a layout of its own."""

    path: str = ""
    """Hugging Face folder; empty: no teacher. Its tokenizer and its patches of a picture must be those of model.path."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of its parameters and activations."""
    tensor_model_parallel_size: NonNegativeInt = 0
    """0: as section `parallel`."""
    pipeline_model_parallel_size: NonNegativeInt = 0
    """0: as section `parallel`."""
    sequence_parallel: bool = False
    """As parallel.sequence_parallel."""
    cpu_offload: bool = False
    """Keep its shards in the host's memory between uses (without an accelerator they always are)."""


@dataclass(frozen=True, config=STRICT)
class DistillConfig:
    """Distillation from section `teacher`: token_coef * divergence of tokens + attention_coef * divergence of attention,
    on the student's own rollouts (RAL paper, eq. 5 and 6)."""

    token_coef: NonNegativeFloat = 1.0
    """mu of the paper, which gives no value. 0: only measured."""
    token_divergence: Literal["reverse_kl", "forward_kl", "jsd", "cross_entropy"] = "reverse_kl"
    """reverse_kl: KL(student || teacher), the paper. forward_kl: KL(teacher || student). jsd: the generalised one, with
    `beta`. cross_entropy: -log-likelihood of the response; with teacher_rollouts = 1 supervised training on the teacher's
    outputs."""
    beta: Annotated[float, Gt(0), Lt(1)] = 0.5
    """jsd: weight of the teacher in the mixture; near 0 like forward_kl times beta, near 1 like reverse_kl times
    1 - beta."""
    temperature: PositiveFloat = 1.0
    """Both distributions are softmax(logits / temperature), whatever rollout.temperature is."""
    top_tokens: NonNegativeInt = 0
    """Compare the teacher's so many most likely tokens, all others as one; 0: the whole vocabulary."""
    attention_coef: NonNegativeFloat = 1.0
    """gamma_attn of the paper (0.05, 0.5 or 1 there). 0: only measured, and where attention_layers is empty in the last
    layer alone."""
    attention_layers: tuple[int, ...] = ()
    """Layers of the student, 0-based, negative ones from the last; each is compared with the teacher's at the same
    relative depth, and the term is their mean. Empty: all. The paper: [-1]. The teacher's rows of one optimizer step wait
    in the host's memory: 4 bytes x layers x response tokens x keys."""
    attention_row: Literal["token", "predictor"] = "token"
    """As loss.attention_row."""
    attention_exclude_self: bool = True
    """As loss.attention_exclude_self."""
    attention_keys: Literal["all", "visual", "prompt"] = "all"
    """As loss.attention_keys."""
    attention_divergence: Literal["jsd", "forward_kl", "reverse_kl"] = "jsd"
    """As loss.attention_divergence, the teacher in place of the target."""
    attention_normalizer: Literal["token_mean", "sequence_sum"] = "token_mean"
    """As loss.attention_normalizer."""
    attention_row_cap: NonNegativeFloat = 0.0
    """As loss.attention_row_cap."""
    attention_rows: Literal["teacher", "shuffled"] = "teacher"
    """shuffled: a control, in which the teacher's mass on each picture's visual tokens is put in a random order."""
    teacher_rollouts: Fraction = 0.0
    """Share of prompts that the teacher answers in place of the student. 0: on-policy; 1: off-policy; between: the
    mixture of GKD (arXiv 2306.13649, 1 - lambda there). Only with loss.policy_coef = 0."""
