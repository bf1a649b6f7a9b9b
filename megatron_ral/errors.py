"""Errors that a user can act on. Each names what is at fault, what was found there, and the way out.

A command catches `UserError` in one place, prints it as one sentence and ends with exit status 2. Its parts stay apart
until then, so that the preflight can print a table of them and no code reads a sentence back.
"""

import re
from typing import Optional, Sequence, cast

_WORD = re.compile(r"[\w.+-]+")


class UserError(ValueError):
    """Something the user gave that cannot be used: a setting, an option, a file, a checkpoint, data.

    Args:
        key: Setting, option or file at fault, e.g. `parallel.tensor_model_parallel_size`, `--output` or a quoted path.
        value: What was found there; None where the key says it all.
        remedy: Rest of the sentence that begins with `key = value`: what is wrong, and the way out. It may begin with
            `:`, `,` or `;`.
    """

    def __init__(self, key: str, value: object = None, remedy: Optional[str] = None):
        if remedy is None:  # a whole sentence
            key, value, remedy = "", None, " ".join(map(str, (part for part in (key, value) if part is not None)))
        super().__init__(key, value, remedy)
        self.key, self.value, self.remedy = key, value, remedy

    @property
    def shown_value(self) -> str:
        """Value as it stands in the sentence: words and numbers as they are, other text in quotes."""
        return show_value(self.value)

    def __str__(self) -> str:
        subject = self.key if self.value is None else f"{self.key} = {self.shown_value}"
        if not subject:
            return self.remedy
        return f"{subject}{'' if self.remedy[:1] in ':,;' else ' '}{self.remedy}"


class ConfigError(UserError):
    """A setting or option that cannot be used, alone or beside others."""


class CheckpointError(UserError):
    """A model folder or checkpoint that does not hold what is needed."""


class DataError(UserError):
    """Shards or records that cannot be used at all. One bad sample is a `data.issues.SampleError` instead."""


class AgreedError(UserError):
    """An error that one rank or several found, raised on every rank.

    Args:
        key, value, remedy: Parts of the error of the first rank that found one.
        rank: That rank; None where every rank found the same error.
    """

    def __init__(self, key: str, value: object = None, remedy: Optional[str] = None, *, rank: Optional[int] = None):
        super().__init__(key, value, remedy)
        self.rank = rank

    def __str__(self) -> str:
        text = super().__str__()
        return text if self.rank is None else f"rank {self.rank}: {text}"


def show_value(value: object) -> str:
    """Return a value as it stands in a sentence: true, 0.5, exact, 'a/path', [1, 2]."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return str(list(cast(Sequence[object], value)))
    text = str(value)
    return (
        text
        if _WORD.fullmatch(text) or (not isinstance(value, str) and not hasattr(value, "__fspath__"))
        else f"'{text}'"
    )
