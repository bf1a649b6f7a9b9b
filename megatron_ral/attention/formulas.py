"""Choice of what computes formulas over rows: Triton kernels where they run and agree with PyTorch, else PyTorch."""

import functools
import importlib.util
import logging

import torch
from torch import Tensor

from megatron_ral.attention.backend import RowFormulas
from megatron_ral.attention.formulas_check import formulas_fault
from megatron_ral.attention.torch_formulas import TorchFormulas

logger = logging.getLogger(__name__)

_PYTORCH = TorchFormulas()


def choose_formulas(rows: Tensor) -> RowFormulas:
    """Return what computes the formulas over a map of rows: Triton kernels for float32 on a GPU, else PyTorch."""
    if not rows.is_cuda or rows.dtype != torch.float32:
        return _PYTORCH
    return _of_device(rows.device)


@functools.cache
def _of_device(device: torch.device) -> RowFormulas:
    """Choose for a GPU. Warns where it has to do without the kernels."""
    if importlib.util.find_spec("triton") is None:
        return _PYTORCH  # `rows.choose_backend` says so
    from megatron_ral.attention.triton_formulas import TritonFormulas

    kernels = TritonFormulas()
    fault = formulas_fault(kernels, device)
    if fault:
        logger.warning("formulas over attention rows on %s: PyTorch, because the Triton kernels %s", device, fault)
    return _PYTORCH if fault else kernels
