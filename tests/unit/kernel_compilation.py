"""Compile the attention kernels for an H100 without one, in a process in which Triton does not interpret.

python -m tests.unit.kernel_compilation     prints a line of JSON for every kernel
"""

import json

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_ral.attention import triton_formula_kernels as formula_kernels
from megatron_ral.attention import triton_kernels as kernels
from megatron_ral.attention.divergence import DIVERGENCES
from megatron_ral.attention.triton_formulas import _BLOCK

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

FORMULAS = [
    ("_mass_of_rows", {}),
    ("_mass_of_rows", {"OWN": False}),
    ("_distribution_of_rows", {}),
    ("_masses_of_rows", {}),
    *((name, {"KIND": kind}) for name in ("_divergence_of_rows", "_slope_of_rows") for kind in DIVERGENCES),
    *((name, {"KIND": "jsd", "OWN": False, "G": 1, "R": 1}) for name in ("_divergence_of_rows", "_slope_of_rows")),
]


def compiled(name: str, flags: dict, dtype: torch.dtype, width: int):
    """For compute capability 9.0, with strides and addresses divisible by 16 as in a model."""
    tile, function = kernels.tile_of(dtype, width)._asdict(), getattr(kernels, name)
    options = {option: tile.pop(option) for option in ("num_warps", "num_stages")}
    known = {**flags, **tile, "D": width}
    kinds = {
        **dict.fromkeys(("query", "prompt", "response", "keys"), "*" + NAMES[dtype]),
        **dict.fromkeys(("slope", "normaliser", "inner", "result"), "*fp32"),
        "lengths": "*i64",
        "scale": "fp32",
    }
    return machine_code(function, known, kinds, options)


def compiled_formula(name: str, flags: dict):
    """A kernel of formulas, as `triton_formulas.py` launches it."""
    own = flags.setdefault("OWN", True)
    kinds = {
        **dict.fromkeys(("attention", "result", "mass_of", "grad"), "*fp32"),
        **dict.fromkeys(("columns", "visual"), "*u8"),
        "own": "*i64" if own else "*u8",
        "target": "*u8" if name == "_masses_of_rows" else "*fp32",
    }
    return machine_code(getattr(formula_kernels, name), {**flags, "BLOCK": _BLOCK}, kinds, {})


def machine_code(function, known: dict, kinds: dict[str, str], options: dict):
    """Compile a kernel. Arguments that are neither `known` nor in `kinds` are whole numbers."""
    constants, signature, facts = {key: known[key] for key in function.arg_names if key in known}, {}, {}
    for place, argument in enumerate(function.arg_names):
        kind = signature[argument] = "constexpr" if argument in constants else kinds.get(argument, "i32")
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
    for name, flags in FORMULAS:
        made = compiled_formula(name, flags)
        spilled = made.asm["ptx"].count(".local")
        print(json.dumps({"formula": name, **flags, "cubin": len(made.asm["cubin"]), "local": spilled}), flush=True)
