"""Losses whose weights and denominators are not a mean over tokens: the same step in every layout and cut.

Groups 0, 1 and 5 have equal rewards and are filtered: with two data-parallel ranks the first has two groups of four
left, none in its first micro-batch of two.
"""

from functools import partial

import pytest
import torch

from megatron_ral.parallel.collectives import gather_shards
from megatron_ral.parallel.process_groups import start_groups, stop_groups
from megatron_ral.parallel.vocab import vocab_parallel_logprobs
from tests.distributed.cases import one_step
from tests.distributed.runner import run_ranks
from tests.distributed.test_layouts import close

FILTERED = {"equal_rewards": (0, 1, 5), "filter_equal_rewards": True}
FAMILY = {
    "gspo": {
        "policy_loss": "gspo",
        "aggregation": "sequence_mean",
        "clip_low": 0.02,
        "clip_high": 0.03,
        "kl_estimator": "k2",
        "entropy_coef": 0.5,
        **FILTERED,
    },
    "weights of tokens": {"sampler_correction": "token_truncate", **FILTERED},
    "weights of responses": {"sampler_correction": "sequence_mask", "aggregation": "sequence_mean"},
    "cispo": {"policy_loss": "cispo", "aggregation": "sequence_sum_norm", "clip_low": 1.0, "kl_clamp": 0.1, **FILTERED},
}


@pytest.mark.parametrize("name", FAMILY)
def test_layout_and_cut_equal_one_process(material, name):
    paths = [str(material[key]) for key in ("tiny", "tiny_other", "data")]
    step = partial(one_step, **FAMILY[name])
    alone = run_ranks(1, step, *paths, 1, 1, 8, 2)[0]
    first = alone["history"][0]
    for term in ("loss/policy", "kl", "loss/attention", "attention_norm", "entropy", "clip_ratio/high"):
        assert abs(first[term]) > 1e-5, term
    if "sampler_correction" in FAMILY[name]:
        assert 0 < first["sampling/ratio_cut"] < 0.9 and first["sampling/ratio_max"] > 2
    # A response's ratio has the rounding of up to seven log-probabilities near -7, 4.8e-7 each, as its relative error,
    # and the losses of responses of both signs cancel. The largest difference seen is 1.2e-5 of loss/policy.
    tolerance = 1e-4 if FAMILY[name].get("sampler_correction") == "sequence_mask" else 1e-5
    for world, tensor, pipeline, size in ((1, 1, 1, 1), (2, 1, 1, 2), (2, 2, 1, 2), (4, 1, 2, 1)):
        result = run_ranks(world, step, *paths, tensor, pipeline, size, 2)[-1]
        for index, (ours, wanted) in enumerate(zip(result["history"], alone["history"])):
            for metric, value in wanted.items():
                close(f"{(world, tensor, pipeline, size)}, step {index}, {metric}", ours[metric], value, tolerance)


def gradients_of_logits(tensor: int):
    """Of log-probabilities, of the entropy, and of both together, from this rank's columns of the logits."""
    process_groups = start_groups(tensor_size=tensor, pipeline_size=1, seed=0)
    generator = torch.Generator().manual_seed(0)
    logits, targets = 3 * torch.randn(5, 12, generator=generator), torch.randint(0, 12, (5,), generator=generator)
    weights = torch.randn(2, 5, generator=generator)
    mine = logits.chunk(tensor, -1)[process_groups.layout.tensor_rank].contiguous().requires_grad_()
    values = vocab_parallel_logprobs(mine, targets, process_groups.tensor)
    found = [
        torch.autograd.grad(sum((weights[i] * values[i]).sum() for i in chosen), mine, retain_graph=True)[0]
        for chosen in ((0,), (1,), (0, 1))
    ]
    found = [torch.cat(gather_shards(gradient, process_groups.tensor), -1) for gradient in found]
    stop_groups()
    return logits, targets, weights, found


@pytest.mark.parametrize("tensor", [1, 2])
def test_entropy_and_logprobs_carry_gradient_to_every_shard(tensor):
    for logits, targets, weights, found in run_ranks(tensor, gradients_of_logits, tensor):
        logits = logits.double().requires_grad_()
        logprobs = torch.log_softmax(logits, -1)
        values = logprobs.gather(-1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)
        for chosen, gradient in zip(((0,), (1,), (0, 1)), found):
            loss = sum((weights[i] * values[i]).sum() for i in chosen)
            (wanted,) = torch.autograd.grad(loss, logits, retain_graph=True)
            assert torch.allclose(gradient.double(), wanted, atol=1e-6) and wanted.abs().max() > 0.1
