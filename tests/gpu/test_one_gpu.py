"""What only an accelerator shows: bf16, NCCL with one rank, SDPA's fused kernels. Skipped, and counted, without one."""

import math

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_a_whole_run_in_bfloat16(material, tmp_path):
    """Rollout, old and reference passes, updates, evaluation, export on one GPU."""
    from tests.distributed.runner import run_ranks
    from tests.integration.cases import RL, run_training, write_config

    path, overrides = write_config(tmp_path, RL, material["tiny"], material["data"], "rl")
    run_ranks(1, run_training, path, overrides + ["model.dtype=bfloat16", f"train.output_dir={tmp_path}/run"])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert all(math.isfinite(event.value) for event in events.Scalars("grad_norm"))
    assert all(event.value == 0 for event in events.Scalars("attention/divergence_first_update"))
    assert (tmp_path / "run" / "hf" / "config.json").is_file()
