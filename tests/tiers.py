"""Choice of the fast tier, `bash tests/run.sh --fast`: most unit tests, and a few of every other folder.

Without --fast all tests run. The fast tier takes at most four minutes on two cores. `tests/unit/test_tiers.py` checks
that it reaches every folder of the package.
"""

import os
from pathlib import Path
from typing import Sequence

SLOW_UNIT = ("tests/unit/test_attention_kernels.py",)
FAST_ELSEWHERE = (
    # a step of one process, and the same step on two ranks under tensor and under pipeline parallelism
    "tests/distributed/test_layouts.py::test_one_process_step_has_every_term",
    "tests/distributed/test_layouts.py::test_layout_equals_one_process[2-",
    "tests/distributed/test_group_layout.py::test_group_equals_separate_sequences",
    "tests/distributed/test_scoring.py",
    # a run that is over before its first step
    "tests/faults/test_stopping.py::test_time_limit_that_is_over_before_the_first_step",
    "tests/integration/test_launch_scripts.py::test_script_reads_well",
    # a run of four steps on two ranks, with its evaluations, checkpoints, log and exported folder
    "tests/integration/test_runs.py::test_run_leaves_summary_resolved_config_and_two_checkpoints",
)


IS_FULL = os.environ.get("MEGATRON_RAL_TEST_TABLE") == "full"
"""True to run every combination of layouts and settings. The suite runs chosen ones, so that it stays short."""


def chosen(everything: Sequence, usual: Sequence) -> Sequence:
    """Return the cases of a parametrized test: the usual ones, or everything with MEGATRON_RAL_TEST_TABLE=full."""
    assert all(case in everything for case in usual)
    return everything if IS_FULL else usual


def is_fast(nodeid: str) -> bool:
    """Tell whether the test `nodeid` ("tests/unit/test_x.py::test_y[case]") belongs to the fast tier."""
    if nodeid.startswith("tests/unit/"):
        return not nodeid.startswith(SLOW_UNIT)
    return nodeid.startswith(FAST_ELSEWHERE)


def missing_entries(project: Path) -> list[str]:
    """Return the entries above whose file, or whose test in it, is not there."""
    missing = []
    for entry in (*SLOW_UNIT, *FAST_ELSEWHERE):
        path, _, test = entry.partition("::")
        file, name = project / path, test.partition("[")[0]
        if not file.is_file() or (name and f"def {name}(" not in file.read_text()):
            missing.append(entry)
    return missing
