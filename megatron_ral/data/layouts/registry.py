"""Layouts that are read, and the one that fits a record."""

from dataclasses import dataclass
from typing import Any, Callable

from megatron_ral.data.issues import SampleError
from megatron_ral.data.layouts.chat import conversations, messages, turns_of
from megatron_ral.data.layouts.draft import Draft, RawSample, finished
from megatron_ral.data.layouts.questions import benchmark, video_r1
from megatron_ral.data.layouts.trainers import alpaca, reward_model, swift, trl, verl
from megatron_ral.data.layouts.values import is_empty, plain, shown


@dataclass(frozen=True)
class Layout:
    """Layout of records."""

    name: str
    """Whose it is, and the fields that tell it."""
    fits: Callable[[dict], bool]
    """Test for these fields."""
    read: Callable[[dict], Draft]
    """Reader of a record."""


def _has(record: dict, *names: str) -> bool:
    return all(not is_empty(record.get(name)) for name in names)


def _asks(record: dict) -> bool:
    return any(_has(record, name) for name in ("question", "text", "query"))


def _is_swift(record: dict) -> bool:
    is_answered = _has(record, "answer") or _has(record, "answers") or not isinstance(record.get("label"), bool | None)
    return _has(record, "query", "response") and not is_answered


LAYOUTS = (
    Layout("chat 'messages'", lambda r: bool(turns_of(r.get("messages"))), messages),
    Layout("verl 'prompt', 'reward_model'", lambda r: _has(r, "prompt") and bool(reward_model(r)), verl),
    Layout("Video-R1 'problem'", lambda r: _has(r, "problem"), video_r1),
    Layout(
        "LLaVA and ShareGPT 'conversations'",
        lambda r: bool(turns_of(r.get("conversations") or r.get("conversation"))),
        conversations,
    ),
    Layout("TRL 'prompt', 'completion' or 'solution'", lambda r: _has(r, "prompt") and not _asks(r), trl),
    Layout("ms-swift 'query', 'response'", _is_swift, swift),
    Layout("alpaca 'instruction', 'output'", lambda r: _has(r, "instruction", "output"), alpaca),
    Layout("benchmarks 'question' (or 'text', 'query'), 'answer'", _asks, benchmark),
)
"""Layouts in the order in which they are tried. The first that fits reads the record."""


def read_record(record: Any) -> RawSample:
    """Return the fields and media of one record of any layout.

    Raises:
        SampleError: no layout fits, or a field is missing or impossible. The text does not name the sample's key.
    """
    if not isinstance(record, dict):
        raise SampleError("the record is not an object", "wrong_field")
    record = plain(record)
    for layout in LAYOUTS:
        if layout.fits(record):
            return finished(layout.read(record))
    raise SampleError(
        f"the record has none of the fields of a layout that is read ({'; '.join(layout.name for layout in LAYOUTS)}); "
        f"its fields are {', '.join(map(shown, sorted(record)[:12])) or 'none'}",
        "missing_field",
    )
