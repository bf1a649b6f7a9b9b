"""Compile the attention kernels for an H100 without one, in a process in which Triton does not interpret.

python -m tests.unit.kernel_compilation     prints a line of JSON for every kernel
"""

import json

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_ral.attention import triton_kernels as kernels

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
EVERY = [
    ("_row_statistics", {"SLOPE": False}),
    ("_row_statistics", {"SLOPE": True}),
    ("_head_mean", {"PROMPT": True}),
    ("_head_mean", {"PROMPT": False}),
    ("_query_gradient", {}),
    ("_key_gradient", {"PROMPT": True}),
    ("_key_gradient", {"PROMPT": False}),
]
LARGEST = [("_query_gradient", {}), ("_key_gradient", {"PROMPT": True})]
ONES = [(name, {**flags, **dict.fromkeys(("G", "R", "N", "shared", "lag", "total_heads"), 1)}) for name, flags in EVERY]
"""Triton makes constants of arguments that are 1: one response of one row (`last_prompt`), one head."""
WANTED = [
    (torch.bfloat16, 128, EVERY),
    (torch.bfloat16, 80, LARGEST),
    (torch.float16, 128, LARGEST[1:]),
    (torch.float16, 64, LARGEST + ONES),
    (torch.float32, 128, LARGEST[1:]),
]
"""The gradients' kernels need the most memory; each takes seconds, so not every type has all."""


def compiled(name: str, flags: dict, dtype: torch.dtype, width: int):
    """For compute capability 9.0, with strides and addresses divisible by 16 as in a model."""
    tile, function = kernels.tile_of(dtype, width)._asdict(), getattr(kernels, name)
    options = {option: tile.pop(option) for option in ("num_warps", "num_stages")}
    known = {**flags, **tile, "D": width}
    constants, signature, facts = {key: known[key] for key in function.arg_names if key in known}, {}, {}
    for place, argument in enumerate(function.arg_names):
        if argument in constants:
            kind = "constexpr"
        elif argument in ("query", "prompt", "response", "keys"):
            kind = "*" + NAMES[dtype]
        else:
            kind = {
                "lengths": "*i64",
                "slope": "*fp32",
                "normaliser": "*fp32",
                "inner": "*fp32",
                "result": "*fp32",
                "scale": "fp32",
            }.get(argument, "i32")
        signature[argument] = kind
        if kind.startswith("*") or argument[1:2] == "_":
            facts[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, facts)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


if __name__ == "__main__":
    for dtype, width, these in WANTED:
        for name, flags in these:
            made = compiled(name, flags, dtype, width)
            print(
                json.dumps(
                    {
                        **flags,
                        "kernel": name,
                        "type": NAMES[dtype],
                        "width": width,
                        "shared": made.metadata.shared,
                        "cubin": len(made.asm["cubin"]),
                        "products": made.asm["ptx"].count("wgmma.mma_async"),
                    }
                ),
                flush=True,
            )
