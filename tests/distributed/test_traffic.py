"""Bytes that a step sends over the data-parallel group: counted where they are sent, and compared with the log."""

import pytest

from megatron_ral.engine.policy import PolicyEngine
from megatron_ral.parallel.traffic import CountedTraffic
from tests.distributed.cases import fixed_minibatch, open_policy
from tests.distributed.runner import run_ranks


def gathered_bytes(policy: PolicyEngine, recorded: int) -> tuple[int, int]:
    """Return the bytes of all parameters and of the layers that are not recorded, padded to equal shards as sent."""
    size = policy.layout.data_size

    def padded(parameters) -> int:
        return sum(parameter.ds_tensor.numel() * size * parameter.element_size() for parameter in parameters)

    layers = [layer for layer in policy.stage.language.decoder.layers if layer.layer_number - 1 != recorded]
    return padded(policy.stage.parameters()), sum(padded(layer.parameters()) for layer in layers)


def counted(path: str, other: str, data: str, micro_batches: list[int], gather: str, overlap: bool = True) -> dict:
    opened = open_policy(path, 1, 2, num_groups=32, parallel={"gather": gather, "overlap_communication": overlap})
    _, process_groups, shape, policy, objective = opened
    result, begun = {}, []
    # The backward pass of the stage's layers ends with this gradient. The bucket holds about one layer.
    policy.stage.language.decoder.layers[0].input_layernorm.weight.register_post_accumulate_grad_hook(
        lambda _: begun.append(traffic.of("zero").get("reduce-scatter", (0, 0))[0])
    )
    for count in micro_batches:
        minibatch = fixed_minibatch(opened, other, data, 16 // count)
        assert len(minibatch) == count
        with CountedTraffic({"zero": process_groups.data}) as traffic:
            policy.forward_backward(minibatch, objective)
            policy.step()
        result[count] = traffic.of("zero")
    whole, layers = gathered_bytes(policy, shape.num_layers - 1)
    trained = sum(
        parameter.ds_tensor.numel() * process_groups.layout.data_size * 4
        for parameter in policy.stage.parameters()
        if parameter.requires_grad
    )
    recorded = policy.local_layers(sorted(objective.recorded_layers))
    return {
        "text": policy.traffic(recorded),
        "counted": result,
        "whole": whole,
        "layers": layers,
        "trained": trained,
        "begun": begun,
        "num_layers": len(policy.stage.language.decoder.layers),
    }


@pytest.mark.parametrize("gather, overlap", [("stage", True), ("stage", False), ("layer", True)])
def test_bytes_on_the_zero_group_are_those_of_one_gather_and_one_reduce(material, gather, overlap):
    """Overlap sends the same bytes in more calls: one gather for each layer and one for the rest.

    Some gradients are reduced before the last backward pass has left the first layer of the stage, but none before that
    pass begins.
    """
    counts = [1, 4, 16]
    for rank in run_ranks(
        4, counted, str(material["tiny"]), str(material["tiny_other"]), str(material["data"]), counts, gather, overlap
    ):
        for before, count in enumerate(counts):
            *earlier, last = rank["begun"][sum(counts[:before]) :][:count]
            assert not any(earlier) and bool(last) == overlap
            sent = rank["counted"][count]
            gathers, gathered = sent["all-gather"]
            reduces, reduced = sent["reduce-scatter"]
            assert f"{reduced:,} bytes of gradients once" in rank["text"]
            assert reduced == rank["trained"], "every gradient once, in float32"
            assert reduces == rank["counted"][1]["reduce-scatter"][0] and (
                1 < reduces < 10 if overlap else reduces == 1
            )
            if gather == "stage":
                assert (
                    gathers == 1 + overlap * rank["num_layers"]
                    and gathered == rank["whole"]
                    and f"gathers {gathered:,} bytes once," in rank["text"]
                )
            else:
                assert f"{rank['layers']:,} bytes" in rank["text"] and "twice per micro-batch" in rank["text"]
                assert gathered == rank["whole"] - rank["layers"] + 2 * count * rank["layers"]
            rest = {kind: size for kind, (_, size) in sent.items() if kind not in ("all-gather", "reduce-scatter")}
            assert sum(rest.values()) < 1024, "scalars"
