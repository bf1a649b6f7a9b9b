r"""Meaning of an answer's text: its content without LaTeX or Markdown markup, its number, its option letter."""

import math
import re
import unicodedata
from typing import Optional

from megatron_ral.rewards.answer import inside_braces

MAX_NUMBER_LENGTH = 100
"""Characters of the longest text that is read as a number."""

_TYPOGRAPHY = str.maketrans(
    {"−": "-", "－": "-", "–": "-", "＋": "+", "．": ".", "，": ",", "％": "%", "٪": "%", "٫": ".", "٬": ",", "’": "'"}
)
_LATEX = [
    (re.compile(pattern), text)
    for pattern, text in (
        (r"\\(?:text|textbf|textrm|mathrm|mathbf|mathit)\{([^{}]*)\}", r"\1"),
        (r"\{,\}", ","),
        (r"\\!", ""),
        (r"\\[,;: ]|(?<=\S)~", " "),
        (r"\^\{?\\circ\}?|\\degree", "°"),
        (r"\\([%$])", r"\1"),
    )
]
_LATEX_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:\\[,;:]\d{3})+(?!\d)")
_MARKUP = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ('"', '"'), ("'", "'"), ("`", "`"))
_GROUPED = re.compile("(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
_NARROW_GROUPED = re.compile("(?<![0-9.,])[1-9][0-9]{0,2}(?:[\u00a0\u2009\u202f][0-9]{3})+(?![0-9]|,[0-9])")
_LOOSE_COMMA = re.compile(r"(?<![0-9]),(?![0-9])|,$")

_CURRENCY = "$€£¥₹"
# Alternatives never begin with the same character, so that no text takes more than linear time.
_UNIT_WORD = (
    rf"(?![\d_])[\w%‰°℃℉'\"′″{_CURRENCY}]"
    r"(?:(?![\d_])[\w%°/·*.'′″⁻-]|\^-?[1-4](?!\d)|(?<=[A-WYZa-wyz-])[1-4](?!\d))*"
)
_NUMBER = re.compile(
    rf"(-|\+)?\s*[{_CURRENCY}]?\s*(\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?)"
    rf"(?:\s*({_UNIT_WORD}(?:\s+{_UNIT_WORD}){{0,2}}))?"
)
_OTHER_NUMBER = re.compile(
    r"\b(?:(?:hundred|thousand|million|billion|trillion|dozen|lakh|crore|quarter|tenth|hundredth|thousandth)s?|"
    r"half|halves|squared|cubed|and|or|to|plus|minus|mil|mio|mn|mln|bn|mrd|tn|pi|i|e)\b|[πℯ]"
)
"""Words behind a number that change its value or leave it open."""
_SCALE = re.compile(r"[kMB]|(?<!\s)[KT]")
"""Letters that stand for a thousand, million, billion or trillion, rather than for a unit with a space before it."""

_CHOICE = re.compile(
    r"(?:(?:(?:the|my)\s+)?(?:(?:correct|final)\s+)?(?:answer|option|choice)\b(?:\s+is)?\s*(?::\s*)?)?"
    r"(?:(?:option|choice)\s+)?"
    r"(?:\(([a-z])\)|\[([a-z])\]|([a-z])(?=[):\]]|\.(?!\w\.)|\s+[-–—]\s|\s*\n|$))[).:\]]*(.*)",
    re.DOTALL | re.IGNORECASE,
)
_SECOND_CHOICE = re.compile(
    r"\s*(?:(?:or|and)\b|[,、/&;]|[(\[][a-z][)\]]|[a-z][):\]]|[a-z]\.?(?:\s+[a-z]\.?)+\s*$)|\s*\n\s*[a-z]\.?\s*$",
    re.IGNORECASE,
)
_LATER_CHOICE = re.compile(
    r"(?:[,;\n]|\b(?:[Aa]nd|[Oo]r)\b)\s*[(\[]?[A-H][).:\]](?!\w)|(?<![\w.])[(\[]?[A-H][)\]](?!\w)"
)
"""Letter of a second option with its mark, behind the content of the first one."""
_DRESSED_LETTER = re.compile(r"[*_<{(\[\"'“‘«`]*([A-Za-z])[*_>})\]\"'”’».,:;!`]*")
_FIRST_WORD = re.compile(r"\W*([^\W\d_]+)")


def plain(text: str) -> str:
    r"""Return the text without surrounding spaces, `\boxed{..}`, `$..$`, `\(..\)`, `**..**`, quotation marks,
    `\text{..}` and LaTeX spacing.

    Text around a single `\boxed{..}` is removed. Several boxes stay as they are.
    """
    text = text.strip()
    while True:
        before = text
        if text.count(r"\boxed{") == 1:
            text = inside_braces(text, text.index(r"\boxed{") + len(r"\boxed{")).strip()
        for left, right in _MARKUP:
            inner = text[len(left) : -len(right)]
            if len(text) > len(left + right) and text.startswith(left) and text.endswith(right) and left not in inner:
                text = inner.strip()
        if text == before:
            break
    text = _LATEX_GROUPED.sub(lambda match: re.sub(r"\\[,;:]", "", match[0]), text)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text.strip()


def finite(text: str) -> Optional[float]:
    """Return Python's reading of a float (digits of any script), or None for infinities, NaN and other text.

    Departure: Python reads "1_5" as 15, which is no number here.
    """
    if "_" in text:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def number(text: str) -> Optional[float]:
    """Return the number that an answer is, its unit dropped, or None if it is no number.

    Commas are read between groups of three digits ("1,000"), see `without_group_marks`. A percent sign is a unit ("50%"
    is 50), and a unit has at most three words ("12 km/h", "5 square metres", "$5"). Minus signs, decimal points and
    digits of other scripts are read. "3,14", "1_5", "1/2", "5-6", "10:30", "3 of 4", "5½", "5 million", "5k", "5M",
    "5π", "5!" and "5 and a half" are no numbers.
    """
    text = without_group_marks(plain(text).translate(_TYPOGRAPHY)).strip().rstrip(".;:").rstrip()
    text = _LOOSE_COMMA.sub("", text)
    if len(text) > MAX_NUMBER_LENGTH:
        return None
    value = finite(text)
    match = _NUMBER.fullmatch(text) if value is None else None
    if match and not _is_part_of_number(match[3] or "") and not (match[3] and _SCALE.fullmatch(text, match.start(3))):
        value = finite((match[1] or "") + match[2])
    return value


def bare_number(text: str) -> Optional[float]:
    """Return the number that an answer is, or None for one with a unit and other text. Commas are as in `number`."""
    text = without_group_marks(plain(text).translate(_TYPOGRAPHY)).rstrip(".")
    return finite(text) if len(text) <= MAX_NUMBER_LENGTH else None


def without_group_marks(text: str) -> str:
    """Return the text with digits in ASCII, and without the marks between groups of three digits.

    Marks are commas and narrow or unbreakable spaces, of one kind in a number. "1,000" and "12,345.5" lose theirs.
    "3,14", "1,2", "0,123", "1234,567" and "1,23,456" keep theirs: whether a comma is a decimal point is never guessed.
    """
    text = "".join(str(unicodedata.decimal(char)) if char.isdecimal() else char for char in text)
    text = _GROUPED.sub(lambda match: match[0].replace(",", ""), text)
    return _NARROW_GROUPED.sub(lambda match: "".join(filter(str.isdigit, match[0])), text)


def _is_part_of_number(unit: str) -> bool:
    """Return True if the text behind a number belongs to it ("million", "½", "万") and is no unit."""
    return any(word[0].isnumeric() for word in unit.split()) or bool(_OTHER_NUMBER.search(unit.casefold()))


def chart_number(text: str) -> Optional[float]:
    """Return the number that an answer is, with "50%" as 0.5, or None.

    Commas are read as in `number`. An answer with a unit is no number here.
    """
    text = without_group_marks(plain(text).translate(_TYPOGRAPHY))
    if len(text) > MAX_NUMBER_LENGTH:
        return None
    value = finite(text.rstrip("%"))
    return value / 100 if value is not None and text.endswith("%") else value


def choice(text: str) -> Optional[str]:
    """Return the option letter that an answer chooses, upper case, or None for no letter or several.

    "B", "b", "(B)", "*B*", "B.", "B) red", "(B) red", "B: red", "B - red", "Option B" and "The answer is B" choose B.
    "A or B", "A, B", "(A)(B)", "A) B)", "A. B. C" and "A. red, B. blue" choose several. Text may follow only after a
    mark or on a new line: "A red ball" is no choice of A. A single letter is text after a mark ("A. X"), but a second
    choice on a line of its own.
    """
    found = choice_and_text(text)
    return found[0] if found else None


def choice_and_text(text: str) -> Optional[tuple[str, str]]:
    """Return the option letter that an answer chooses (`choice`) and the stripped text behind it, or None."""
    found = letter_and_rest(text)
    if found is None or _SECOND_CHOICE.match(found[1]) or _LATER_CHOICE.search(found[1]):
        return None
    return found[0], found[1].strip()


def letter_and_rest(text: str) -> Optional[tuple[str, str]]:
    """Return the letter that an answer begins with, upper case, and the text behind it and its mark, or None."""
    text = unicodedata.normalize("NFKC", plain(text)).strip()
    if lone := _DRESSED_LETTER.fullmatch(text):
        return lone[1].upper(), ""
    match = _CHOICE.fullmatch(text)
    return ((match[1] or match[2] or match[3]).upper(), match[4]) if match else None


def first_word(text: str) -> str:
    """Return the first run of letters, lower case; empty: there is none."""
    match = _FIRST_WORD.match(plain(text).casefold())
    return match[1] if match else ""
