"""A loss or gradient that is not finite on one rank alone: every rank skips the step, and nothing of it remains."""

from dataclasses import dataclass

import pytest
import torch

from megatron_ral.objectives.base import Objective
from megatron_ral.parallel.process_groups import stop_groups
from tests.distributed.cases import fixed_minibatch, open_policy
from tests.distributed.runner import run_ranks
from tests.tiers import chosen


@dataclass(frozen=True)
class Spoilt(Objective):
    """Of what it returns, one part is not finite: `loss` (value alone), `gradient` (gradient alone), `both`."""

    spoils: str = "both"

    def token_loss(self, outputs, batch):
        loss, metrics = super().token_loss(outputs, batch)
        if self.spoils in ("gradient", "both"):
            outputs.logprobs.register_hook(lambda grad: torch.full_like(grad, torch.inf))
        if self.spoils in ("loss", "both"):
            metrics = {**metrics, "loss/token": metrics["loss/token"] * torch.nan}
        return loss, metrics

    def attention_loss(self, layer, rows, batch):
        loss, metrics = super().attention_loss(layer, rows, batch)
        if self.spoils == "attention":
            rows.record.query_BGRnD.register_hook(lambda grad: grad * torch.nan)
        return loss, metrics


def steps(path, other, data, tensor, pipeline, spoils):
    """Two steps, in between one that is spoilt on the last rank, and what the engine holds after each."""
    opened = open_policy(path, tensor, pipeline)
    _, process_groups, _, policy, objective = opened
    minibatch = fixed_minibatch(opened, other, data, 2)
    spoilt = objective
    if process_groups.layout.rank == process_groups.layout.world_size - 1:
        spoilt = Spoilt(**objective.__dict__, spoils=spoils)
    states, applied, norms = [], [], []
    for each in [objective, *([spoilt] if spoils else []), objective]:
        policy.forward_backward(minibatch, each)
        result = policy.step()
        states.append({name: value.clone() for name, value in policy.state()})
        applied.append(result.applied)
        norms.append(result.grad_norm)
    stop_groups()
    return states, applied, norms


@pytest.mark.parametrize(
    "world, tensor, pipeline", chosen([(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 1, 2)], [(2, 1, 1), (2, 2, 1), (2, 1, 2)])
)
def test_step_is_skipped_everywhere_and_leaves_nothing(material, world, tensor, pipeline):
    places = str(material["tiny"]), str(material["tiny_other"]), str(material["data"])
    straight = run_ranks(world, steps, *places, tensor, pipeline, "")
    for spoils in ("loss", "gradient", "both", "attention"):
        for (states, applied, norms), (wanted, _, wanted_norms) in zip(
            run_ranks(world, steps, *places, tensor, pipeline, spoils), straight
        ):
            assert applied == [True, False, True], (spoils, applied)
            assert norms[0] == wanted_norms[0] and norms[2] == wanted_norms[1]
            for before, after in ((states[0], states[1]), (wanted[1], states[2])):
                for name, value in before.items():
                    assert torch.equal(value, after[name]), (spoils, name)
            assert any(not torch.equal(states[1][name], states[2][name]) for name in states[1])
