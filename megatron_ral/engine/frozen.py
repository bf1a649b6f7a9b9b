"""A frozen model (reference, teacher): the same stage, sharded by ZeRO-3, without an optimizer."""

from megatron_ral.engine.stage import StageEngine
from megatron_ral.models.shape import ModelShape
from megatron_ral.parallel.process_groups import ProcessGroups


class FrozenEngine(StageEngine):
    """Frozen stage of one rank; it reads and generates, and never changes.

    Args:
        shape, groups, dtype, path, sequence_parallel, cpu_offload, gather, overlap: as for StageEngine.
    """

    def __init__(
        self,
        shape: ModelShape,
        process_groups: ProcessGroups,
        dtype: str,
        path: str,
        sequence_parallel: bool = False,
        cpu_offload: bool = False,
        gather: str = "stage",
        overlap: bool = False,
    ):
        super().__init__(
            shape,
            process_groups,
            dtype,
            path,
            sequence_parallel=sequence_parallel,
            cpu_offload=cpu_offload,
            gather=gather,
            overlap=overlap,
        )
