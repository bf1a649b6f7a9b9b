"""Attention of responses in two fused calls, against one call with a dense mask: values and all gradients."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from megatron_ral.attention.group_layout import GroupLayout, PackedGroups
from megatron_ral.attention.shared_prompt import (
    LEAST_KEYS_ON_CPU,
    CpuKernel,
    FlashKernel,
    GroupTensors,
    kernel_for,
    shared_prompt_attention,
)
from megatron_ral.models.instrumented_attention import InstrumentedAttention


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("G, P, R, heads, kv, D", [(3, 7, 5, 4, 2, 8), (2, 9, 1, 6, 2, 16), (1, 4, 6, 3, 3, 8)])
@pytest.mark.parametrize("padding, cut", [(0, 0), (3, 0), (0, 1), (3, 1)])
def test_two_calls_equal_a_dense_mask(dtype, tolerance, G, P, R, heads, kv, D, padding, cut):
    torch.manual_seed(0)
    config = SimpleNamespace(context_parallel_size=1, attention_dropout=0.0, kv_channels=D, num_attention_heads=heads)
    attention = InstrumentedAttention(config, 1, AttnMaskType.causal, "self")
    lengths = torch.full((2, G), R)
    lengths[1, 0], lengths[0, -1] = max(R - 4 * cut, 1), max(R - 2 * cut, 1)
    sizes = torch.tensor([P, P - padding]), lengths, P, R
    layout = GroupLayout(*sizes, PackedGroups.of(*sizes))
    shapes = (int(lengths.sum()), heads, D), (2, P, kv, D), (2, P, kv, D), (2, G, R, kv, D), (2, G, R, kv, D)
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    weights, found = torch.randn(shapes[0], dtype=dtype), []
    for two_calls in (True, False):
        inputs = [tensor.clone().requires_grad_() for tensor in tensors]
        if two_calls:
            output = shared_prompt_attention(GroupTensors(*inputs), layout, attention.softmax_scale, CpuKernel())
        else:
            output = attention._dense(GroupTensors(*inputs), layout)
        found.append((output, *torch.autograd.grad((output * weights).sum(), inputs)))
    for mine, dense in zip(*found):
        torch.testing.assert_close(mine, dense, rtol=tolerance, atol=tolerance)
    if padding:
        assert not found[0][2][1, P - padding :].any(), "padding has no gradient"


def test_kernels_are_chosen_by_device_and_length():
    assert kernel_for(torch.empty(1, 4, 8), LEAST_KEYS_ON_CPU - 1) is None
    assert isinstance(kernel_for(torch.empty(1, 4, 8), LEAST_KEYS_ON_CPU), CpuKernel)

    def on_gpu(dtype, width):
        return kernel_for(SimpleNamespace(device=torch.device("cuda"), is_cuda=True, dtype=dtype, shape=(1, width)), 1)

    assert isinstance(on_gpu(torch.bfloat16, 128), FlashKernel)
    assert on_gpu(torch.float32, 128) is None and on_gpu(torch.bfloat16, 20) is None
