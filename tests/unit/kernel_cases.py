"""Cases of test_attention_kernels.py, run with TRITON_INTERPRET=1 in a process of their own: Triton reads that variable
when it is imported, and torch imports Triton on its own account.

    python -m tests.unit.kernel_cases FILE     saves {case: {name: (ours, wanted)}}, and under "faults" what
                                               `backend_fault` says of kernels as they are, and damaged
"""

import sys
import time

import torch

from megatron_ral.attention import triton_backend
from megatron_ral.attention.backend import Compared
from megatron_ral.attention.backend_check import backend_fault
from megatron_ral.attention.distribution import attention_distribution
from megatron_ral.attention.divergence import DIVERGENCES
from megatron_ral.attention.formulas_check import formulas_fault
from megatron_ral.attention.rows import head_mean_attention, row_divergence
from megatron_ral.attention.torch_backend import TorchBackend
from megatron_ral.attention.torch_formulas import TorchFormulas
from megatron_ral.attention.triton_formulas import TritonFormulas
from megatron_ral.attention.types import RowKeys
from tests.unit.test_attention_rows import another_policy, head_shard, random_qk, random_weights, row_keys

KERNELS = triton_backend.TritonBackend()
FORMULAS = TritonFormulas()
EVERY_COLUMN = RowKeys(torch.ones(1, 40, dtype=torch.bool))


def both(qk, keys, target, kind) -> dict:
    """Rows, values and gradients by the kernels and by PyTorch."""
    found, weights = [], random_weights(qk).float()
    for backend in (KERNELS, TorchBackend()):
        attention = head_mean_attention(qk, backend)
        value = row_divergence(qk, attention, target, keys, kind, backend)
        found.append((attention, value, *torch.autograd.grad((value * weights).sum(), qk[:3])))
    return dict(zip(("rows", "values", "query", "prompt_key", "response_key"), zip(*found)))


def compared(rows="token", kind="jsd", columns="all", own=True, **shape) -> dict:
    qk = random_qk(rows, **{"B": 2, "G": 2, "R": 3, "k": 2, "m": 2, "dtype": torch.float32, **shape})
    keys = row_keys(qk, rows, columns, own)
    return both(qk, keys, another_policy(qk, keys, rows), kind)


def several_tiles(dtype=torch.float32, R=40, P=70, length=50, **options) -> dict:
    """More rows and keys than a tile has, a tile of prompt keys that is padding, a query with foreign strides."""
    qk = random_qk(B=1, R=R, P=P, D=80, k=1, m=2, dtype=dtype, **options)
    query = qk.query_BGRnD.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    qk = qk._replace(query_BGRnD=query, prompt_lengths_B=torch.tensor([length]), scale=0.1)
    keys = RowKeys(torch.ones(1, P + R, dtype=torch.bool), P + torch.arange(R)[None])
    other = random_qk(B=1, R=R, P=P, D=80, k=1, m=2, dtype=dtype, seed=1, **options)._replace(
        prompt_lengths_B=torch.tensor([length]), scale=0.1
    )
    return both(qk, keys, attention_distribution(head_mean_attention(other), keys)[0], "jsd")


def blocks_of_rows() -> dict:
    """The slope's map in three parts."""
    whole, triton_backend.SLOPE_ELEMENTS = triton_backend.SLOPE_ELEMENTS, 20 * 50
    try:
        return several_tiles(P=10, length=8, G=1)
    finally:
        triton_backend.SLOPE_ELEMENTS = whole


def head_shards() -> dict:
    """Two tensor ranks: parts are summed before the divergence, gradients are slices."""
    qk = random_qk(B=1, G=2, R=3, k=2, m=2, dtype=torch.float32)
    keys, weights = row_keys(qk), random_weights(qk).float()
    target = another_policy(qk, keys)
    wanted = both(qk, keys, target, "jsd")
    shards = [head_shard(qk, rank, 2) for rank in range(2)]
    attention = sum(head_mean_attention(shard, KERNELS) for shard in shards)
    values = [row_divergence(shard, attention, target, keys, "jsd", KERNELS) for shard in shards]
    found = [
        torch.cat(parts, dim=-2)
        for parts in zip(
            *(torch.autograd.grad((value * weights).sum(), shard[:3]) for value, shard in zip(values, shards))
        )
    ]
    return {name: (ours, wanted[name][1]) for name, ours in zip(wanted, (attention, values[0], *found))}


def silent() -> dict:
    """The first group has no mass on its keys, the second's rows equal their target bit for bit."""
    qk = random_qk(B=2, G=1, R=3, k=1, m=2, dtype=torch.float32)
    keys = row_keys(qk)._replace(columns_BS=torch.tensor([[False] * 8, [True] * 8]))
    target = attention_distribution(head_mean_attention(qk, KERNELS), keys)[0]
    target[0] = 1 / 8
    result = both(qk, keys, target, "jsd")
    return {name: (ours, ours if name == "rows" else torch.zeros_like(ours)) for name, (ours, _) in result.items()}


def formulas(P: int, R: int, own: bool, expanded: bool) -> dict:
    """Every formula over rows of several blocks, by the kernels and by PyTorch, with strides of a larger map."""
    B, G, generator = 2, 3, torch.Generator().manual_seed(P)
    attention, other = torch.rand(2, B, G, R + 1, P + R, generator=generator)[:, :, :, 1:].pow(8)
    attention[0, 0, 0] = 0.0  # a row without mass
    attention[0, 0, -1, P // 2] = 1e-30
    columns = torch.rand(B, P + R, generator=generator) < 0.9
    keys = RowKeys(columns, P + torch.arange(R).expand(B, R) if own else None)
    visual = torch.rand(B, P, generator=generator) < 0.5
    found = {}
    for name, by in (("ours", FORMULAS), ("wanted", TorchFormulas())):
        target = by.distribution(other[:, :, :1] if expanded else other, keys._replace(own_BR=None))[0].expand(
            attention.shape
        )
        near = (attention * (1.0 + 0.1 * torch.linspace(0.0, 50.0, P + R).sin())).nan_to_num()
        near /= near.sum(-1, keepdim=True).clamp(min=1e-30)
        target = torch.where(torch.arange(G)[:, None, None] == 1, near, target)
        result = {
            "mass": by.key_mass(attention, keys),
            "distribution": by.distribution(attention, keys)[0],
            "masses": by.masses(attention, keys, visual, visual & (torch.arange(P) < 9)),
        }
        for kind in DIVERGENCES:
            result[f"{kind} value"], mass = by.divergence(attention, target, keys, kind)
            rows = Compared(attention, mass, target, keys, kind)
            grad = torch.linspace(-1.0, 1.0, mass.numel()).view_as(mass)
            result[f"{kind} slope"] = by.slope(rows, grad, (slice(0, 2), slice(1, 3), slice(1, R)))
        found[name] = result
    return {name: (ours, found["wanted"][name]) for name, ours in found["ours"].items()}


def equal_rows() -> dict:
    """Rows that equal their target bit for bit, in another place of the map and another block."""
    rows = torch.rand(1, 1, 4, 1500, generator=torch.Generator().manual_seed(0))
    keys = RowKeys(torch.ones(1, 1500, dtype=torch.bool), torch.arange(4)[None] + 900)
    target = torch.cat(
        [
            FORMULAS.distribution(rows[:, :, r : r + 1], keys._replace(own_BR=keys.own_BR[:, r : r + 1]))[0]
            for r in range(4)
        ],
        2,
    )
    found = {}
    for kind in ("jsd", "forward_kl", "reverse_kl"):
        value, mass = FORMULAS.divergence(rows, target, keys, kind)
        compared = Compared(rows, mass, target, keys, kind)
        slope = FORMULAS.slope(compared, torch.ones_like(mass), (slice(0, 1), slice(0, 1), slice(1, 3)))
        found |= {f"{kind} value": (value, torch.zeros_like(value)), f"{kind} slope": (slope, torch.zeros_like(slope))}
    return found


def not_finite() -> dict:
    """A row with NaN has a mass and a distribution that are NaN, and is not compared, as in PyTorch."""
    rows = torch.rand(1, 1, 3, 40, generator=torch.Generator().manual_seed(0))
    target = TorchFormulas().distribution(rows.flip(-1), EVERY_COLUMN)[0]
    rows[0, 0, 1, 7] = torch.nan
    found = []
    for by in (FORMULAS, TorchFormulas()):
        value, mass = by.divergence(rows, target, EVERY_COLUMN, "jsd")
        found.append((mass, by.distribution(rows, EVERY_COLUMN)[0], value))
    return dict(zip(("mass", "distribution", "value"), zip(*found)))


def formula_faults() -> list:
    """Return what `formulas_fault` says of good formulas, of one that is off by 1 %, of one that raises."""

    class Damaged(TritonFormulas):
        def key_mass(self, attention_BGRS, keys):
            return super().key_mass(attention_BGRS, keys) * 1.01

    class Raising(TritonFormulas):
        def slope(self, rows, grad_BGR, block):
            raise RuntimeError("no such\ninstruction")

    return [formulas_fault(each, torch.device("cpu")) for each in (FORMULAS, Damaged(), Raising())]


def faults() -> list:
    """Of good kernels, of one that is off by 1 %, of one that raises."""

    def refuses(qk):
        raise RuntimeError("no such\ninstruction")

    arguments, good = (KERNELS, torch.device("cpu"), torch.float32, 16), triton_backend.head_mean_rows
    found = [backend_fault(*arguments)]
    for damaged in (lambda qk: good(qk) * 1.01, refuses):
        triton_backend.head_mean_rows = damaged
        found.append(backend_fault(*arguments))
    triton_backend.head_mean_rows = good
    return found


CASES = {
    "token": lambda: compared(),
    "predictor": lambda: compared("predictor", "forward_kl", "visual"),
    "prompt alone": lambda: compared("prompt alone", "reverse_kl", own=False),
    "four heads of a key": lambda: compared("predictor", "jsd", "prompt", k=1, m=4, B=1, G=3),
    "bfloat16": lambda: compared(dtype=torch.bfloat16, D=8, B=1),
    "float16": lambda: compared(dtype=torch.float16, D=8, B=1),
    "several tiles": lambda: several_tiles(G=2),
    "blocks of rows": blocks_of_rows,
    "head shards": head_shards,
    "silent": silent,
}
FORMULA_CASES = {
    "few keys": lambda: formulas(9, 4, True, False),
    "several blocks": lambda: formulas(2500, 5, True, False),
    "one target of all": lambda: formulas(1030, 3, False, True),
    "equal rows": equal_rows,
    "not finite": not_finite,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {}
    for name, case in (CASES | FORMULA_CASES).items():
        start = time.perf_counter()
        results[name] = case()
        print(f"{name}: {time.perf_counter() - start:.1f} s")
    torch.save(
        {
            "faults": faults(),
            "formula faults": formula_faults(),
            **{
                name: {key: tuple(tensor.detach() for tensor in pair) for key, pair in case.items()}
                for name, case in results.items()
            },
        },
        sys.argv[1],
    )
