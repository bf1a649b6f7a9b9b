"""A batch as JSON and tensors, and back."""

import dataclasses
import json

import torch

from megatron_ral.attention.group_layout import AttentionRecord
from megatron_ral.data.loader import open_sources
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.evaluation.prompt_set import read_prompts
from megatron_ral.training.replay_files import pack, unpack
from megatron_ral.types import GroupBatch, StepTotals, pad_prompts, to_device
from tests.distributed.cases import rl_batch


def same(one, other) -> bool:
    if torch.is_tensor(one):
        return one.dtype == other.dtype and torch.equal(one, other)
    if dataclasses.is_dataclass(one):
        return type(one) is type(other) and all(
            same(getattr(one, item.name), getattr(other, item.name)) for item in dataclasses.fields(one)
        )
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return one == other


def test_packed_and_unpacked_batch_is_the_same_without_its_pictures(material):
    processor = PromptProcessor(str(material["tiny"]), 128)
    prompts = read_prompts(open_sources([(f"{material['data']}/rl-*.tar", 0)], "x")[0].shards, processor, 3)
    assert prompts[0].sample.images and prompts[0].sample.target_boxes
    groups = GroupBatch(
        pad_prompts(prompts, 0),
        torch.randint(0, 9, (3, 2, 4)),
        torch.tensor([[1, 2], [3, 4], [4, 4]]),
        tuple(torch.randn(2, 8) for _ in range(3)),
    )
    record = AttentionRecord(*(torch.randn(3, 2, 4, 1, 2, dtype=torch.bfloat16) for _ in range(4)))
    batch = rl_batch(
        groups,
        StepTotals(18, 6, 4),
        advantages=torch.zeros(3, 2),
        target_attention={1: torch.randn(3, 2), 3: record},
        group_mask=torch.tensor([True, False, True]),
    )
    batch = dataclasses.replace(batch, advantages=torch.tensor([[1.5, -torch.inf]] * 3))
    tensors = {}
    tree = json.loads(json.dumps(pack([batch, batch], tensors)))
    assert "0.groups.prompts.prompts.2.patches.0.pixels" in tensors and "1.target_attention.3.query_BGRnD" in tensors
    [first, second] = unpack(tree, tensors)
    bare = tuple(
        dataclasses.replace(prompt, sample=dataclasses.replace(prompt.sample, images=())) for prompt in prompts
    )
    wanted = dataclasses.replace(
        batch, groups=dataclasses.replace(groups, prompts=dataclasses.replace(groups.prompts, prompts=bare))
    )
    assert same(wanted, first) and same(wanted, second) and not same(batch, first)
    assert to_device(first, torch.device("cpu")).groups.prompts.identities == groups.prompts.identities
