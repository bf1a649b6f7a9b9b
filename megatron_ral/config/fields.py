"""Types of settings: strict (no string becomes a number) and bounded."""

from typing import Annotated

from annotated_types import Ge, Gt, Le
from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

PositiveInt = Annotated[int, Gt(0)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]

TargetName = str
"""Name of an attention target. `rules.py` compares it with the registry in `attention/targets/registry.py`."""
