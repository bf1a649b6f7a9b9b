"""Errors that a user can act on. Each names the setting or file at fault, the value found there, and the way out.

Code raises them with these three parts. A command catches `UserError` in one place, prints it as one sentence and ends
with exit status 2. The parts stay apart until then, because the preflight prints a table of them and no code may parse
a sentence.
"""

import os
import re
from typing import Optional

_WORD = re.compile(r"[\w.+-]+")


class UserError(ValueError):
    """Input of the user that cannot be used: a setting, an option, a file, a checkpoint or data.

    Args:
        key: Setting, option or file at fault, for example `parallel.tensor_model_parallel_size`, `--output` or a quoted
            path.
        value: Value found there; None if the key is enough.
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
        """Value as the sentence shows it; see `show_value`."""
        return show_value(self.value)

    def __str__(self) -> str:
        subject = self.key if self.value is None else f"{self.key} = {self.shown_value}"
        if not subject:
            return self.remedy
        return f"{subject}{'' if self.remedy[:1] in ':,;' else ' '}{self.remedy}"


class ConfigError(UserError):
    """A setting or option that cannot be used, alone or in combination with others."""


class CheckpointError(UserError):
    """A model folder or checkpoint that lacks what is needed."""


class DataError(UserError):
    """Shards or records that cannot be used at all. A single bad sample raises `data.issues.SampleError` instead."""


class AgreedError(UserError):
    """An error found by some rank and raised on every rank alike."""


def show_value(value: object) -> str:
    """Return a value as sentences show it: booleans in lower case, words and numbers bare, other text in quotes.

    Examples: true, 0.5, exact, 'a/path', [1, 2].
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return str(list(value))
    text = str(value)
    is_text = isinstance(value, (str, os.PathLike))
    return f"'{text}'" if is_text and not _WORD.fullmatch(text) else text
