"""Equality of mathematical expressions by the library math-verify. `rules.mathematics` calls it in a process.

The library reads LaTeX and plain expressions: fractions, roots, powers, intervals, sets, equations, matrices. Its own
time limit is an alarm, which works in the main thread alone and ends no computation in C, so that it is switched off.
"""

import logging
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

_READING = LatexExtractionConfig(
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    )
)
"""The library's own settings, but for units, which `mathematics.expression` drops."""
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns once more that its time limit is off


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
    return float(bool(given) and verify(wanted, given, timeout_seconds=None, allow_set_relation_comp=True))


def _parsed(latex: str) -> list[Any]:
    no_limit: Any = None
    return parse(rf"\boxed{{{latex}}}", [_READING], "no_fallback", parsing_timeout=no_limit)


equal(r"\frac{1}{2} x^2", "0.5 x^2")  # tables of the parser are made now, outside of any time limit
