"""Bytes that ZeRO-3 holds and sends for one stage, by arithmetic on the sizes of its parameters.

Every parameter is divided into equal shards, the last one padded. Between uses a rank holds its shards. For trained
parameters it also holds float32 gradient shards, master weights and two moments, and a buffer through which gradients
are reduced. A use gathers the stage (`engine/stage.py`). For a moment, the flat buffer of the gather and the parameters
made from it exist together (DeepSpeed 0.19.8).
"""

from collections import Counter
from dataclasses import dataclass
from typing import Collection, Optional, Sequence


@dataclass(frozen=True)
class SimulatedParameter:
    """One parameter as ZeRO-3 sees it."""

    numel: int
    """Number of elements."""
    trained: bool
    """True if it is trained."""
    layer: Optional[int]
    """0-based layer that it belongs to, or None."""
    partial: bool
    """True if its gradient is summed over tensor ranks."""
    tied: bool
    """True if its gradient is summed over the first and last stage."""
    embedding: bool
    """True if it holds word embeddings, of which a pass reads single rows."""


@dataclass(frozen=True)
class StageBytes:
    """One stage on one of `data_size` ranks."""

    parameters: Sequence[SimulatedParameter]
    """Parameters of the stage on one tensor rank."""
    data_size: int
    """Data-parallel ranks."""
    itemsize: int
    """Bytes of one element of a parameter."""
    gather: str
    """Unit that a training pass gathers at a time: stage or layer."""
    recorded: Collection[int]
    """Layers that a training pass does not gather one by one, because their attention is recorded."""
    moved: bool
    """True if shards wait in the host's memory."""
    overlap: bool = False
    """True if layers are gathered and gradients reduced while passes compute."""

    def _shard(self, parameters: Sequence[SimulatedParameter]) -> int:
        return sum(-(-parameter.numel // self.data_size) for parameter in parameters)

    @property
    def trained(self) -> list[SimulatedParameter]:
        """Trained parameters."""
        return [parameter for parameter in self.parameters if parameter.trained]

    @property
    def shard_numel(self) -> int:
        """Elements of this rank's shards."""
        return self._shard(self.parameters)

    @property
    def trained_numel(self) -> int:
        """Elements of this rank's shards of trained parameters."""
        return self._shard(self.trained)

    @property
    def padding(self) -> int:
        """Elements by which all shards together exceed the stage."""
        return self.shard_numel * self.data_size - sum(parameter.numel for parameter in self.parameters)

    @property
    def gathers(self) -> bool:
        """True if a use gathers the stage at all."""
        return self.data_size > 1 or self.moved

    @property
    def whole(self) -> int:
        """Bytes of the gathered stage; 0 where the shard is the whole stage."""
        return self.shard_numel * self.data_size * self.itemsize if self.gathers else 0

    @property
    def passing(self) -> dict[int, int]:
        """Bytes of each layer that a training pass gathers by itself, by layer."""
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
        at_a_time = (2 if self.overlap else 1) * max(passing.values(), default=0)  # the next layer arrives meanwhile
        return self.whole - sum(passing.values()) + min(at_a_time, sum(passing.values())) if self.gathers else 0

    @property
    def bucket(self) -> int:
        """Bytes of the buffer through which gradients are reduced."""
        sizes = [parameter.numel for parameter in self.parameters]
        return 4 * max(max(sizes), min(sum(sizes) // 4 if self.overlap else sum(sizes), 200_000_000))

    @property
    def sent_share(self) -> int:
        """Bytes of one gather and one reduce-scatter of the stage, the least that ZeRO-3 sends in an optimizer step."""
        return self.whole + (4 * self.data_size * self.trained_numel if self.data_size > 1 else 0)

    def held(self, offload_optimizer: bool, with_reference: bool) -> dict[str, int]:
        """Return the bytes on the device between uses, by kind.

        Args:
            offload_optimizer: whether master weights, gradients and moments are in the host's memory.
            with_reference: whether a frozen reference of the same size is held.
        """
        shard, trained = self.shard_numel * self.itemsize, 4 * self.trained_numel
        held = {
            "parameters": 0 if self.moved else shard,
            "gradients": (0 if offload_optimizer else trained) + self.bucket,
            "optimizer state": 0 if offload_optimizer else 3 * trained,
        }
        if with_reference:
            held["reference"] = 0 if self.moved else shard
        return held

    def sent_per_update(self, micro_batches: int) -> int:
        """Return the bytes of one optimizer step over data-parallel ranks."""
        return sum(size for (group, _), size in self.sent(micro_batches).items() if group == "data")

    def sent(self, micro_batches: int) -> dict[tuple[str, str], int]:
        """Return the bytes of one optimizer step (`forward_backward` and `step`) by (process group, collective)."""
        layers = 2 * micro_batches * sum(self.passing.values())
        sent = {
            ("data", "all-gather"): self.whole - sum(self.passing.values()) + layers,
            ("data", "reduce-scatter"): 4 * self.data_size * self.trained_numel if self.data_size > 1 else 0,
            ("tensor", "all-reduce"): 4 * self._shard([p for p in self.trained if p.partial]),
            ("embedding", "all-reduce"): 4 * self._shard([p for p in self.trained if p.tied]),
        }
        return {key: size for key, size in sent.items() if size}
