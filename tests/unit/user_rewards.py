"""Reward functions that a user might have, good and bad, for the tests. They import little, because a process of their
own imports them again."""

import functools
import math
import os
import random
import re
import signal
import subprocess
import threading
import time


def brevity(completion: str, solution: str, problem_type: str) -> float:
    """Return a reward that depends on all three arguments."""
    return len(completion) + 100 * len(solution) + 10000 * len(problem_type)


class Judge:
    def __call__(self, completion, solution, problem_type="", *, strict=False):
        return 0.25

    def method(self, completion, solution, problem_type):
        return 0.5


judge = Judge()


def reads_question(completion, solution, problem_type, *, problem):
    return float(problem.split()[-1] in completion)


def third_is_named_problem(completion, solution, problem):
    return float(problem == "numerical")


def first_is_named_problem(problem, completion, solution):
    return float(problem.endswith("</answer>"))


def with_default(completion, solution, problem_type, problem="default"):
    return float(problem == "default")


def passes_positions(function):
    """Decorate a function with one that takes no keyword."""

    @functools.wraps(function)
    def call(*arguments):
        return function(*arguments)

    return call


def passes_everything(function):
    """Decorate a function with one that takes what it takes."""

    @functools.wraps(function)
    def call(*arguments, **named):
        return function(*arguments, **named)

    return call


decorated = passes_positions(with_default)
decorated_twice = passes_everything(decorated)
transparent = passes_everything(with_default)
cached = functools.cache(reads_question)
bound = functools.partial(with_default, problem="default")
bound_first = functools.partial(lambda mark, completion, solution, problem: float(problem == mark), "numerical")


def with_defaults(completion, *rest):
    return True


def two_arguments(completion, solution):
    return 0.0


def needs_keyword(completion, solution, problem_type, *, model):
    return 0.0


def waits_for_a_program(completion, solution, problem_type):
    """Start a program, write its number into the file that the response names, and wait for it."""
    program = subprocess.Popen(["sleep", "1000"])
    with open(completion, "w") as file:
        file.write(str(program.pid))
    return program.wait()


async def asynchronous(completion, solution, problem_type):
    return 0.0


def generator(completion, solution, problem_type):
    yield 0.0


def fails_on_8(completion, solution, problem_type):
    if "8" in completion:
        raise RuntimeError("the judge\nis out")
    return 0.5


def returns(value):
    return lambda completion, solution, problem_type: value


def exits(completion, solution, problem_type):
    raise SystemExit("no judge")


class Tensor:
    """Value that is a number only by `float`, like a tensor of one element."""

    def __float__(self):
        return 0.75


NAN, INFINITE, HUGE, NOTHING, TEXT = (returns(value) for value in (math.nan, -math.inf, 1e300, None, "good"))
TENSOR = returns(Tensor())
GOOD = "no function"


# --- functions that hang or die ---------------------------------------------------------------------------------------


def backtracks(completion, solution, problem_type):
    """Hold the interpreter for longer than any test where the response ends with 7."""
    return float(re.fullmatch("(a+)+b", "a" * 60 if "7" in completion else "ab") is not None)


def sleeps(completion, solution, problem_type):
    time.sleep(1e6 if "7" in completion else 0)
    return 1.0


def catches_everything(completion, solution, problem_type):
    while True:
        try:
            time.sleep(1e6)
        except BaseException:
            signal.signal(signal.SIGALRM, signal.SIG_IGN)


def dies(completion, solution, problem_type):
    if "7" in completion:
        os._exit(5)
    return 1.0


def is_killed(completion, solution, problem_type):
    os.kill(os.getpid(), signal.SIGKILL)


def process_number(completion, solution, problem_type):
    return os.getpid()


def has_own_alarm(completion, solution, problem_type):
    """Return 1 if a time limit of its own works, which needs the main thread."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    signal.pause()
    return float(threading.current_thread() is threading.main_thread())


def draws(completion, solution, problem_type):
    return random.random()


def prints(completion, solution, problem_type):
    print("a line of the user's own")
    return 1.0


def fills_memory(completion, solution, problem_type):
    return float(len(bytearray(2**31)))


def asks_to_stop(completion, solution, problem_type):
    os.kill(os.getpid(), int(completion))
    return 1.0
