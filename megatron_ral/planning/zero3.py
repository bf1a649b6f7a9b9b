"""What ZeRO-3 holds and sends for one stage, by arithmetic on the sizes of its parameters.

Every parameter is cut into equal shards, the last one padded. Between uses a rank holds its shards; of what is trained also
float32 gradient shards, master weights and two moments, and a buffer through which gradients are reduced. A use gathers the
stage (`engine/stage.py`); the gather's flat buffer and the parameters made of it are alive together for a moment
(DeepSpeed 0.19.8).
"""

from collections import Counter
from dataclasses import dataclass
from typing import Collection, Sequence

from megatron_ral.config import RunConfig
from megatron_ral.planning.simulate import SimulatedParameter

ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class StageBytes:
    """One stage on one of `data_size` ranks."""

    parameters: Sequence[SimulatedParameter]
    data_size: int
    itemsize: int
    gather: str
    recorded: Collection[int]
    """Layers that a training pass does not gather one by one."""
    moved: bool
    """Shards wait in the host's memory."""
    overlap: bool = False
    """Layers arrive and gradients leave while passes compute."""

    def _shard(self, parameters: Sequence[SimulatedParameter]) -> int:
        return sum(-(-parameter.numel // self.data_size) for parameter in parameters)

    @property
    def trained(self) -> list[SimulatedParameter]:
        return [parameter for parameter in self.parameters if parameter.trained]

    @property
    def shard_numel(self) -> int:
        """Elements of this rank's shards."""
        return self._shard(self.parameters)

    @property
    def trained_numel(self) -> int:
        """Elements of this rank's shards of what is trained."""
        return self._shard(self.trained)

    @property
    def padding(self) -> int:
        """Elements that all shards together have more than the stage."""
        return self.shard_numel * self.data_size - sum(parameter.numel for parameter in self.parameters)

    @property
    def gathers(self) -> bool:
        return self.data_size > 1 or self.moved

    @property
    def whole(self) -> int:
        """Bytes of the gathered stage; 0 where the shards are it."""
        return self.shard_numel * self.data_size * self.itemsize if self.gathers else 0

    @property
    def passing(self) -> dict[int, int]:
        """Bytes of each layer that a training pass gathers by itself."""
        if self.gather == "stage":
            return {}
        layers: Counter = Counter()
        for parameter in self.parameters:
            if parameter.layer is not None and parameter.layer not in self.recorded:
                layers[parameter.layer] += self._shard([parameter]) * self.data_size * self.itemsize
        return dict(layers)

    @property
    def in_pass(self) -> int:
        """Bytes gathered at a time in a training pass."""
        passing = self.passing
        at_a_time = (2 if self.overlap else 1) * max(passing.values(), default=0)  # one ahead
        return self.whole - sum(passing.values()) + min(at_a_time, sum(passing.values())) if self.gathers else 0

    @property
    def bucket(self) -> int:
        """Bytes of the buffer through which gradients are reduced."""
        sizes = [parameter.numel for parameter in self.parameters]
        return 4 * max(max(sizes), min(sum(sizes) // 4 if self.overlap else sum(sizes), 200_000_000))

    @property
    def sent_share(self) -> int:
        """Bytes of one gather and one reduce-scatter of everything: the least that ZeRO-3 can do in an optimizer step."""
        return self.whole + (4 * self.data_size * self.trained_numel if self.data_size > 1 else 0)

    def held(self, config: RunConfig) -> dict[str, int]:
        """Bytes on the device between uses."""
        on_host, host = config.parallel.offload_parameters, config.parallel.offload_optimizer
        shard, trained = self.shard_numel * self.itemsize, 4 * self.trained_numel
        held = {
            "parameters": 0 if on_host else shard,
            "gradients": (0 if host else trained) + self.bucket,
            "optimizer state": 0 if host else 3 * trained,
        }
        if config.needs_reference:
            held["reference"] = 0 if on_host else shard
        if config.loss.attention_target == "ema":
            held["average"] = (0 if on_host else shard) + trained
        return held

    def sent_per_update(self, micro_batches: int) -> int:
        """Bytes of one optimizer step over data-parallel ranks."""
        return sum(size for (group, _), size in self.sent(micro_batches).items() if group == "data")

    def sent(self, micro_batches: int) -> dict[tuple[str, str], int]:
        """Bytes of one optimizer step by (group, kind), `forward_backward` and `step`."""
        layers = 2 * micro_batches * sum(self.passing.values())
        sent = {
            ("data", "all-gather"): self.whole - sum(self.passing.values()) + layers,
            ("data", "reduce-scatter"): 4 * self.data_size * self.trained_numel if self.data_size > 1 else 0,
            ("tensor", "all-reduce"): 4 * self._shard([p for p in self.trained if p.partial]),
            ("embedding", "all-reduce"): 4 * self._shard([p for p in self.trained if p.tied]),
        }
        return {key: size for key, size in sent.items() if size}
