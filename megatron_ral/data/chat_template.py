"""Chat template of a model folder: the text of a question, and the checks that it can be trained on.

A response is what the model writes behind the generation prompt. A template may write the first tag of the response
itself (`<think>`, as that of Qwen3-VL-Thinking does). Such *prefilled* text counts as the beginning of every response:
it is put before decoded text, and taken from the beginning of a reference response.
"""

from typing import Any, Sequence

from transformers import PreTrainedTokenizerBase

from megatron_ral.errors import ConfigError
from megatron_ral.rewards.answer import FORMAT_TAGS

PROBE_QUESTION = "How many 7s are in the picture: <0>, 1 or [2]?"
"""Question of the prompt that is tried before a model folder is used."""
_WAY_OUT = "copy chat_template.jinja from the model that the folder was made from"


def render(tokenizer: PreTrainedTokenizerBase, kinds: Sequence[str], question: str) -> str:
    """Return the text of a prompt, generation prompt included.

    Args:
        tokenizer: Tokenizer with a chat template.
        kinds: `image` or `video` for each visual, in order.
        question: Text behind the visuals.
    """
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": question}]
    turns: Any = [{"role": "user", "content": content}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def prefilled_text(
    tokenizer: PreTrainedTokenizerBase, path: str, placeholders: dict[str, str], pair: tuple[str, str], end_of_turn: str
) -> str:
    """Try a chat template on one question per kind of visual; return the text that it writes of every response.

    Args:
        tokenizer: Tokenizer with the template.
        path: Model folder, for the error.
        placeholders: Kind of a visual (`image`, `video`) -> text that its tokens replace.
        pair: Tokens before and behind those of a visual.
        end_of_turn: Token that ends a turn.

    Returns:
        `<think>` with the white space behind it, or an empty text.

    Raises:
        ConfigError: There is no template, it writes the date, or it cannot render such a question.
    """
    template: Any = tokenizer.chat_template
    if template is None:
        raise ConfigError(f"'{path}'", None, f"holds a tokenizer without a chat template; {_WAY_OUT}")
    if isinstance(template, dict) and "default" not in template:
        names = ", ".join(template)
        raise ConfigError(f"'{path}'", None, f"has chat templates named {names}; name the one for questions 'default'")
    if "strftime_now" in str(template):
        raise ConfigError(
            f"'{path}'",
            None,
            "has a chat template that writes the time (strftime_now), so that a run resumed tomorrow would get other "
            "prompts; write a fixed date into it",
        )
    prefilled = ""
    for kind, placeholder in placeholders.items():
        try:
            text = render(tokenizer, [kind], PROBE_QUESTION)
        except Exception as error:  # a template is a program, which may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise _unusable(path, kind, f"fails on it ({reason})") from None
        if text.count(placeholder) != 1:
            raise _unusable(path, kind, f"writes {placeholder} {text.count(placeholder)} times instead of once")
        token = placeholder.removeprefix(pair[0]).removesuffix(pair[1])
        if pair[0] + token + pair[1] not in text:
            raise _unusable(path, kind, f"does not write {token} between {pair[0]} and {pair[1]}")
        if text.count(PROBE_QUESTION) != 1:
            raise _unusable(path, kind, f"writes the question {text.count(PROBE_QUESTION)} times instead of once")
        _, ended, generation_prompt = text.partition(PROBE_QUESTION)[2].partition(end_of_turn)
        if not ended:
            raise _unusable(path, kind, f"does not end the question with {end_of_turn}")
        if not generation_prompt.strip():
            raise _unusable(path, kind, "writes no generation prompt behind it (the head of the assistant's turn)")
        prefilled = _prefilled(path, generation_prompt)
    return prefilled


def without_prefilled(response: str, prefilled: str) -> str:
    """Return the part of a reference response that the model has to write behind the prefilled text.

    A reference without reasoning closes the thought that the template has opened.
    """
    if not prefilled:
        return response
    opening, body = prefilled.strip(), response.lstrip()
    if not body.startswith(opening):
        return f"\n</think>\n\n{body}"
    return body[len(opening) :].removeprefix(prefilled[len(opening) :])


def _prefilled(path: str, generation_prompt: str) -> str:
    """Return the tail of a generation prompt from its first tag on.

    Raises:
        ConfigError: The tail is more than an opened thought.
    """
    begin = min((at for tag in FORMAT_TAGS if (at := generation_prompt.find(tag)) >= 0), default=None)
    if begin is None:
        return ""
    tail = generation_prompt[begin:]
    if tail.strip() != "<think>":
        raise ConfigError(
            f"'{path}'",
            None,
            f"has a chat template that begins every response with {tail!r}; only '<think>' can be prefilled, so take a "
            "template (or the default of an option in it) that leaves the rest to the model",
        )
    return tail


def _unusable(path: str, kind: str, fault: str) -> ConfigError:
    article = "an" if kind == "image" else "a"
    return ConfigError(
        f"'{path}'",
        None,
        f"has a chat template that cannot ask a question about {article} {kind}: it {fault}; {_WAY_OUT}",
    )
