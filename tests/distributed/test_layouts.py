"""The same fixed rollouts in every layout give the same loss terms, gradient norm and weights as one process."""

import pytest
import torch

from tests.distributed.cases import fixed_minibatch, one_step, open_policy
from tests.distributed.runner import run_ranks

#            world, tensor, pipeline, micro-batch, sequence parallel; test_engine_table.py has the others
LAYOUTS = [(4, 2, 2, 1, False), (8, 2, 2, 2, True)]


def close(name: str, ours: float, wanted: float, tolerance: float = 1e-5) -> None:
    assert abs(ours - wanted) <= tolerance * max(abs(wanted), 1e-7), f"{name}: {ours} instead of {wanted}"


@pytest.fixture(scope="module")
def alone(material):
    """One process, the whole batch in one micro-batch."""
    return run_ranks(
        1, one_step, str(material["tiny"]), str(material["tiny_other"]), str(material["data"]), 1, 1, 8, 2, (-1, 1)
    )[0]


def test_one_process_step_has_every_term(alone):
    """The comparison would be worth little if a term were zero."""
    first = alone["history"][0]
    for name in (
        "loss/policy",
        "kl",
        "loss/attention",
        "attention/divergence",
        "attention/target_mass",
        "grad_norm",
        "attention_norm",
        "entropy",
        "clip_ratio/low",
    ):
        assert abs(first[name]) > 1e-5, name


@pytest.mark.parametrize("world, tensor, pipeline, micro_batch_size, sequence_parallel", LAYOUTS)
def test_layout_equals_one_process(material, alone, world, tensor, pipeline, micro_batch_size, sequence_parallel):
    results = run_ranks(
        world,
        one_step,
        str(material["tiny"]),
        str(material["tiny_other"]),
        str(material["data"]),
        tensor,
        pipeline,
        micro_batch_size,
        2,
        (-1, 1),
        sequence_parallel,
    )
    for step, wanted in enumerate(alone["history"]):
        for rank, result in enumerate(results):
            for name, value in wanted.items():
                close(f"rank {rank}, step {step}, {name}", result["history"][step][name], value)
            # our count of the gradient norm and DeepSpeed's are two implementations of one number
            close("own norm", result["history"][step]["own_norm"], result["history"][step]["grad_norm"])
    for name, wanted in alone["weights"].items():
        assert (results[0]["weights"][name] - wanted).norm() <= 1e-5 * wanted.norm(), name
        change = alone["changes"][name]
        # what two steps changed, too: a wrong factor would hide in the size of the weights
        assert (results[0]["changes"][name] - change).norm() <= 1e-3 * change.norm(), name
    if pipeline > 1:
        tied = results[-1]["weights"]
        assert torch.equal(tied["tied copy"], tied["model.embed_tokens.weight"])


def test_untied_embeddings_under_tensor_and_pipeline(material):
    arguments = (str(material["untied"]), str(material["untied_other"]), str(material["data"]))
    alone = run_ranks(1, one_step, *arguments, 1, 1, 4)[0]
    result = run_ranks(4, one_step, *arguments, 2, 2, 4)[0]
    for name in ("loss/policy", "kl", "loss/attention", "grad_norm", "entropy"):
        close(name, result["history"][0][name], alone["history"][0][name])
    for name, wanted in alone["weights"].items():
        assert (result["weights"][name] - wanted).norm() <= 1e-5 * wanted.norm(), name


def test_micro_batches_do_not_change_the_step(material, alone):
    for size in (1, 4):
        result = run_ranks(
            1,
            one_step,
            str(material["tiny"]),
            str(material["tiny_other"]),
            str(material["data"]),
            1,
            1,
            size,
            2,
            (-1, 1),
        )[0]
        for step, wanted in enumerate(alone["history"]):
            for name, value in wanted.items():
                close(f"micro-batch {size}, {name}", result["history"][step][name], value)


@pytest.mark.parametrize("dtype, size", [("float32", 4), ("bfloat16", 2)])
def test_zero3_really_shards(material, dtype, size):
    """Bytes of every rank are those of ceil(numbers / data-parallel ranks) per parameter of its stage."""
    arguments = (str(material["tiny"]), str(material["tiny_other"]), str(material["data"]), 2, 2, 2)
    ranks = run_ranks(8, held_bytes, *arguments, dtype)
    for rank, (held, stage) in enumerate(ranks):
        shards = {
            kind: sum(-(-numel // 2) for numel, trained in stage if trained or kind == "all")
            for kind in ("all", "trained")
        }
        steps = held["optimizer state"] % 8  # AdamW's step counter
        assert held == {
            "parameters": size * shards["all"],
            "gradients": 4 * shards["trained"],
            "master weights": 4 * shards["trained"],
            "optimizer state": 8 * shards["trained"] + steps,
            "whole stage": size * sum(numel for numel, _ in stage),
        }, rank
        assert steps in (0, 4) and any(not trained for _, trained in stage) == (rank < 4), (
            "the frozen tower is on stage 0"
        )


def held_bytes(
    path: str, other: str, data: str, tensor: int, pipeline: int, micro_batch_size: int, dtype: str
) -> tuple:
    """What the engine says it holds after a step, and (numbers, trained) of its parameters."""
    opened = open_policy(path, tensor, pipeline, dtype=dtype)
    policy, objective = opened[3:]
    policy.forward_backward(fixed_minibatch(opened, other, data, micro_batch_size), objective)
    policy.step()
    return policy.shard_bytes(), [
        (parameter.ds_numel, parameter.requires_grad) for parameter in policy.stage.parameters()
    ]
