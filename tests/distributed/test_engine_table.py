"""Every layout with every way to save memory gives, after three AdamW steps, one process's weights on the whole batch.

TP x PP x DP in {1, 2}^3, with and without sequence parallelism, recomputation, offload (of optimizer and parameters),
layers gathered one by one and communication that overlaps, in 1 and 5 micro-batches per rank. All combinations are 384
cases; the suite runs a part in which every pair of settings occurs with one tensor rank and with two, and every value
in every layout, `MEGATRON_RAL_TEST_TABLE=full` all of them.
"""

import itertools

import pytest

from megatron_ral.parallel.process_groups import start_groups, stop_groups
from tests.distributed.cases import one_step
from tests.distributed.runner import run_ranks
from tests.tiers import IS_FULL, chosen

LAYOUTS = list(itertools.product((1, 2), repeat=3))
SETTINGS = ("sequence_parallel", "recompute", "offload", "layerwise", "overlap", "micro_batches")
# Rows of an orthogonal array: every pair of settings takes every pair of values.
PAIRS = [
    (False, False, False, False, False, 1),
    (False, False, True, False, True, 5),
    (False, True, False, True, False, 5),
    (False, True, True, True, True, 1),
    (True, False, False, True, True, 1),
    (True, False, True, True, False, 5),
    (True, True, False, False, True, 5),
    (True, True, True, False, False, 1),
]
HALVES = (0, 3, 5, 6), (1, 2, 4, 7)
NUM_GROUPS = 10
NAMES = ("grad_norm", "loss/policy", "kl", "loss/attention", "entropy", "attention/divergence")


def cases_of(tensor: int, pipeline: int, data_size: int) -> list[tuple]:
    """(sequence parallel, recompute, offload, layer by layer, overlap, micro-batches) of a layout.

    A layout takes one half of the array or the other. Each half has every value of every setting.
    """
    rows = [PAIRS[index] for index in HALVES[(pipeline + data_size) % 2]]
    if IS_FULL:
        rows = list(itertools.product(*[(False, True)] * 5, (1, 5)))
    return rows if tensor > 1 else list(dict.fromkeys((False, *row[1:]) for row in rows))


def run_cases(
    path: str, other: str, data: str, tensor: int, pipeline: int, data_size: int, dtype: str, cases: list[tuple]
) -> list[dict]:
    """Results of all cases in one start of the processes."""
    process_groups = start_groups(tensor_size=tensor, pipeline_size=pipeline, seed=0)
    results = []
    for sequence_parallel, recompute, offload, layerwise, overlap, micro_batches in cases:
        parallel = {
            "recompute_activations": recompute,
            "offload_optimizer": offload,
            "offload_parameters": offload,
            "gather": "layer" if layerwise else "stage",
            "overlap_communication": overlap,
        }
        size = NUM_GROUPS // data_size // micro_batches
        results.append(
            one_step(
                path,
                other,
                data,
                tensor,
                pipeline,
                size,
                3,
                (-1, 1),
                sequence_parallel,
                (),
                process_groups,
                parallel=parallel,
                dtype=dtype,
                num_groups=NUM_GROUPS,
                learning_rate=1e-4,
                measures_attention=False,
            )
        )
    stop_groups()
    return results


@pytest.fixture(scope="module")
def table_material(material, tmp_path_factory):
    """The policy, and as old policy and reference a near one: log-ratios as a run has them."""
    from tests.conftest import perturbed_copy

    near = perturbed_copy(material["tiny"], tmp_path_factory.mktemp("near") / "near", scale=0.004, seed=8)
    return str(material["tiny"]), str(near), str(material["data"])


@pytest.fixture(scope="module")
def alone(table_material):
    """One process on the whole batch in one micro-batch, by precision."""
    plain = [(False, False, False, False, False, 1)]
    return {
        dtype: run_ranks(1, run_cases, *table_material, 1, 1, 1, dtype, plain)[0][0]
        for dtype in ("float32", "bfloat16")
    }


def largest(ours: dict, wanted: dict) -> float:
    """Largest difference of a tensor relative to its norm; what is 0 in one must be in the other."""
    assert ours.keys() - {"tied copy"} == wanted.keys() - {"tied copy"}
    assert all(not ours[name].any() for name, value in wanted.items() if not value.any())
    return max(float((ours[name] - value).norm() / value.norm()) for name, value in wanted.items() if value.any())


def overall(ours: dict, wanted: dict) -> float:
    """Difference of all tensors together relative to their norm."""

    def norm(tensors) -> float:
        return sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5

    return norm(ours[name] - value for name, value in wanted.items()) / norm(wanted.values())


@pytest.mark.parametrize("tensor, pipeline, data_size", LAYOUTS)
def test_three_steps_equal_one_process(table_material, alone, tensor, pipeline, data_size):
    cases = cases_of(tensor, pipeline, data_size)
    world = tensor * pipeline * data_size
    ranks = run_ranks(
        world,
        run_cases,
        *table_material,
        tensor,
        pipeline,
        data_size,
        "float32",
        cases,
        timeout=60.0 + 20.0 * world * len(cases),
    )
    wanted = alone["float32"]
    assert all(abs(wanted["history"][0][name]) > 1e-4 for name in NAMES), "a comparison with nothing"
    for number, case in enumerate(cases):
        text = ", ".join(f"{name} {value}" for name, value in zip(SETTINGS, case))
        for rank, results in enumerate(ranks):
            for step, history in enumerate(results[number]["history"]):
                for name in NAMES:
                    ours, value = history[name], wanted["history"][step][name]
                    limit = 1e-6 if name == "grad_norm" else 1e-5
                    assert abs(ours / value - 1) <= limit, (
                        f"{text}: rank {rank}, step {step}, {name} {ours}, not {value}"
                    )
        result = ranks[0][number]
        assert largest(result["gradient"], wanted["gradient"]) <= 1e-5, text
        assert largest(result["weights"], wanted["weights"]) <= 1e-5, text
        assert largest(result["changes"], wanted["changes"]) <= 1e-3, text


@pytest.mark.parametrize("tensor, pipeline, data_size", chosen(LAYOUTS[1:], [(1, 1, 2), (1, 2, 1), (2, 2, 2)]))
def test_bfloat16_differs_from_one_process_by_its_rounding(table_material, alone, tensor, pipeline, data_size):
    """Tolerances, of the first step: its terms and norm 4 % (seen: 2.6 % of the attention loss, whose terms have both
    signs, and 0.6 % of the others), the gradient as a whole 15 % and less than bfloat16 itself differs from float32
    (19 %); without tensor parallelism, where no sum is split but micro-batches are padded otherwise, the gradient 3
    %. After three steps: norms 10 %, float32 master weights 0.2 %."""
    cases = [(tensor > 1, False, False, False, True, 1), (False, True, True, True, True, 5)]
    world = tensor * pipeline * data_size
    results = run_ranks(
        world,
        run_cases,
        *table_material,
        tensor,
        pipeline,
        data_size,
        "bfloat16",
        cases,
        timeout=60.0 + 20.0 * world * len(cases),
    )[0]
    wanted, exact = alone["bfloat16"], alone["float32"]
    rounding = overall(wanted["gradient"], exact["gradient"])
    assert 0.01 < rounding < 0.25
    for case, result in zip(cases, results):
        for step, history in enumerate(result["history"]):
            for name in NAMES if step == 0 else ("grad_norm",):
                ours, value = history[name], wanted["history"][step][name]
                limit = 0.1 if step else 0.04
                assert abs(ours / value - 1) <= limit, f"{case}: step {step}, {name} {ours}, not {value}"
        assert overall(result["gradient"], wanted["gradient"]) <= min(0.15 if tensor > 1 else 0.03, rounding), case
        assert overall(result["weights"], wanted["weights"]) <= 2e-3, case
