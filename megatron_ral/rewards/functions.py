"""Reward functions of the user, found by import path."""

import functools
import importlib
import inspect
from typing import Any, Callable

from megatron_ral.errors import ConfigError

CALL = "f(completion, solution, problem_type) -> float"
NUM_ARGUMENTS = 3
"""Number of the arguments of CALL."""
RewardFunction = Callable[..., float]
"""Function with the arguments of CALL. One that has a parameter named `problem` too gets the text of the question."""
QUESTION = "problem"
"""Name of that parameter."""


def load_function(key: str, path: str) -> RewardFunction:
    """Return the function at `package.module:function`.

    Args:
        key: setting that holds the path, for the error.
        path: import path; Python looks for it on PYTHONPATH and in the working directory.

    Raises:
        ConfigError: no such module or function, a module that fails, or something that cannot be called as
            f(completion, solution, problem_type).
    """
    function: Any = None
    module_name, _, name = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *name.split("."))):
        reason = "is not of the form package.module:function"
    else:
        function, reason = _find(module_name, name)
    reason = reason or _call_problem(function)
    if reason:
        raise ConfigError(key, path, reason)
    return function


def reads_question(function: Any) -> bool:
    """Say whether a function that can be called as a reward has a parameter for the question.

    It has none where `problem` is the name of one of the three arguments of CALL, or is bound by `functools.partial`.
    """
    parameters = inspect.signature(function).parameters
    is_bound = isinstance(function, functools.partial) and QUESTION in function.keywords
    if QUESTION not in parameters or is_bound:
        return False
    kind, place = parameters[QUESTION].kind, list(parameters).index(QUESTION)
    is_beyond = kind is kind.KEYWORD_ONLY or (kind is kind.POSITIONAL_OR_KEYWORD and place >= NUM_ARGUMENTS)
    return is_beyond and _takes_keyword(function)


def _takes_keyword(function: Any) -> bool:
    """Say whether a function takes the question by its name.

    A decorated function shows the signature of the function inside, but a decorator itself may take `*args` alone.
    """
    try:
        own = inspect.signature(function, follow_wrapped=False).parameters.values()
    except ValueError:  # a decorator without a signature, such as functools.cache, takes what the function takes
        takes = True
    else:
        takes = any(parameter.name == QUESTION or parameter.kind is parameter.VAR_KEYWORD for parameter in own)
    return takes and (not hasattr(function, "__wrapped__") or _takes_keyword(function.__wrapped__))


def _find(module_name: str, name: str) -> tuple[Any, str]:
    """Return (object, empty) or (None, fault of the path)."""
    try:
        found = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module may fail in any way, and each is a wrong setting
        return None, (
            f"cannot be imported ({type(error).__name__}: {' '.join(str(error).split())}); put the "
            "folder that holds it on PYTHONPATH"
        )
    for part in name.split("."):
        if not hasattr(found, part):
            return None, f"names nothing: module '{module_name}' has no '{name}'"
        found = getattr(found, part)
    return found, ""


def _call_problem(function: object) -> str:
    """Return the reason for which an object cannot be called as a reward function; empty: it can."""
    if not callable(function) or inspect.isclass(function):
        return f"is a {'class' if inspect.isclass(function) else type(function).__name__}, not a function {CALL}"
    if any(
        test(function)
        for test in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    ):
        return f"is a coroutine or generator, not a function {CALL}"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return f"has no signature that can be read; wrap it in a function {CALL}"
    try:
        signature.bind("", "", "", **({QUESTION: ""} if reads_question(function) else {}))
    except TypeError as error:
        return f"has the signature {signature}, which cannot be called as {CALL} ({error})"
    return ""
