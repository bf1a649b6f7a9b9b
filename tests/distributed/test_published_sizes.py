"""Published sizes without their memory: the real code builds every rank of a layout on meta tensors, to be counted."""

from pathlib import Path

import pytest
import torch

from megatron_ral.models.shape import read_shape
from megatron_ral.parallel.rank_layout import RankLayout
from megatron_ral.planning.parameters import stage_parameters
from tests.distributed.runner import run_ranks

MODELS = Path(__file__).parents[2] / "pretrained_configs" / "models"


def build_every_rank(path: str, tensor: int, pipeline: int, ranks: list[int]) -> dict[int, int]:
    """Return the number of parameters of each rank's stage. One process plays all ranks over a fake process group."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_ral.compat import cpu_backend
    from megatron_ral.models.multimodal import MultimodalStage
    from megatron_ral.weights.stage_weights import describe_stage

    cpu_backend.install()
    shape, world, counts = read_shape(path), tensor * pipeline, {}
    for rank in ranks:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        parallel_state.initialize_model_parallel(tensor, pipeline, create_gloo_process_groups=False)
        with torch.device("meta"):
            stage = MultimodalStage(
                shape, RankLayout(rank, world, tensor, pipeline), torch.bfloat16, torch.device("meta")
            )
        describe_stage(stage)  # the table names exactly the parameters that were built
        counts[rank] = sum(parameter.numel() for parameter in stage.parameters())
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return counts


@pytest.mark.parametrize(
    "size, tensor, pipeline, total",
    [
        ("qwen2.5-vl-72b", 8, 4, 73_410_777_344),
        ("qwen2.5-vl-3b", 4, 3, 3_754_622_976),
        ("qwen3-vl-2b", 2, 1, 2_127_532_032),
        ("qwen3-vl-4b", 2, 3, 4_437_815_808),
        ("qwen3-vl-8b", 4, 2, 8_767_123_696),
        ("qwen3-vl-32b", 8, 4, 33_357_390_064),
        ("qwen3.5-0.8b", 4, 3, 852_985_920),
        ("qwen3.5-27b", 8, 4, 27_356_728_560),
        ("internvl3.5-1b", 2, 2, 1_060_897_792),
        ("internvl3.5-38b", 8, 3, 38_390_405_504),
    ],
)
def test_every_rank_is_built_and_adds_up(size, tensor, pipeline, total):
    """Qwen2.5-VL 3B: tied embeddings, 2 key/value heads under 4 tensor ranks. Qwen3-VL 2B and 4B: tied as well."""
    path = MODELS / size
    ranks = list(range(tensor * pipeline))
    counts = run_ranks(1, build_every_rank, str(path), tensor, pipeline, ranks)[0]
    layout = RankLayout(0, tensor * pipeline, tensor, pipeline)
    stages = stage_parameters(read_shape(str(path)), layout)
    for rank in ranks:
        assert counts[rank] == stages[layout.with_rank(rank).pipeline_rank].per_tensor_rank
    assert sum(stage.unique for stage in stages) == total


def test_zero3_shares_add_up_to_the_whole():
    layout = RankLayout(0, 64, 8, 2)
    for stage in stage_parameters(read_shape(str(MODELS / "qwen2.5-vl-72b")), layout):
        padding = layout.data_size * stage.per_rank - stage.per_tensor_rank
        assert 0 <= padding < layout.data_size * 2000
