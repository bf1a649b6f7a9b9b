"""Names of problem types, and how their answers are meant."""

import re

NUMBERS = ("numerical", "regression")
"""Types whose reference answers are numbers."""
TEXTS = ("ocr", "free form", "consensus", "vizwiz")
"""Types whose reference answers are text of any length."""
MULTIPLE_CHOICE, MATH = "multiple choice", "math"


def rule_name(problem_type: str) -> str:
    """Return a problem type in the spelling of `rules.RULES`: lower case, with spaces for `-`, `_` and `/`."""
    return " ".join(re.split(r"[\s_/-]+", problem_type.strip())).casefold()
