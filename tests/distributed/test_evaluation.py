"""Evaluation: the same held-out set and the same result whatever the layout, and known values where they are known."""

from dataclasses import replace

import pytest
import torch

from megatron_ral.config.sections import RewardConfig, RewardFunctionConfig
from megatron_ral.data.loader import open_sources
from megatron_ral.data.peers import ReplicaPeers
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine.frozen import FrozenEngine
from megatron_ral.engine.settings import EngineSettings
from megatron_ral.evaluation.evaluate import evaluate_prompts
from megatron_ral.evaluation.generation import EvaluationSettings
from megatron_ral.evaluation.probes import view_probes
from megatron_ral.evaluation.prompt_set import PromptSet, read_prompts
from megatron_ral.models.shape import read_shape
from megatron_ral.parallel.process_groups import start_groups, stop_groups
from tests.distributed.cases import make_config
from tests.distributed.runner import run_ranks


def evaluation(path: str, data: str, tensor: int, pipeline: int, limit: int = 21):
    own = {"even": RewardFunctionConfig("tests.distributed.user_rewards:fails_on_odd_digits", 1.0)}
    config = replace(make_config(path, tensor=tensor, pipeline=pipeline), reward=RewardConfig(functions=own))
    # Small batches, so that one of them is in flight while the stages read the next prompts together.
    settings = replace(EvaluationSettings.from_config(config), generation_batch_size=2)
    process_groups = start_groups(tensor_size=tensor, pipeline_size=pipeline, seed=0)
    processor = PromptProcessor(path, 128)
    shards = open_sources([(f"{data}/heldout-*.tar", 0)], "data.eval_shards")[0].shards
    prompts, made = [], []

    def decode(sample):
        made.append(sample.key)
        if sample.key.endswith("4"):
            raise ZeroDivisionError("a decoder of foreign bytes")
        return processor(sample)

    layout = process_groups.layout
    heldout = PromptSet(
        shards,
        decode,
        limit,
        dp_rank=layout.data_rank,
        dp_size=layout.data_size,
        num_readers=layout.world_size,
        peers=ReplicaPeers(process_groups),
    )
    engine = FrozenEngine(read_shape(path), process_groups, EngineSettings(path, "float32"))
    result = evaluate_prompts(engine, (prompts.append(prompt) or prompt for prompt in heldout), processor, settings, 1)
    reached = sorted([prompt.sample.key for prompt in prompts] + [key for _, key in heldout.left_out])
    decodes = layout.tensor_rank == layout.pipeline_rank == 0
    assert sorted(made) == (reached if decodes else []), "one rank of a replica decodes"
    assert set(heldout.left_out.values()) <= {"unusable"} and all(key.endswith("4") for _, key in heldout.left_out)
    views = view_probes(engine, read_prompts(shards, processor, 3), processor, settings, 1)
    odd = sum(int(prompt.sample.solution.removeprefix("<answer>")[0]) % 2 for prompt in prompts)
    stop_groups()
    if process_groups.layout.world_size == 1:
        assert 0 < result.error_rate == odd / len(prompts) < 1
    return result, [(view.prompt.sample.key, view.text, view.visual_attention) for view in views]


@pytest.mark.parametrize("world, tensor, pipeline", [(2, 1, 1), (4, 1, 2), (2, 2, 1)])
def test_evaluation_does_not_depend_on_the_layout(material, world, tensor, pipeline):
    """21 samples of which two cannot be decoded: with two data-parallel ranks one of them has fewer prompts."""
    alone, views = run_ranks(1, evaluation, str(material["tiny"]), str(material["data"]), 1, 1)[0]
    assert alone.num_prompts == 19 and alone.unparsed_rate == 1.0, "an untrained model writes no answer tag"
    for result, other_views in run_ranks(
        world, evaluation, str(material["tiny"]), str(material["data"]), tensor, pipeline
    ):
        assert result.num_prompts == 19 and result.accuracy == alone.accuracy
        assert (result.unparsed_rate, result.error_rate) == (alone.unparsed_rate, alone.error_rate)
        assert result.target_attention_by_layer == pytest.approx(alone.target_attention_by_layer, rel=1e-5)
        assert result.visual_mass == pytest.approx(alone.visual_mass, rel=1e-5)
        for (key, text, mass), (other_key, other_text, other_mass) in zip(views, other_views, strict=True):
            assert (key, text) == (other_key, other_text)
            assert len(mass) == 4 and torch.allclose(mass, other_mass, atol=1e-6)
    assert alone.target_attention == alone.target_attention_by_layer[1]
    assert 0.05 < alone.target_attention < 0.6


def test_a_rank_without_a_prompt_group_mask(material):
    result, _ = run_ranks(2, evaluation, str(material["tiny"]), str(material["data"]), 1, 1, 1)[1]
    assert result.num_prompts == 1 and result.target_attention > 0
