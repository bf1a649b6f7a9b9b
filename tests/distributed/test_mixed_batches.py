"""Text-only, image and video batches, prompts of unequal lengths: no hang, and equal to one process; both families."""

import dataclasses

import pytest
import torch

from megatron_ral.config.sections import ModelConfig
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.models.shape import read_shape
from megatron_ral.objectives.supervised import supervised_objective
from megatron_ral.parallel.process_groups import start_groups, stop_groups
from megatron_ral.rollout.assemble import global_totals
from megatron_ral.rollout.collect import collect_rollout
from megatron_ral.rollout.lengths import MicroBatchSettings
from megatron_ral.rollout.native_sampler import NativeSampler
from megatron_ral.rollout.settings import RolloutSettings
from megatron_ral.training.build import build_policy
from megatron_ral.training.step import supervised_batches
from megatron_ral.types import FramePictures, Sample, SftBatch
from megatron_ral.weights.huggingface import HuggingFaceWeights
from tests.distributed.cases import full_weights, make_config
from tests.distributed.runner import run_ranks
from tests.unit.test_data import png


def samples() -> list[Sample]:
    """Eight samples; with two data-parallel ranks the second rank gets text alone."""
    images = [((56, 56),), ((84, 28), (56, 28)), (), ()] + [()] * 4
    clip = FramePictures(tuple(png(56, 84) for _ in range(4)), fps=1.0)
    return [
        Sample(
            key=f"k{index}",
            shard="s",
            problem="Which digit is red? " + "Which colour is cell 2? " * (index % 3),
            solution=f"<answer>{index}</answer>",
            process="<think>red</think>" * (1 + index % 2),
            problem_type="",
            images=tuple(png(*size) for size in sizes),
            target_boxes=(),
            videos=(clip,) if index == 3 else (),
        )
        for index, sizes in enumerate(images)
    ]


def supervised_step(path: str, tensor: int, pipeline: int, micro_batches: MicroBatchSettings):
    """Two optimizer steps with a trainable tower, sequence parallel where there are tensor ranks."""
    config = make_config(path, tensor=tensor, pipeline=pipeline, sequence_parallel=True)
    config = dataclasses.replace(config, model=ModelConfig(path=path, dtype="float32", train_vision=True))
    process_groups = start_groups(tensor_size=tensor, pipeline_size=pipeline, seed=0)
    policy = build_policy(config, read_shape(path), process_groups)
    processor = PromptProcessor(path, 128)
    prompts = [processor(sample) for sample in samples()]
    share = len(prompts) // process_groups.layout.data_size
    mine = prompts[process_groups.layout.data_rank * share : (process_groups.layout.data_rank + 1) * share]
    batches = supervised_batches(mine, processor.pad_token_id, micro_batches, process_groups)
    totals = global_totals([batch.response_lengths for batch in batches], 7, process_groups)
    losses, norms = [], []
    for _ in range(2):
        losses.append(
            policy.forward_backward([SftBatch(batch, totals) for batch in batches], supervised_objective())["loss"]
        )
        norms.append(policy.step().grad_norm)
    weights = full_weights(policy)
    stop_groups()
    return losses, norms, weights


LAYOUTS = (
    (1, 1, 1, (1,)),
    (2, 1, 1, (2,)),
    (2, 1, 1, (4, 60)),
    (4, 1, 2, (4,)),
    (4, 1, 2, (4, 40)),
    (4, 2, 1, (2,)),
    (4, 2, 1, (2, 100)),
)
"""World size, tensor ranks, pipeline stages, and groups and tokens of a micro-batch."""


@pytest.mark.parametrize("family", ["tiny", "qwen3", "internvl", "qwen3_5"])
def test_a_rank_without_images_neither_hangs_nor_changes_the_step(material, family):
    path = str(material[family])
    losses, norms, weights = run_ranks(1, supervised_step, path, 1, 1, MicroBatchSettings(8))[0]
    source = HuggingFaceWeights(path)
    start = {name: source[name] for name in weights if name in source}
    assert losses[1] < losses[0]
    for world, tensor, pipeline, micro in LAYOUTS:
        ours = run_ranks(world, supervised_step, path, tensor, pipeline, MicroBatchSettings(*micro))[-1]
        assert torch.allclose(torch.tensor(ours[0]), torch.tensor(losses), rtol=1e-5), (world, tensor, pipeline, micro)
        assert torch.allclose(torch.tensor(ours[1]), torch.tensor(norms), rtol=1e-5)
        for name, wanted in weights.items():
            assert (ours[2][name] - wanted).norm() <= 1e-5 * wanted.norm(), (name, world, tensor, pipeline, micro)
            change = weights[name] - start[name]  # a wrong part of a gradient would hide in the size of the weights
            assert (ours[2][name] - wanted).norm() <= 2e-3 * change.norm() + 1e-7, (name, world, tensor, pipeline)


def rollout_of_mixed_prompts(path: str, tensor: int, pipeline: int):
    """Sequence parallel where there are tensor ranks: it is on in the training pass and off while generating."""
    config = make_config(path, tensor=tensor, pipeline=pipeline)
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, sequence_parallel=True))
    process_groups = start_groups(tensor_size=tensor, pipeline_size=pipeline, seed=0)
    policy = build_policy(config, read_shape(path), process_groups)
    processor = PromptProcessor(path, 128)
    share = len(samples()) // process_groups.layout.data_size
    start = process_groups.layout.data_rank * share
    prompts = [processor(sample) for sample in samples()[start : start + share]]
    settings = RolloutSettings.from_config(config)
    rollout = collect_rollout(
        policy, NativeSampler(policy), prompts, processor, settings, 0, MicroBatchSettings(2)
    ).batches
    widths = [scored.groups.prompts.input_ids.shape[1] for scored in rollout]
    assert len(set(widths)) > 1, widths  # micro-batches of different shapes in one pass, also between stages
    old = policy.forward([scored.groups for scored in rollout], [3])
    stop_groups()
    result = {}
    for scored, output in zip(rollout, old):
        for b, key in enumerate(scored.groups.prompts.identities):
            for g in range(scored.groups.response_ids.shape[1]):
                n = int(scored.groups.response_lengths[b, g])
                result[key, g] = (
                    scored.groups.response_ids[b, g, :n].tolist(),
                    scored.rollout_logprobs[b, g, :n],
                    output.tokens.logprobs[b, g, :n] if output.tokens else None,
                )
    return result


@pytest.mark.parametrize(
    "family, layouts",
    [
        ("tiny", [(2, 1, 1)]),
        ("qwen3", [(1, 1, 1), (2, 2, 1), (2, 1, 2)]),
        ("internvl", [(2, 2, 1)]),
        ("qwen3_5", [(2, 2, 1), (2, 1, 2)]),
    ],
)
def test_rollouts_of_mixed_prompts_do_not_depend_on_ranks_or_padding(material, family, layouts):
    path = str(material[family])
    alone = run_ranks(1, rollout_of_mixed_prompts, path, 1, 1)[0]
    assert len(alone) == 24
    for _, rollout, training in alone.values():
        assert torch.allclose(rollout, training, atol=1e-4)
    for world, tensor, pipeline in layouts:
        seen, parts = {}, run_ranks(world, rollout_of_mixed_prompts, path, tensor, pipeline)
        assert tensor * pipeline > 1 or world == 1 or not set(parts[0]) & set(parts[1])
        for part in parts:
            for key, (ids, _, training) in part.items():
                assert ids == alone[key][0]
                if training is not None:
                    assert torch.allclose(training, alone[key][2], atol=1e-5)
                    seen[key] = True
        assert set(seen) == set(alone)
