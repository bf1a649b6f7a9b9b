"""Masked attention whose rows have a very small normaliser: which SDPA backend gives NaN (pytorch#196678).

cuDNN's backward pass gives NaN in the gradient of the queries where a mask is given and a row's log-sum-exp is below
-88.7. Heads with large biases reach that, Qwen2.5's among them. The project switches cuDNN off. This part says whether
the others are sound for Lq != Lk, which the issue did not try, and whether cuDNN may be switched on again.
"""

import math
from typing import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tools.acceptance.environment import WIDTH, enabled_backends
from tools.acceptance.part import Figure, Setting, expect, note, start

LENGTHS = ((64, 64), (64, 704), (192, 2752), (1024, 3520))
"""Rows and keys. The padded key length that fails in the issue is 64 beyond a multiple of 128."""
SCORE = -120.0
"""Score of every visible key, so that a row's log-sum-exp is about -112."""


def inputs(device: str, heads: int, rows: int, keys: int) -> tuple[torch.Tensor, ...]:
    """Return query, key, value and a causal mask over the last rows, with scores near `SCORE`."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size = math.sqrt(-SCORE / math.sqrt(WIDTH))

    def make(length: int, mean: float) -> torch.Tensor:
        noise = torch.randn(1, heads, length, WIDTH, generator=generator)
        return (0.1 * noise + mean).to(device, dtype).requires_grad_()

    query, key, value = make(rows, size), make(keys, -size), make(keys, 0.0)
    steps = torch.arange(rows, device=device)[:, None] + keys - rows
    return query, key, value, (torch.arange(keys, device=device) <= steps)[None, None]


def outcome(backend: SDPBackend, tensors: tuple[torch.Tensor, ...]) -> str:
    """Return "finite", what is not finite, or "refuses" where the backend takes no such call."""
    query, key, value, mask = tensors
    try:
        with sdpa_kernel(backend):
            output = scaled_dot_product_attention(query, key, value, attn_mask=mask)
            gradients = torch.autograd.grad(output.float().square().sum(), (query, key, value))
    except RuntimeError as error:
        return (
            "refuses" if "No available kernel" in str(error) or "No viable backend" in str(error) else f"{error}"[:80]
        )
    parts = zip(("output", "dQ", "dK", "dV"), (output, *gradients))
    faults = [name for name, tensor in parts if not bool(tensor.isfinite().all())]
    return f"NaN in {', '.join(faults)}" if faults else "finite"


def run(setting: Setting) -> Iterator[Figure]:
    """Yield the outcome of each backend, the worst of its lengths."""
    if setting.on_gpu:
        start()  # cuDNN is switched off
    left_on = enabled_backends()
    names = ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"] if setting.on_gpu else ["MATH"]
    heads, lengths = (28, LENGTHS) if setting.on_gpu else (2, LENGTHS[:2])
    if not setting.on_gpu:
        names.append("FLASH_ATTENTION")
    for name in names:
        found = {size: outcome(SDPBackend.__members__[name], inputs(setting.device, heads, *size)) for size in lengths}
        text = "; ".join(f"{rows}x{keys} {result}" for (rows, keys), result in found.items())
        text = next(iter(found.values())) if len(set(found.values())) == 1 else text
        if name in left_on or not setting.on_gpu:
            yield expect(name, text, all(result in ("finite", "refuses") for result in found.values()), "no NaN")
        else:
            yield note(name, text, "", "switched off by the project")
