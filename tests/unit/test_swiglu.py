"""The gated linear unit: values, gradients and what it keeps, against PyTorch's own operations."""

import pytest
import torch
import torch.nn.functional as F

from megatron_ral.models.swiglu import SwiGlu


def by_hand(product: torch.Tensor) -> torch.Tensor:
    gate, up = product.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_bit_identical(dtype):
    product = (4 * torch.randn(3, 2, 10, generator=torch.Generator().manual_seed(0))).to(dtype)
    weights, results = torch.randn(3, 2, 5, dtype=dtype), []
    for function in (SwiGlu(), by_hand):
        leaf = product.clone().requires_grad_()
        value = function(leaf)
        results.append((value, *torch.autograd.grad((value * weights).sum(), leaf)))
    for ours, wanted in zip(*results):
        assert torch.equal(ours, wanted)


def test_gradcheck():
    product = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SwiGlu(), (product,))


def halves_kept(function) -> float:
    """Return the elements kept for the backward pass over those of one half."""
    storages = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function(torch.randn(4, 6, requires_grad=True) * 2)
    return sum(storages.values()) / (12 * 4)


def test_only_the_product_is_kept():
    assert (halves_kept(SwiGlu()), halves_kept(by_hand)) == (2, 3)
