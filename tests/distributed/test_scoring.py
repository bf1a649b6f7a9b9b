"""Own reward functions: one rank of a model copy calls them, all of its ranks get what it got."""

from types import SimpleNamespace

import torch

from megatron_ral.config.sections import RewardConfig, RewardFunctionConfig
from megatron_ral.parallel.collectives import from_first_rank
from megatron_ral.parallel.process_groups import start_groups, stop_groups
from megatron_ral.rollout.scoring import score_responses
from megatron_ral.types import ResponseBatch
from tests.distributed.runner import run_ranks


def score_on_a_rank(tensor: int, pipeline: int):
    process_groups = start_groups(tensor_size=tensor, pipeline_size=pipeline, seed=0)
    sample = SimpleNamespace(solution="7", problem_type="", identity="a/b", options=(), problem="?")
    responses = ResponseBatch(
        SimpleNamespace(prompts=[SimpleNamespace(sample=sample)] * 2),
        torch.arange(12).reshape(2, 2, 3),
        torch.full((2, 2), 3),
        torch.zeros(2, 2, 3),
        torch.ones(2, 2, dtype=torch.bool),
    )
    processor = SimpleNamespace(decode=lambda ids: str(ids.tolist()))
    own = {"rank": RewardFunctionConfig("tests.distributed.user_rewards:rank", 1.0)}
    score = score_responses(
        responses, processor, RewardConfig(functions=own), SimpleNamespace(process_groups=process_groups)
    )
    stop_groups()
    return score.components["rank"], score.rewards, score.texts


def layout(tensor: int, pipeline: int) -> list[float]:
    """What each rank got, by rank."""
    results = run_ranks(2, score_on_a_rank, tensor, pipeline)
    for own, rewards, texts in results:
        assert torch.equal(own, rewards) and len(set(own.flatten().tolist())) == 1 and texts == results[0][2]
    return [float(own[0, 0]) for own, _, _ in results]


def test_ranks_of_one_model_copy_get_the_same():
    assert layout(2, 1) == [1.0, 1.0]
    assert layout(1, 2) == [1.0, 1.0]
    assert layout(1, 1) == [1.0, 2.0], "two data-parallel ranks have each its own"


def fails_on_the_first_rank():
    process_groups = start_groups(tensor_size=2, pipeline_size=1, seed=0)
    try:
        from_first_rank(lambda: [][0], process_groups.model)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        stop_groups()


def test_no_rank_waits_for_one_that_failed():
    first, second = run_ranks(2, fails_on_the_first_rank)
    assert first.startswith("IndexError: list") and second.startswith("AgreedError: rank 0: IndexError: list")
