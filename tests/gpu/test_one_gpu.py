"""Things only an accelerator shows: bf16, NCCL with one rank, SDPA's fused kernels, Triton's. Else skipped, counted."""

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


@pytest.mark.parametrize(
    "dtype, width, bound",
    [(torch.float32, 64, 1e-5), (torch.float32, 80, 1e-5), (torch.bfloat16, 128, 2e-2), (torch.float16, 128, 5e-3)],
)
@pytest.mark.parametrize("lag", [0, 1])
def test_attention_kernels_equal_pytorch(dtype, width, bound, lag):
    """Rows, values, gradients, with grouped heads, padded prompts and several tiles; the same bits on a second run."""
    from megatron_ral.attention.torch_backend import TorchBackend
    from megatron_ral.attention.triton_backend import TritonBackend
    from tools.acceptance.kernels import everything, make_case, target_of

    qk, keys, other = make_case(torch.device("cuda"), dtype, width, lag)
    target = target_of(qk, keys, other)
    backends = None, TritonBackend(), TorchBackend()
    ours, again, wanted = (everything(qk, keys, target, backend) for backend in backends)
    for place, (found, same, reference) in enumerate(zip(ours, again, wanted)):
        assert torch.equal(found, same) and found.dtype == reference.dtype
        limit = bound if place >= 2 else 1e-5
        difference = (found - reference).float().norm() / reference.float().norm()
        assert difference < limit and reference.abs().max() > 0, (place, float(difference))
    assert torch.equal(ours[0] == 0, wanted[0] == 0)


@pytest.mark.parametrize("sizes, padding", [((3, 300, 70, 8, 2, 128), 0), ((2, 257, 33, 6, 2, 80), 13)])
def test_joined_flash_attention_equals_float64(sizes, padding):
    from tools.acceptance.flash_join import errors

    found = errors("cuda", torch.bfloat16, sizes, padding)
    assert all(error < 2e-2 for error in found.values()), found


@pytest.mark.parametrize("rows, keys", [(64, 64), (64, 704), (192, 2752)])
def test_attention_backends_that_are_left_on_give_no_nan(rows, keys):
    from torch.nn.attention import SDPBackend

    from megatron_ral.parallel.process_groups import start_groups, stop_groups
    from tools.acceptance.environment import enabled_backends
    from tools.acceptance.sdpa_nan import inputs, outcome

    start_groups(tensor_size=1, pipeline_size=1, seed=0)
    left_on = enabled_backends()
    stop_groups()
    assert "CUDNN_ATTENTION" not in left_on
    for name in left_on:
        assert outcome(SDPBackend.__members__[name], inputs("cuda", 4, rows, keys)) in ("finite", "refuses"), name


def test_decoding_from_a_graph_draws_the_same_tokens(material):
    from megatron_ral.engine.decoding_batch import SamplingSettings
    from megatron_ral.engine.pipelined_decoder import sample_responses
    from megatron_ral.parallel.process_groups import stop_groups
    from tests.distributed.cases import open_policy
    from tests.distributed.test_generation import IDENTITY, R, read
    from tools.acceptance.decode import recording

    path = str(material["tiny"])
    policy, prompts, found = open_policy(path, 1, 1, dtype="bfloat16")[3], read(path), []
    settings = SamplingSettings(3, R, -1, 0)
    with policy.resident():
        for is_on in (False, True):
            with recording(is_on) as made:
                found.append([batch for batch, _ in sample_responses(policy, prompts, settings, 3, *IDENTITY)])
    stop_groups()
    assert made, "nothing was recorded"
    for plain, replayed in zip(*found, strict=True):
        assert torch.equal(plain.response_ids, replayed.response_ids)
        assert torch.equal(plain.rollout_logprobs, replayed.rollout_logprobs)
