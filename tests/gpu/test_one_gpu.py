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
    from megatron_ral.attention.distribution import attention_distribution
    from megatron_ral.attention.rows import head_mean_attention, row_divergence
    from megatron_ral.attention.torch_backend import TorchBackend
    from megatron_ral.attention.triton_backend import TritonBackend
    from megatron_ral.attention.types import RowKeys, RowQK

    B, G, R, P, k, n = 2, 2, 150, 300, 2, 14
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(*shape, generator=generator).to("cuda", dtype).requires_grad_()

    qk = RowQK(
        make(B, G, R, n, width),
        make(B, P, k, width),
        make(B, G, R, k, width),
        torch.tensor([P, 130], device="cuda"),
        lag,
        width**-0.5,
        n,
    )
    own = torch.arange(R, device="cuda").expand(B, R) + P - lag
    own = torch.where(own < P, qk.prompt_lengths_B[:, None] - 1, own)
    keys = RowKeys(torch.ones(B, P + R, dtype=torch.bool, device="cuda"), own)
    other = head_mean_attention(qk._replace(query_BGRnD=make(B, G, R, n, width)), TorchBackend())
    target, weights = attention_distribution(other, keys)[0], torch.rand(B, G, R, generator=generator).cuda()

    def everything(backend):
        attention = head_mean_attention(qk, backend)
        value = row_divergence(qk, attention, target, keys, backend=backend)
        return attention, value.detach(), *torch.autograd.grad((value * weights).sum(), qk[:3])

    ours, again, wanted = everything(None), everything(TritonBackend()), everything(TorchBackend())
    for place, (found, same, reference) in enumerate(zip(ours, again, wanted)):
        assert torch.equal(found, same) and found.dtype == reference.dtype
        limit = bound if place >= 2 else 1e-5
        difference = (found - reference).float().norm() / reference.float().norm()
        assert difference < limit and reference.abs().max() > 0, (place, float(difference))
    assert torch.equal(ours[0] == 0, wanted[0] == 0)
