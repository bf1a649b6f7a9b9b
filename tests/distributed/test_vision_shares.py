"""Pictures shared over tensor-parallel ranks: features and gradients of a trained tower are those of one process."""

import dataclasses

import pytest
import torch

from megatron_ral.config.sections import ModelConfig
from megatron_ral.models import vision
from megatron_ral.models.shape import read_shape
from megatron_ral.objectives.supervised import supervised_objective
from megatron_ral.parallel.process_groups import start_groups, stop_groups
from megatron_ral.training.build import build_policy
from megatron_ral.types import GroupBatch, SftBatch, StepTotals, pad_prompts
from tests.distributed.cases import make_config
from tests.distributed.runner import run_ranks
from tests.distributed.test_parity import LENGTH, full_gradients, prompts_and_responses


def features_and_gradients(path: str, tensor: int, sequence_parallel: bool, limit: int) -> dict:
    """Features of a text, pictures and videos; gradients of a step of two micro-batches, the first without pictures."""
    vision.PATCHES_PER_CALL = limit
    config = make_config(path, tensor=tensor, sequence_parallel=sequence_parallel)
    config = dataclasses.replace(config, model=ModelConfig(path=path, dtype="float32", train_vision=True))
    process_groups = start_groups(tensor_size=tensor, pipeline_size=1, seed=0)
    policy = build_policy(config, read_shape(path), process_groups)
    _, prompts, ids, lengths = prompts_and_responses(path)
    totals = StepTotals(int(lengths.sum()), lengths.numel(), LENGTH)
    read: list[int] = []
    tower = policy.stage.visual  # InternVL's reads tiles, of which each is 36 patches
    first = tower.patch_embed if hasattr(tower, "patch_embed") else tower.vision_tower.embeddings.patch_embeddings
    first.register_forward_hook(lambda module, inputs, output: read.append(output.shape[:-1].numel()))
    features = policy.encode_visual(pad_prompts(prompts, 0))
    encoded = sum(read)
    batches = [
        SftBatch(GroupBatch(pad_prompts(prompts[part], 0), ids[part], lengths[part]), totals)
        for part in (slice(0, 1), slice(1, 5))
    ]
    loss = policy.forward_backward(batches, supervised_objective())["loss"]
    gradients = full_gradients(policy)
    norm = policy.step().grad_norm
    stop_groups()
    return {
        "features": features,
        "encoded": encoded,
        "calls": len(read),
        "gradients": gradients,
        "loss": loss,
        "norm": norm,
    }


@pytest.mark.parametrize("family", ["tiny", "qwen3", "internvl", "qwen3_5"])
def test_shares_of_tensor_ranks_give_the_features_and_gradients_of_one_process(material, family):
    path = str(material[family])
    [alone] = run_ranks(1, features_and_gradients, path, 1, False, 32_768)
    assert alone["calls"] == 3  # features, a blank for the text, the pictures
    visual = [name for name in alone["gradients"] if "visual" in name]
    assert visual and any(alone["gradients"][name].abs().max() > 0 for name in visual)
    for tensor, sequence_parallel, limit in ((2, False, 32_768), (2, True, 40)):
        ranks = run_ranks(tensor, features_and_gradients, path, tensor, sequence_parallel, limit)
        for rank in ranks:
            for ours, wanted, first in zip(rank["features"], alone["features"], ranks[0]["features"], strict=True):
                assert torch.allclose(ours, wanted, atol=1e-5) and torch.equal(ours, first)
            assert rank["loss"] == pytest.approx(alone["loss"], rel=1e-5)
            assert rank["norm"] == pytest.approx(alone["norm"], rel=1e-4)
            assert set(rank["gradients"]) == set(alone["gradients"])
            for name, wanted in alone["gradients"].items():
                apart = (rank["gradients"][name] - wanted).norm()
                assert apart <= 1e-4 * wanted.norm() + 1e-7 * alone["norm"], (name, tensor, sequence_parallel)
        encoded = [rank["encoded"] for rank in ranks]
        assert sum(encoded) == alone["encoded"] and max(encoded) <= 0.6 * alone["encoded"]
        assert all(rank["calls"] > alone["calls"] for rank in ranks) == (limit == 40)
