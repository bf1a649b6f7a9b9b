"""Triton kernels of the attention rows, without a GPU.

Proven under Triton's interpreter: rows, values, gradients, and formulas over rows, equal those of PyTorch (which
test_attention_rows.py compares with the definition) for every kind of rows, keys and divergence, in bfloat16 and
float16, for several tiles, padded prompts, strides, slope maps in parts and head shards; rows without mass and equal
rows give exactly zero. All kernels compile to machine code of an H100 and fit its shared memory. And the path is chosen
by what there is. Not shown here: that they run, and how fast, on a GPU (tests/gpu).
"""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch

from megatron_ral.attention import rows as attention_rows
from megatron_ral.attention.rows import choose_backend, head_mean_attention
from megatron_ral.attention.torch_backend import TorchBackend
from tests.conftest import PROJECT
from tests.unit.test_attention_rows import random_qk

pytest.importorskip("triton")

CASES = (
    "token",
    "predictor",
    "prompt alone",
    "four heads of a key",
    "bfloat16",
    "float16",
    "several tiles",
    "blocks of rows",
    "head shards",
    "silent",
)
FORMULA_CASES = ("few keys", "several blocks", "one target of all", "equal rows", "not finite")
SHARED = 227 * 1024
"""Bytes of shared memory that a program may have on compute capability 9.0."""


def run_module(name: str, interpret: bool, *arguments: object) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.unit.{name}", *map(str, arguments)],
        cwd=PROJECT,
        text=True,
        capture_output=True,
        env={**environment, **({"TRITON_INTERPRET": "1"} if interpret else {})},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("kernels") / "results.pt"
    run_module("kernel_cases", True, path)
    found = torch.load(path)
    assert sorted(found) == sorted((*CASES, *FORMULA_CASES, "faults", "formula faults"))
    return found


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_pytorch(results, case):
    for name, (ours, wanted) in results[case].items():
        assert ours.dtype == wanted.dtype and ours.shape == wanted.shape, name
        ours, wanted = ours.float(), wanted.float()
        if case == "silent":
            assert torch.equal(ours, wanted) and (name == "rows") == bool(wanted.any()), name
            continue
        if not wanted.numel():
            continue
        assert wanted.abs().max() > 1e-2, "the case has no power"
        coarse = name.endswith(("query", "key")) and case in ("bfloat16", "float16")  # one rounding of the gradient
        bound = {"bfloat16": 2**-8, "float16": 2**-10}[case] if coarse else 2e-6
        assert (ours - wanted).abs().max() <= bound * wanted.abs().max(), name
        if name == "rows":
            assert torch.equal(ours == 0, wanted == 0), "columns that a row cannot see must be exactly 0"


@pytest.mark.parametrize("case", FORMULA_CASES)
def test_formulas_equal_pytorch(results, case):
    for name, (ours, wanted) in results[case].items():
        assert ours.dtype == wanted.dtype and ours.shape == wanted.shape, name
        if case == "equal rows":
            assert torch.equal(ours, wanted), name
            continue
        assert torch.equal(ours.isnan(), wanted.isnan()) and bool(ours.isnan().any()) == (
            case == "not finite" and name != "value"
        ), name
        ours, wanted = ours.nan_to_num(), wanted.nan_to_num()
        per_row = name.endswith(("distribution", "slope"))
        scale = wanted.abs().amax(dim=-1, keepdim=True) if per_row else wanted.abs()
        bound = 1e-4 if name.endswith("slope") else 2e-6  # ln p - ln q of near rows cancels, as in PyTorch
        assert wanted.any() and ((ours - wanted).abs() <= bound * scale + 1e-9).all(), name


def test_formulas_are_compared_with_pytorch_before_they_are_trusted(results):
    nothing, wrong, raises = results["formula faults"]
    assert nothing is None and wrong == "differ from PyTorch in the mass of rows by 1.0e-02 of the largest element"
    assert raises == "fail with RuntimeError: no such instruction"


def test_kernels_are_compared_with_pytorch_before_they_are_trusted(results):
    nothing, wrong, raises = results["faults"]
    assert nothing is None and "rows differ" in wrong and "1.0e-02" in wrong
    assert raises == "they fail with RuntimeError: no such instruction"


def test_a_fault_leads_back_to_pytorch(monkeypatch, caplog):
    monkeypatch.setattr(attention_rows, "backend_fault", lambda *arguments: "they are wrong")
    choose_backend.cache_clear()
    with caplog.at_level(logging.INFO, logger=attention_rows.__name__):
        backend, _ = choose_backend(torch.device("cuda"), torch.bfloat16, 128)
    assert isinstance(backend, TorchBackend)
    [record] = caplog.records
    assert record.levelname == "WARNING" and "they are wrong" in record.getMessage()
    choose_backend.cache_clear()


@pytest.fixture(scope="module")
def machine_code() -> list[dict]:
    return [json.loads(line) for line in run_module("kernel_compilation", False).splitlines() if line.startswith("{")]


def test_kernels_compile_for_an_h100(machine_code):
    made = [entry for entry in machine_code if "kernel" in entry]
    assert len(made) == 20 and {entry["width"] for entry in made} == {64, 80, 128}
    for entry in made:
        assert entry["cubin"] > 0 and 0 < entry["shared"] <= SHARED, entry
        # the tensor cores are used, but never for float32 inputs
        assert (entry["products"] > 0) == (entry["type"] != "fp32"), entry


def test_formulas_compile_for_an_h100(machine_code):
    made = [entry for entry in machine_code if "formula" in entry]
    assert len(made) == 14 and {entry["formula"].split("_")[1] for entry in made} == {
        "mass",
        "distribution",
        "masses",
        "divergence",
        "slope",
    }
    assert all(entry["cubin"] > 0 and entry["local"] == 0 for entry in made), made


def test_the_backend_follows_device_type_and_width(monkeypatch):
    monkeypatch.setattr(attention_rows, "backend_fault", lambda *arguments: None)
    choose_backend.cache_clear()
    cuda = torch.device("cuda")
    for dtype, width in ((torch.bfloat16, 128), (torch.float16, 80), (torch.float32, 80)):
        backend, description = choose_backend(cuda, dtype, width)
        assert not isinstance(backend, TorchBackend) and description == "Triton kernels"
    for arguments, word in (
        ((torch.device("cpu"), torch.float32, 64), "cpu"),
        ((cuda, torch.float64, 64), "float64"),
        ((cuda, torch.float32, 256), "256"),
    ):
        backend, description = choose_backend(*arguments)
        assert isinstance(backend, TorchBackend) and word in description
    choose_backend.cache_clear()


def test_one_line_says_which_path(caplog):
    choose_backend.cache_clear()
    with caplog.at_level(logging.INFO, logger=attention_rows.__name__):
        for _ in range(2):
            head_mean_attention(random_qk(dtype=torch.float32))
    said = [record.getMessage() for record in caplog.records]
    assert said == ["attention rows on cpu: PyTorch, because the device is cpu"]
