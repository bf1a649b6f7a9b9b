r"""Expressions of mathematical answers, which `math_verifier.py` compares in a process of its own.

Departures from the library math-verify: a text with a word in it is no expression here, because the library reads
"Paris" as p*a*r*i*s; nor is a number with an underscore, of which it reads the first digits. Mixed numbers ("2 1/2",
of which it makes 3/2) are sums, and functions need no backslash ("sin x", which it reads as s*i*n*x). Units are dropped
here, because it drops the last letter of "3t" and "2ab" as one, too.
"""

import re
import unicodedata
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
_CURRENCY = re.compile(r"\\?\$|[€£¥₹]")
_FUNCTION = re.compile(r"(?<![\\A-Za-z])(sin|cos|tan|cot|sec|csc|log|ln|exp|pi)(?![A-Za-z])")
_COMMANDS = re.compile(r"\\[A-Za-z]+|(?<![A-Za-z])(?:sqrt|inf)(?![A-Za-z])")
_REWRITTEN = [
    (re.compile(pattern), text)
    for pattern, text in (
        (r"(?<![\d.,/^_])(\d+)\s+(\d+)/(\d+)(?![\d.,/])", r"\1\\frac{\2}{\3}"),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times "),
        (r"\^(-\w)", r"^{\1}"),
        (r"(?<=[\w)}\]])\s+(?:and|or)\s+(?=[\w({\[\\$+-])", ", "),
    )
]
_MATRIX = re.compile(r"\\(?:begin|end)\{[a-z]+\}")
_NO_EXPRESSION = re.compile(r"[^\W\d_]{3,}|\d_|\.\d+\.")
"""A word, an underscore behind a digit, or two decimal points in a number."""
_BASE_UNIT = (
    r"(?:[kcmdnμµMG]?(?:m|g|s|l|L|J|W|V|N|A|Hz|Pa|eV)|h|hr|hrs|min|ft|in|yd|mi|lb|lbs|oz|mph)(?:\^?\{?-?[1-4]\}?)?"
)
_UNIT = re.compile(
    rf"(?:(?<=[\d)}}\].])|(?<=\\pi))(?:\s+{_BASE_UNIT}(?:/{_BASE_UNIT})?|(?:[cmk]m|[km]g|m[lL])(?:\^?\{{?[23]\}}?)?)$|"
    r"(?<=\\circ)\s*[CF]$"
)
"""Unit at the end of a number. A single letter needs a space before it, because "3m" is 3 * m."""
_SYMBOL = re.compile(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])")


def expression(text: str) -> Optional[str]:
    """Return a mathematical text in LaTeX, or None if it is too long, has a word in it, or no letter and no digit."""
    text = plain(text) if len(text) <= MAX_EXPRESSION_LENGTH else ""
    text = _CURRENCY.sub("", text).rstrip(" .,;:")
    for sign, latex in _SIGNS.items():
        text = text.replace(sign, latex)
    text = _without_unit("".join(map(_simple_fraction, text)))
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    text = _FUNCTION.sub(r"\\\1", text)
    text = _ROOT.sub(lambda match: rf"\sqrt{{{match[1] or match[2]}}}", text)
    if not re.search(r"[^\W_]", text) or _NO_EXPRESSION.search(_COMMANDS.sub(" ", _MATRIX.sub(" ", text))):
        return None
    return text


def _without_unit(text: str) -> str:
    """Return a number without its unit; a text with symbols ("2x + 3 s") stays as it is."""
    unit = _UNIT.search(text)
    return text[: unit.start()] if unit and not _SYMBOL.search(_COMMANDS.sub(" ", text[: unit.start()])) else text


def _simple_fraction(char: str) -> str:
    """Return a character; "½" and its like become LaTeX."""
    above, bar, below = unicodedata.normalize("NFKC", char).partition("\N{FRACTION SLASH}")
    return rf"\frac{{{above}}}{{{below}}}" if bar and below else char
