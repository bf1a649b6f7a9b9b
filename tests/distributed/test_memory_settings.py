"""Settings that save memory do: counted in one pass of the real engine."""

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from megatron_ral.engine import stage as stage_module
from megatron_ral.engine.gather import LayerWeights
from tests.distributed.cases import fixed_minibatch, open_policy
from tests.distributed.runner import run_ranks


class WatchedWeights(LayerWeights):
    """Notes how many numbers of the stage are whole, or on their way, whenever a layer begins."""

    stage, most = None, 0

    def enter(self, hidden):
        result = super().enter(hidden)
        whole = sum(
            parameter.ds_numel
            for parameter in self.stage.parameters()
            if parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE
        )
        WatchedWeights.most = max(WatchedWeights.most, whole)
        return result


def kept_bytes(path: str, other: str, data: str, parallel: dict) -> dict:
    """Bytes that one micro-batch keeps for its backward pass, weights apart; numbers that are whole at once."""
    opened = open_policy(path, 1, 1, attention_layers=(1,), parallel=parallel)
    policy, objective = opened[3:]
    minibatch = fixed_minibatch(opened, other, data, 4)
    weights = {id(parameter) for parameter in policy.stage.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        if id(tensor) not in weights and not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    stage_module.LayerWeights, WatchedWeights.stage = WatchedWeights, policy.stage
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.forward_backward(minibatch[:1], objective)
    layers = [
        sum(parameter.ds_numel for parameter in layer.parameters()) for layer in policy.stage.language.decoder.layers
    ]
    return {
        "kept": sum(kept.values()),
        "most": WatchedWeights.most,
        "layers": layers,
        "stage": sum(parameter.ds_numel for parameter in policy.stage.parameters()),
    }


def test_recomputation_keeps_less_and_layers_are_whole_one_at_a_time(material):
    arguments = (str(material["tiny"]), str(material["tiny_other"]), str(material["data"]))
    plain, recomputed, layerwise, ahead = (
        run_ranks(2, kept_bytes, *arguments, parallel)[0]
        for parallel in (
            {},
            {"recompute_activations": True},
            {"gather": "layer", "overlap_communication": False},
            {"gather": "layer"},
        )
    )
    assert len(plain["layers"]) == 4 and plain["most"] == recomputed["most"] == 0
    # three of four layers keep their input alone; embedding, recorded layer, head and loss keep what they did
    assert recomputed["kept"] < 0.6 * plain["kept"]
    assert layerwise["kept"] < 0.6 * plain["kept"]
    one, all_passing = layerwise["layers"][0], sum(layerwise["layers"]) - layerwise["layers"][1]
    assert layerwise["most"] == layerwise["stage"] - all_passing + one
    assert ahead["kept"] == layerwise["kept"] and ahead["most"] == layerwise["most"] + one, "one more is on its way"
