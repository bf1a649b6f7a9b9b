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
from megatron_ral.data.layouts.places import has_places, without_places
from megatron_ral.data.layouts.values import SYSTEM_FIELDS, Answer, answer_of, first, is_empty, shown

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
}
"""Role of a message in other programs, in any case -> role here."""
REFERENCES = ("solution", "answer", "ground_truth")
"""Fields of the reference answer; the first goes before the answer of a reply."""
_TURN_FIELDS = ("role", "content", "from", "value")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Fields of an assistant's message that hold the thought before it."""


@dataclass
class Talk:
    """Texts and media of a conversation, in the order of its turns."""

    texts: dict[str, list[str]] = field(default_factory=lambda: {"system": [], "user": [], "assistant": []})
    """Texts of each role."""
    parts: dict[str, list[Medium]] = field(default_factory=lambda: {"image": [], "video": []})
    """Media of the parts; one without a file for a part that is the place of the next file of the columns."""
    marked: list[str] = field(default_factory=list)
    """Texts of the user, with a tag for each of his media where it stands among them."""

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
        SampleError: an unknown role or kind of part, more than one question or answer, media in a turn of the
            assistant, or an answer that is not to be learned.
    """
    talk = Talk()
    asked = answered = 0
    for turn in turns:
        name = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
        if role is None:
            raise SampleError(f"a message has the role {shown(name)}, none of {', '.join(ROLES)}", "wrong_field")
        asked += role == "user"
        if role == "user" and asked > 1:
            raise SampleError("more than one question; only conversations of one turn are read", "wrong_field")
        if role == "assistant" and not asked:
            raise SampleError(
                "the assistant speaks before the question; only one question and its answer are read", "wrong_field"
            )
        answered += role == "assistant"
        if role == "assistant" and answered > 1:
            raise SampleError("more than one message of the assistant; only one answer is read", "wrong_field")
        if role == "assistant":
            _read_marks(turn, talk)
        _read_content(turn, role, talk)
    return talk


def _read_marks(turn: dict, talk: Talk) -> None:
    """Read the thought that stands beside an answer, and refuse an answer that is a call or not to be learned."""
    for name in ("tool_calls", "function_call"):
        if not is_empty(turn.get(name)):
            raise SampleError(
                f"the assistant's message calls a function ('{name}'), which is not learned", "wrong_field"
            )
    for name in ("loss", "weight"):
        if name in turn and turn[name] in (False, 0):
            raise SampleError(
                f"'{name}' = {shown(turn[name])} marks the assistant's message as one not to learn; remove the "
                "field, or leave the record out",
                "wrong_field",
            )
    thought = first(turn, _THOUGHTS)
    if isinstance(thought, str) and thought.strip() and "<think>" not in str(turn.get("content")):
        talk.texts["assistant"].append(f"<think>{thought.strip()}</think>")


def _read_content(turn: dict, role: str, talk: Talk) -> None:
    refuse_unread(turn, _TURN_FIELDS, ())
    content = turn.get("content", turn.get("value"))
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    if not isinstance(content, list):
        raise SampleError("the content of a message is neither text nor a list of parts", "wrong_field")
    for part in content:
        kind = _kind_of(part)
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise SampleError("a part of type text has no text", "missing_field")
            talk.texts[role].append(part["text"])
            talk.marked += [part["text"]] if role == "user" else []
        elif not (isinstance(kind, str) and kind in talk.parts):
            raise SampleError(
                f"a part of a message has the type {shown(kind)}, none of text, image, video", "wrong_field"
            )
        elif role == "assistant":
            raise SampleError(
                f"the assistant's message has a part of type {shown(kind)}; only text is learned", "wrong_field"
            )
        else:
            found = _part_media(part, kind)
            _check_index(part, talk.parts[kind])
            talk.parts[kind] += found
            talk.marked += [f"<{kind}>"] * len(found) if role == "user" else []


def _kind_of(part: Any) -> Any:
    """Return the type of a part. One without a type is of the kind of its only field of text, image or video."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind is None and isinstance(part, dict):
        named = [name for name in ("text", "image", "image_url", "video", "video_url") if not is_empty(part.get(name))]
        kind = named[0] if len(named) == 1 else None
    return kind.removesuffix("_url") if isinstance(kind, str) else kind


def _check_index(part: dict, before: Sequence[Medium]) -> None:
    """Raise SampleError for a part that names another file of the columns than the next one."""
    index = part.get("index")
    if isinstance(index, int) and index != len(before):
        raise SampleError(
            f"a part of a message has 'index' = {index} but is number {len(before)} of its kind; files are taken in "
            "the order of the parts, so put them in that order",
            "wrong_field",
        )


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
    system, own = talk.texts["system"], first(record, SYSTEM_FIELDS)
    if isinstance(own, str) and own.strip() and own not in system:
        if system:
            raise SampleError("its field 'system' and its message of the system differ; keep one", "wrong_field")
        system = [own]
    asked = talk.marked if _is_mixed(talk) else talk.texts["user"]
    question = "\n".join([*system, " ".join(text.strip() for text in asked)])
    if not without_places(question).strip():
        raise SampleError("no message of the user holds text", "missing_field")
    return question


def _is_mixed(talk: Talk) -> bool:
    """Return True if media stand among the texts of the user and no text says where: then their places are kept."""
    texts, media = [*talk.texts["system"], *talk.texts["user"]], sum(map(len, talk.parts.values()))
    if media < 2 or len(talk.marked) != len(talk.texts["user"]) + media or any(map(has_places, texts)):
        return False
    said = [number for number, text in enumerate(talk.marked) if text.strip() and not has_places(text)]
    return bool(said) and any(map(has_places, talk.marked[said[0] :]))


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
    stated = next((name for name in (names[:1] if reply else names) if not is_empty(record.get(name))), None)
    if reply and record.get("label") is False:
        raise SampleError("its 'label' is false, which marks the reply as a bad one; leave it out", "wrong_field")
    if not reply and stated is None:
        raise SampleError(f"no message of the assistant and no field '{names[0]}'", "missing_field")
    thought, answer = thought_and_answer(reply)
    if not answer and stated is None:
        raise SampleError("the message of the assistant ends with its thought and has no answer", "missing_field")
    return record.get("process") or thought, answer if stated is None else answer_of(record, stated)


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
    if (images or videos) and has_places(talk.reply):
        raise SampleError(
            "the assistant's message has the tag of a picture or video, but only text is learned; give the answer as "
            "'solution' if the tag is meant as text",
            "wrong_field",
        )
    if record.get("tools") not in (None, "", "[]", []):
        raise SampleError("its field 'tools' lists functions, which are not shown here; remove it", "wrong_field")
    for turn in turns:
        for kind, media in (("image", images), ("video", videos)):
            if media:
                refuse_change(turn, kind, "a message")
    return Draft(record, question, answer, process, images, videos, tuple(read))


def messages(record: dict) -> Draft:
    """Read `messages` of role and content (chat, ms-swift, TRL), and the column `solution`."""
    return conversation(record, turns_of(record["messages"]) or [], REFERENCES, ("messages", *SYSTEM_FIELDS))


def conversations(record: dict) -> Draft:
    """Read `conversations` (`conversation`) of from and value (LLaVA, ShareGPT), `image` and `system`."""
    turns = turns_of(first(record, ("conversations", "conversation"))) or []
    return conversation(record, turns, REFERENCES, ("conversations", "conversation", *SYSTEM_FIELDS))
