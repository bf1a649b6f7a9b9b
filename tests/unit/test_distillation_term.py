"""Distillation around its divergences: layers matched by depth, the shuffled control, settings without effect, memory.

The arithmetic of the study is tested here too.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_ral.config.distill import DistillConfig, TeacherConfig
from megatron_ral.config.loss import LossConfig
from megatron_ral.config.rules import setting_warnings
from megatron_ral.config.sections import ModelConfig, RunConfig, TrainConfig
from megatron_ral.engine.teacher import TeacherEngine
from megatron_ral.models.shape import read_shape
from megatron_ral.objectives.distillation import shuffled_visual_columns
from megatron_ral.parallel.rank_layout import RankLayout
from megatron_ral.planning.memory import GIB, frozen_bytes, policy_bytes
from megatron_ral.planning.parameters import stage_parameters
from tools.distill_study import steps_to

MODELS = Path(__file__).parents[2] / "pretrained_configs" / "models"


@pytest.mark.parametrize(
    "student, teacher, wanted",
    [
        (range(4), range(4), [0, 1, 2, 3]),
        (range(4), range(8), [1, 3, 5, 7]),
        (range(4), range(6), [1, 2, 4, 5]),
        (range(4), range(2), [0, 0, 1, 1]),
        (range(1), range(5), [4]),
        ((3, 7), (3, 7, 11, 15), [7, 15]),  # the layers between have linear attention
    ],
)
def test_layers_are_matched_by_relative_depth(student, teacher, wanted):
    engine = SimpleNamespace(
        shape=SimpleNamespace(softmax_layers=tuple(teacher)),
        student_shape=SimpleNamespace(softmax_layers=tuple(student)),
    )
    assert [TeacherEngine.matching_layer(engine, layer) for layer in student] == wanted


def groups(*masks):
    return SimpleNamespace(
        prompts=SimpleNamespace(
            identities=[f"key {index}" for index in range(len(masks))], visual_mask=torch.tensor(masks)
        )
    )


def test_shuffled_rows_keep_the_mass_on_the_picture_and_lose_the_place():
    masks = [[False, True, True, True, True, False], [False] * 6]
    policy = torch.rand(2, 3, 5, 9)
    shuffled = shuffled_visual_columns(policy, groups(*masks), 0, 7)
    assert torch.equal(shuffled[1], policy[1]), "no picture, nothing to shuffle"
    columns = [0, 5, 6, 7, 8]
    assert torch.equal(shuffled[0][..., columns], policy[0][..., columns])
    assert torch.equal(shuffled[0][..., 1:5].sort(-1).values, policy[0][..., 1:5].sort(-1).values)
    assert not torch.equal(shuffled[0], policy[0])
    # one order for all rows of a prompt, another one in another rollout
    order = [int((policy[0, 0, 0, 1:5] == value).nonzero()) for value in shuffled[0, 0, 0, 1:5]]
    assert torch.equal(shuffled[0][..., 1:5], policy[0][..., 1:5][..., order])
    others = [shuffled_visual_columns(policy, groups(*masks), 0, step) for step in range(8)]
    assert len({str(other[0, 0, 0].tolist()) for other in others}) > 3
    assert torch.equal(others[7], shuffled)


DISTILLED_ONLY = LossConfig(attention_coef=0.0, policy_coef=0.0)


def warnings(*, path="teacher", loss=DISTILLED_ONLY, **settings) -> str:
    return "\n".join(
        setting_warnings(
            RunConfig(
                model=ModelConfig(path="m"),
                teacher=TeacherConfig(path=path),
                loss=loss,
                distill=DistillConfig(**settings),
            )
        )
    )


def test_settings_without_effect_are_named():
    assert not warnings() and not warnings(token_divergence="jsd", beta=0.3)
    assert "distill.beta = 0.3 has no effect" in warnings(beta=0.3)
    assert "distill.top_tokens = 5 has no effect" in warnings(
        token_divergence="cross_entropy", teacher_rollouts=1.0, top_tokens=5
    )
    assert "only logged" in warnings(token_coef=0.0, attention_coef=0.0)
    assert "distill.top_tokens = 5 has no effect without teacher.path" in warnings(path="", top_tokens=5)
    assert "rewards give no gradient" in warnings(path="")
    assert "rewards" not in warnings(path="", loss=LossConfig(attention_coef=0.0))
    assert "rewards" not in warnings(path="", loss=LossConfig(policy_coef=0.0))
    assert "loss.clip_low = 0.1 has no effect" in warnings(
        loss=LossConfig(attention_coef=0.0, policy_coef=0.0, clip_low=0.1)
    )
    sft = RunConfig(train=TrainConfig(algorithm="sft"), teacher=TeacherConfig(path="t"))
    assert setting_warnings(sft) == ["teacher.path = t has no effect with train.algorithm = sft"]


def test_memory_of_a_teacher_at_real_size():
    """32 billion parameters in bfloat16 over tensor 8: an eighth of each weight, between uses and in a pass."""
    teacher, student = read_shape(str(MODELS / "qwen2.5-vl-32b")), read_shape(str(MODELS / "qwen2.5-vl-7b"))
    [stage] = stage_parameters(teacher, RankLayout(0, 8, 8, 1))
    one_node = RankLayout(0, 8, 8, 1)
    held = frozen_bytes(teacher, one_node, "bfloat16")
    assert held.shard == 2 * stage.per_tensor_rank and 8 < held.shard / GIB < 10
    assert held.gathered == 0, "one data-parallel rank holds its stage whole"
    assert frozen_bytes(teacher, one_node, "bfloat16", moved=True).gathered == held.shard
    sharded = frozen_bytes(teacher, RankLayout(0, 64, 8, 1), "bfloat16")
    assert sharded.gathered == held.shard and 7.9 < held.shard / sharded.shard <= 8
    data_parallel, visual = RankLayout(0, 8, 1, 1), 676_550_144
    policy = policy_bytes(student, data_parallel, "bfloat16", train_vision=False)
    assert policy.shard == pytest.approx((2 * 8_292_166_656 + 16 * (8_292_166_656 - visual)) / 8, rel=0.001)
    assert policy.gathered == pytest.approx(2 * 8_292_166_656, rel=0.001)
    assert policy_bytes(student, data_parallel, "bfloat16", train_vision=True).shard == pytest.approx(
        18 * 8_292_166_656 / 8, rel=0.001
    )


def test_steps_to_a_goal():
    points = [(0, 0.2), (5, 0.6), (10, 1.0), (15, 0.5)]
    assert steps_to(0.8, points) == pytest.approx(7.5) and steps_to(0.1, points) == 0 and steps_to(0.6, points) == 5
    assert steps_to(1.1, points) == float("inf")
