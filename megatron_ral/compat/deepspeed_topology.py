"""Tell DeepSpeed which process groups exist, through the `mpu` interface that megatron-core no longer has.

`deepspeed.initialize(mpu=...)` calls names such as `get_model_parallel_world_size` that older versions of
`megatron.core.parallel_state` defined.

DeepSpeed allows ZeRO-3 only without pipeline stages of its own. This project therefore runs one plain ZeRO-3 engine per
stage under megatron-core's pipeline schedule. The other `deepspeed_*` files of this folder make that work.

Tried on: DeepSpeed 0.19.8 with megatron-core 0.16.1, 0.17.1, 0.18.2 and 0.19.2.
Retired by: `test_megatron_still_lacks_the_names_deepspeed_calls`.
"""

from typing import Any, Protocol


class Layout(Protocol):
    """Sizes and ranks of one process, as `parallel.rank_layout.RankLayout` has them."""

    @property
    def tensor_size(self) -> int: ...
    @property
    def tensor_rank(self) -> int: ...
    @property
    def pipeline_size(self) -> int: ...
    @property
    def pipeline_rank(self) -> int: ...
    @property
    def data_size(self) -> int: ...
    @property
    def data_rank(self) -> int: ...


class Groups(Protocol):
    """Process groups of one process, as `parallel.process_groups.ProcessGroups` has them."""

    @property
    def layout(self) -> Layout: ...
    @property
    def data(self) -> Any: ...
    @property
    def tensor(self) -> Any: ...
    @property
    def pipeline(self) -> Any: ...
    @property
    def model(self) -> Any: ...


class MegatronTopology:
    """Adapter from process groups to the `mpu` interface of `deepspeed.initialize`.

    The model-parallel *group* spans tensor and pipeline ranks, while the model-parallel *rank* is the tensor rank.
    DeepSpeed counts a replicated parameter, such as a norm weight, only where that rank is 0, and this must happen once
    per pipeline stage.
    """

    def __init__(self, process_groups: Groups):
        self._groups = process_groups

    def get_data_parallel_world_size(self) -> int:
        return self._groups.layout.data_size

    def get_data_parallel_rank(self) -> int:
        return self._groups.layout.data_rank

    def get_data_parallel_group(self) -> Any:
        return self._groups.data

    def get_model_parallel_world_size(self) -> int:
        return self._groups.layout.tensor_size * self._groups.layout.pipeline_size

    def get_model_parallel_rank(self) -> int:
        return self._groups.layout.tensor_rank

    def get_model_parallel_group(self) -> Any:
        return self._groups.model

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._groups.layout.tensor_size

    def get_tensor_model_parallel_rank(self) -> int:
        return self._groups.layout.tensor_rank

    def get_tensor_model_parallel_group(self) -> Any:
        return self._groups.tensor

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._groups.layout.pipeline_size

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._groups.layout.pipeline_rank

    def get_pipeline_model_parallel_group(self) -> Any:
        return self._groups.pipeline
