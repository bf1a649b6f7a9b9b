"""Who is where: the layout of ranks as pure integers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelLayout:
    """Place of one rank in tensor x data x pipeline parallelism.

    Ranks are numbered as megatron-core does with order `tp-cp-ep-dp-pp`: tensor rank fastest, then data, then
    pipeline stage.
    """

    rank: int
    world_size: int
    tensor_size: int
    pipeline_size: int

    def __post_init__(self):
        if self.world_size % (self.tensor_size * self.pipeline_size):
            raise ValueError(f"world size {self.world_size} is not divisible by tensor * pipeline = "
                             f"{self.tensor_size} * {self.pipeline_size}")

    @property
    def data_size(self) -> int:
        return self.world_size // (self.tensor_size * self.pipeline_size)

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor_size

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor_size % self.data_size

    @property
    def pipeline_rank(self) -> int:
        return self.rank // (self.tensor_size * self.data_size)

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    def stage_layers(self, num_layers: int) -> range:
        """0-based layers of this rank's stage; stages are of equal size."""
        per_stage = num_layers // self.pipeline_size
        return range(self.pipeline_rank * per_stage, (self.pipeline_rank + 1) * per_stage)

    def with_rank(self, rank: int) -> "ParallelLayout":
        return ParallelLayout(rank, self.world_size, self.tensor_size, self.pipeline_size)

    def describe(self) -> str:
        """Table of all ranks."""
        rows = [f"{self.world_size} ranks = tensor {self.tensor_size} x pipeline {self.pipeline_size} x "
                f"data {self.data_size}", f"{'rank':>6} {'tensor':>7} {'pipeline':>9} {'data':>5}"]
        for rank in range(self.world_size):
            other = self.with_rank(rank)
            rows.append(f"{rank:>6} {other.tensor_rank:>7} {other.pipeline_rank:>9} {other.data_rank:>5}")
        return "\n".join(rows)
