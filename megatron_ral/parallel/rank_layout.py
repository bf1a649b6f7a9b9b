"""Layout of the ranks in tensor x data x pipeline parallelism, as pure integers."""

from dataclasses import dataclass


def stage_sizes(num_layers: int, pipeline_size: int) -> list[int]:
    """Return the number of layers of each pipeline stage.

    If the layers cannot be divided evenly, stages in the middle get one more, then the first stage, then the last,
    because the first stage also holds the embeddings and the vision tower, and the last the LM head and the losses.

    Raises:
        ValueError: fewer layers than stages.
    """
    if num_layers < pipeline_size:
        raise ValueError(f"{num_layers} layers cannot fill {pipeline_size} pipeline stages")
    base, extra = divmod(num_layers, pipeline_size)
    order = [*range(1, pipeline_size - 1), 0, pipeline_size - 1]
    return [base + (stage in order[:extra]) for stage in range(pipeline_size)]


@dataclass(frozen=True)
class RankLayout:
    """Place of one rank in tensor x data x pipeline parallelism.

    Ranks are numbered like megatron-core's order `tp-cp-ep-dp-pp`: the tensor rank varies fastest, then the data rank,
    then the pipeline stage.

    Raises:
        ValueError: the ranks cannot be divided into tensor x pipeline.
    """

    rank: int
    """Number of this rank in the job, from 0."""
    world_size: int
    """Number of ranks of the job."""
    tensor_size: int
    """Number of tensor-parallel ranks."""
    pipeline_size: int
    """Number of pipeline stages."""

    def __post_init__(self):
        if self.world_size % (self.tensor_size * self.pipeline_size):
            raise ValueError(
                f"world size {self.world_size} is not divisible by tensor * pipeline = "
                f"{self.tensor_size} * {self.pipeline_size}"
            )

    @property
    def data_size(self) -> int:
        """Number of data-parallel ranks."""
        return self.world_size // (self.tensor_size * self.pipeline_size)

    @property
    def tensor_rank(self) -> int:
        """Tensor-parallel rank, from 0."""
        return self.rank % self.tensor_size

    @property
    def data_rank(self) -> int:
        """Data-parallel rank, from 0."""
        return self.rank // self.tensor_size % self.data_size

    @property
    def pipeline_rank(self) -> int:
        """Pipeline stage, from 0."""
        return self.rank // (self.tensor_size * self.data_size)

    @property
    def is_first_stage(self) -> bool:
        """True on the stage that holds the vision tower and the embeddings."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True on the stage that holds the LM head."""
        return self.pipeline_rank == self.pipeline_size - 1

    def stage_layers(self, num_layers: int) -> range:
        """Return the 0-based layers of this rank's stage, in a model with `num_layers` layers."""
        sizes = stage_sizes(num_layers, self.pipeline_size)
        start = sum(sizes[: self.pipeline_rank])
        return range(start, start + sizes[self.pipeline_rank])

    def stage_of_layer(self, layer: int, num_layers: int) -> int:
        """Return the pipeline stage that holds a 0-based layer, in a model with `num_layers` layers."""
        sizes = stage_sizes(num_layers, self.pipeline_size)
        return next(stage for stage in range(len(sizes)) if layer < sum(sizes[: stage + 1]))

    def rank_of(self, tensor_rank: int, data_rank: int, pipeline_rank: int) -> int:
        """Return the rank at a place of this layout."""
        return tensor_rank + self.tensor_size * (data_rank + self.data_size * pipeline_rank)

    def with_rank(self, rank: int) -> "RankLayout":
        """Return the same layout as another rank sees it."""
        return RankLayout(rank, self.world_size, self.tensor_size, self.pipeline_size)

    def describe(self) -> str:
        """Return a table of all ranks as text."""
        rows = [
            f"{self.world_size} ranks = tensor {self.tensor_size} x pipeline {self.pipeline_size} x "
            f"data {self.data_size}",
            f"{'rank':>6} {'tensor':>7} {'pipeline':>9} {'data':>5}",
        ]
        for rank in range(self.world_size):
            other = self.with_rank(rank)
            rows.append(f"{rank:>6} {other.tensor_rank:>7} {other.pipeline_rank:>9} {other.data_rank:>5}")
        return "\n".join(rows)
