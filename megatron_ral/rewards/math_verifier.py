"""Equality of mathematical expressions by the library math-verify. `rules.mathematics` calls it in a process.

The library reads LaTeX and plain expressions: fractions, roots, powers, intervals, sets, equations, matrices. Its own
time limit is an alarm, which works in the main thread alone and ends no computation in C, so that it is switched off.
"""

from typing import Any

from math_verify import LatexExtractionConfig, parse, verify


def equal(answer: str, reference: str, problem_type: str = "") -> float:
    """Return 1.0 if two expressions are the same mathematical object, else 0.0.

    Args:
        answer: Expression in LaTeX.
        reference: Expression in LaTeX.
        problem_type: Unused; it makes the signature that of every function that `FunctionProcess` calls.

    Raises:
        ValueError: The library does not read the reference.
    """
    given, wanted = _parsed(answer), _parsed(reference)
    if not wanted:
        raise ValueError(f"math-verify does not read the reference answer '{reference}'")
    return float(bool(given) and verify(wanted, given, timeout_seconds=None))


def _parsed(latex: str) -> list[Any]:
    no_limit: Any = None
    return parse(rf"\boxed{{{latex}}}", [LatexExtractionConfig()], "no_fallback", parsing_timeout=no_limit)


equal(r"\frac{1}{2} x^2", "0.5 x^2")  # tables of the parser are made now, outside of any time limit
