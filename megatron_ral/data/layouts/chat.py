"""Conversations of one question: `messages` of role and content, `conversations` of from and value, and their kin.

The content of a message is text or a list of parts (`text`, `image`, `video`). A part of an image or video names its
file, or is the place of the next file of the record's columns.
"""

import json
import re
from dataclasses import dataclass, field, replace
from typing import Any, Optional, Sequence

from megatron_ral.data.issues import SampleError
from megatron_ral.data.layouts.draft import Draft
from megatron_ral.data.layouts.media import (
    COLUMNS,
    Medium,
    column_media,
    merged,
    only_rate,
    read_media,
    refuse_change,
    refuse_unread,
    stated_rate,
)
from megatron_ral.data.layouts.places import without_places
from megatron_ral.data.layouts.values import Answer, answer_of, first, shown, text_of

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
REFERENCES = ("solution", "answer", "ground_truth")
"""Fields of the reference answer; the first goes before the answer of a reply."""
_TURN_FIELDS = ("role", "content", "from", "value")


@dataclass
class Talk:
    """Texts and media of a conversation, in the order of its turns."""

    texts: dict[str, list[str]] = field(default_factory=lambda: {"system": [], "user": [], "assistant": []})
    """Texts of each role."""
    parts: dict[str, list[Medium]] = field(default_factory=lambda: {"image": [], "video": []})
    """Media of the parts; one without a file for a part that is the place of the next file of the columns."""

    @property
    def reply(self) -> str:
        """Return the text of the assistant."""
        return "".join(self.texts["assistant"])


def turns_of(value: Any) -> Optional[list]:
    """Return the turns of a field, or None if it holds none.

    Lists are also read from JSON text, from an object of equally long lists (a sequence of structs in Arrow), and from
    pairs `{"human": .., "assistant": ..}`.
    """
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, row)) for row in zip(*value.values())]
    if not isinstance(value, list):
        return None
    turns = []
    for turn in value:
        if isinstance(turn, dict) and "human" in turn:
            turns.append({"role": "user", "content": turn["human"]})
            turns += [{"role": "assistant", "content": turn["assistant"]}] if turn.get("assistant") else []
        else:
            turns.append(turn)
    return turns


def read_turns(turns: Sequence[Any]) -> Talk:
    """Return the texts and media of a conversation.

    Raises:
        SampleError: an unknown role or kind of part, more than one question, or media in a turn of the assistant.
    """
    talk = Talk()
    asked = 0
    for turn in turns:
        name = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise SampleError(f"a message has the role {shown(name)}, none of {', '.join(ROLES)}", "wrong_field")
        asked += role == "user"
        if role == "user" and asked > 1:
            raise SampleError("more than one question; only conversations of one turn are read", "wrong_field")
        if role == "assistant" and not asked:
            raise SampleError(
                "the assistant speaks before the question; only one question and its answer are read", "wrong_field"
            )
        _read_content(turn, role, talk)
    return talk


def _read_content(turn: dict, role: str, talk: Talk) -> None:
    refuse_unread(turn, _TURN_FIELDS, ())
    content = turn.get("content", turn.get("value"))
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    if not isinstance(content, list):
        raise SampleError("the content of a message is neither text nor a list of parts", "wrong_field")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        kind = kind.removesuffix("_url") if isinstance(kind, str) else kind
        if kind == "text":
            talk.texts[role].append(text_of(part, "text"))
        elif not (isinstance(kind, str) and kind in talk.parts):
            raise SampleError(
                f"a part of a message has the type {shown(kind)}, none of text, image, video", "wrong_field"
            )
        elif role == "assistant":
            raise SampleError(
                f"the assistant's message has a part of type {shown(kind)}; only text is learned", "wrong_field"
            )
        else:
            talk.parts[kind] += _part_media(part, kind)


def _part_media(part: dict, kind: str) -> Sequence[Medium]:
    """Return the media of a part; one without a file if it is a place alone."""
    if first(part, ("bytes", kind, f"{kind}_url", "url", "path")) is None:
        return [Medium("", "", stated_rate(part, kind, kind))]
    return read_media(part, kind, kind)


def media_of(talk: Talk, record: dict, kind: str) -> tuple[Medium, ...]:
    """Return the media of a conversation and of the record's columns, each once.

    Raises:
        SampleError: parts without a file and the columns differ in number, or parts and columns name different files.
    """
    columns, parts = column_media(record, kind), talk.parts[kind]
    places = sum(not part.file for part in parts)
    if not places:
        where = f"a field of the record ({', '.join(COLUMNS[kind])})"
        return merged(parts, columns, "a message", where) if parts and columns else (*parts, *columns)
    if places != len(columns):
        raise SampleError(
            f"its messages have {places} parts of type {kind} without a file but there are {len(columns)} in the "
            f"fields ({', '.join(COLUMNS[kind])})",
            "missing_media",
        )
    rest = iter(columns)
    return tuple(
        part if part.file else replace(column := next(rest), fps=only_rate((part.fps, column.fps))) for part in parts
    )


def question_of(talk: Talk, record: dict) -> str:
    """Return the question after the text of the system.

    Raises:
        SampleError: there is no question, or two different texts of the system.
    """
    system, own = talk.texts["system"], record.get("system")
    if isinstance(own, str) and own.strip() and own not in system:
        if system:
            raise SampleError("its field 'system' and its message of the system differ; keep one", "wrong_field")
        system = [own]
    question = "\n".join([*system, " ".join(text.strip() for text in talk.texts["user"])])
    if not without_places(question).strip():
        raise SampleError("no message of the user holds text", "missing_field")
    return question


def thought_and_answer(reply: str) -> tuple[str, str]:
    """Split a reply into its thought, with its tags, and its answer."""
    if "<answer>" in reply:
        thought, tag, rest = reply.partition("<answer>")
        return thought.strip(), tag + rest
    thought, tag, rest = reply.partition("</think>")  # a thought, and an answer without a tag
    return ((thought + tag).strip(), rest.strip()) if tag else ("", reply)


def reference_of(reply: str, record: dict, names: Sequence[str]) -> tuple[str, Answer]:
    """Return the thought and the answer of a record.

    The first of the fields goes before the reply's own answer. The others stand in where there is no reply.

    Raises:
        SampleError: there is neither, or the reply is marked as wrong.
    """
    stated = first(record, names[:1] if reply else names)
    if reply and record.get("label") is False:
        raise SampleError("its 'label' is false, which marks the reply as a bad one; leave it out", "wrong_field")
    if not reply and stated is None:
        raise SampleError(f"no message of the assistant and no field '{names[0]}'", "missing_field")
    thought, answer = thought_and_answer(reply)
    if not answer and stated is None:
        raise SampleError("the message of the assistant ends with its thought and has no answer", "missing_field")
    return record.get("process") or thought, answer if stated is None else answer_of({"": stated}, "")


def conversation(record: dict, turns: Sequence[Any], names: Sequence[str], read: Sequence[str]) -> Draft:
    """Return the draft of a record whose question and answer are turns.

    Args:
        record: the record.
        turns: its turns.
        names: fields that hold the reference answer, if one does.
        read: fields that this layout reads.
    """
    talk = read_turns(turns)
    question = question_of(talk, record)
    process, answer = reference_of(talk.reply, record, names)
    if first(record, ("objects",)) is not None and re.search("<(?:bbox|ref-object)>", question + talk.reply):
        raise SampleError(
            "its text has places of its field 'objects' (<bbox>, <ref-object>), which are not filled in here; write "
            "the boxes into the text",
            "wrong_field",
        )
    images, videos = (media_of(talk, record, kind) for kind in ("image", "video"))
    for turn in turns:
        for kind, media in (("image", images), ("video", videos)):
            if media:
                refuse_change(turn, kind, "a message")
    return Draft(record, question, answer, process, images, videos, tuple(read))


def messages(record: dict) -> Draft:
    """Read `messages` of role and content (chat, ms-swift, TRL), and the column `solution`."""
    return conversation(record, turns_of(record["messages"]) or [], REFERENCES, ("messages", "system"))


def conversations(record: dict) -> Draft:
    """Read `conversations` (`conversation`) of from and value (LLaVA, ShareGPT), `image` and `system`."""
    turns = turns_of(first(record, ("conversations", "conversation"))) or []
    return conversation(record, turns, REFERENCES, ("conversations", "conversation", "system"))
