"""Reward functions that never return on one rank."""

import os
import re
import time


def _backtrack(rank: str) -> float:
    """Hold the interpreter for ever on a rank: no thread of its process runs, and no handler of a signal."""
    return float(re.fullmatch("(a+)+b", "a" * 200 if os.environ["RANK"] == rank else "ab") is not None)


def backtracks_on_0(completion: str, solution: str, problem_type: str) -> float:
    return _backtrack("0")


def backtracks_on_1(completion: str, solution: str, problem_type: str) -> float:
    return _backtrack("1")


def sleeps_on_1(completion: str, solution: str, problem_type: str) -> float:
    """Wait for ever, like for a server that does not answer."""
    time.sleep(1e6 if os.environ["RANK"] == "1" else 0)
    return 1.0
