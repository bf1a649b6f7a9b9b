r"""Expressions of mathematical answers, which `math_verifier.py` compares in a process of its own.

Departures from the library math-verify: a text with a word in it is no expression here, because the library reads
"Paris" as p*a*r*i*s; nor is a number with an underscore, of which it reads the first digits.
"""

import re
from typing import Optional

from megatron_ral.rewards.reading import plain

MAX_EXPRESSION_LENGTH = 500
"""Characters of the longest text that is read as an expression."""
_SIGNS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "**": "^", "π": r"\pi ", "∞": r"\infty ",
    "∪": r"\cup ", "∩": r"\cap ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "°": r"^\circ", "²": "^{2}",
    "³": "^{3}", "∅": r"\emptyset ",
}  # fmt: skip
_ROOT = re.compile(r"(?:√|(?<![\\A-Za-z])sqrt)\s*(?:\(([^()]*)\)|(\w))")
_COMMANDS = re.compile(r"\\[A-Za-z]+|(?<![A-Za-z])(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|inf)(?![A-Za-z])")
_MATRIX = re.compile(r"\\(?:begin|end)\{[a-z]+\}")
_WORD_OR_UNDERSCORE = re.compile(r"[^\W\d_]{3,}|\d_")


def expression(text: str) -> Optional[str]:
    """Return a mathematical text in LaTeX, or None if it is too long, has a word in it, or no letter and no digit."""
    text = plain(text) if len(text) <= MAX_EXPRESSION_LENGTH else ""
    for sign, latex in _SIGNS.items():
        text = text.replace(sign, latex)
    text = _ROOT.sub(lambda match: rf"\sqrt{{{match[1] or match[2]}}}", text)
    if not re.search(r"[^\W_]", text) or _WORD_OR_UNDERSCORE.search(_COMMANDS.sub(" ", _MATRIX.sub(" ", text))):
        return None
    return text
