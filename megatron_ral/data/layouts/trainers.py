"""Records as other trainers take them: verl, TRL, ms-swift, and alpaca as ms-swift and LLaMA-Factory read it."""

import json
from dataclasses import replace
from typing import Any

from megatron_ral.data.issues import SampleError
from megatron_ral.data.layouts.chat import REFERENCES, conversation, turns_of
from megatron_ral.data.layouts.draft import Draft
from megatron_ral.data.layouts.values import SYSTEM_FIELDS, is_empty, lettered_answer, options_of, text_of


def reward_model(record: dict) -> dict:
    """Return the field `reward_model`, also from JSON text; empty if it is no object."""
    value = record.get("reward_model")
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}


def verl(record: dict) -> Draft:
    """Read `prompt` of messages or text, `images`, `videos` and `reward_model.ground_truth`."""
    truth = reward_model(record).get("ground_truth")
    if is_empty(truth) and not any(not is_empty(record.get(name)) for name in REFERENCES):
        raise SampleError("no field 'ground_truth' in 'reward_model'", "missing_field")
    if not is_empty(truth):
        record = {**record, "ground_truth": truth}
    return _prompt(record, None, ("ground_truth", *REFERENCES), ("prompt", "reward_model", "extra_info"))


def trl(record: dict) -> Draft:
    """Read `prompt` and `completion` of messages or text, `images`, and the column `solution`."""
    reply = record.get("completion")
    return _prompt(record, reply, REFERENCES, ("prompt", "completion"))


def _prompt(record: dict, reply: Any, names: tuple[str, ...], read: tuple[str, ...]) -> Draft:
    turns = _as_turns(record["prompt"], "user", "prompt")
    turns += _as_turns(reply, "assistant", "completion") if not is_empty(reply) else []
    draft = conversation(record, turns, names, (*read, *SYSTEM_FIELDS))
    return replace(draft, answer=lettered_answer(draft.answer, options_of(record)))


def _as_turns(value: Any, role: str, name: str) -> list:
    turns = turns_of(value)
    if turns is not None:
        return turns
    if not isinstance(value, str):
        raise SampleError(f"'{name}' is neither text nor a list of messages", "wrong_field")
    return [{"role": role, "content": value.strip()}]


def swift(record: dict) -> Draft:
    """Read `query`, `response`, `system` and the columns of pictures and videos (ms-swift)."""
    return _instruction(record, text_of(record, "query"), "response", ("query", "response"))


def alpaca(record: dict) -> Draft:
    """Read `instruction`, `input`, `output`, `system` and the columns of pictures and videos."""
    parts = [text_of(record, "instruction"), record.get("input")]
    question = "\n".join(part.strip() for part in parts if isinstance(part, str) and part.strip())
    return _instruction(record, question, "output", ("instruction", "input", "output"))


def _instruction(record: dict, question: str, reply: str, read: tuple[str, ...]) -> Draft:
    if not is_empty(record.get("history")):
        raise SampleError(
            "more than one question (in 'history'); only conversations of one turn are read", "wrong_field"
        )
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text_of(record, reply).strip()}]
    return conversation(record, turns, REFERENCES, (*read, *SYSTEM_FIELDS, "history"))
