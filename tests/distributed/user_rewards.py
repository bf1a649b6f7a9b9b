"""Reward functions of a user. They import little, because a process of their own imports them again."""

import os
import zlib


def rank(completion: str, solution: str, problem_type: str) -> float:
    return 1.0 + int(os.environ["RANK"])


def fails_on_odd_digits(completion: str, solution: str, problem_type: str) -> float:
    if int(solution.removeprefix("<answer>")[0]) % 2:
        raise ValueError("odd")
    return 0.0


def made_up_reward(completion: str, solution: str, problem_type: str) -> float:
    return zlib.crc32(completion.encode()) % 5 / 4
