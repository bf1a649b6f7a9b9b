"""Tags of the response format as tokens or as text.

A tokenizer may hold `<think>` and the other tags as added tokens of their own. Whether the model knows these tokens is
a matter of its training, which no file states: Qwen3-VL-Thinking writes `<think>` as a token, and Qwen3-VL-Instruct has
the same token and was never trained on it, so that it would never write the format. With `text`, the added token gets
another name, and the tag is cut into ordinary pieces like any text. With `token`, it stays one token. Either way no tag
is a special token, because special tokens are left out when a response is decoded.

The files of an edited tokenizer are the same in a run and in its exported folder, so that stock transformers cuts and
decodes text as the run did.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_ral.data.model_inputs import load_tokenizer
from megatron_ral.rewards.answer import FORMAT_TAGS

AUTO, TEXT, TOKEN = "auto", "text", "token"
_STALE = ("added_tokens.json", "special_tokens_map.json", "vocab.json", "merges.txt")
"""Files that say the same as tokenizer.json and tokenizer_config.json, with the tags as they were."""


def tag_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Return the tags that are added tokens of a tokenizer, with True for special tokens."""
    special = set(tokenizer.all_special_tokens)
    added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
    return {tag: added[tag] or tag in special for tag in FORMAT_TAGS if tag in added}


def choose_tags(tokenizer: PreTrainedTokenizerBase, choice: str = AUTO) -> str:
    """Return `token` or `text`, the form in which a model reads and writes the tags.

    Args:
        tokenizer: Tokenizer of the model.
        choice: model.format_tags. `auto`: tokens where the chat template writes one of them (a model that was trained
            to think), or where all four tags are ordinary added tokens (a tokenizer made for this format). Otherwise
            text.
    """
    if choice != AUTO:
        return choice
    tokens, template = tag_tokens(tokenizer), str(tokenizer.chat_template or "")
    made_for_format = len(tokens) == len(FORMAT_TAGS) and not any(tokens.values())
    return TOKEN if made_for_format or any(tag in template for tag in tokens) else TEXT


def needs_edit(tokenizer: PreTrainedTokenizerBase, tags: str) -> bool:
    """Return whether a tokenizer has to be edited for tags as `token` or `text`."""
    tokens = tag_tokens(tokenizer)
    return bool(tokens) if tags == TEXT else any(tokens.values())


def edited_tokenizer(tokenizer: PreTrainedTokenizerBase, tags: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer that reads and writes the tags as `token` or `text`; the same one where it does so already."""
    if not needs_edit(tokenizer, tags):
        return tokenizer
    with tempfile.TemporaryDirectory() as folder:
        _write(tokenizer, tags, Path(folder))
        return AutoTokenizer.from_pretrained(folder)


def export_tokenizer(source: str | Path, folder: Path, choice: str) -> None:
    """Put the edited tokenizer of a model folder into an exported one; leave it as it is where nothing is edited.

    Args:
        source: Folder with the tokenizer that the run started from.
        folder: Exported folder, which has the files of `source`.
        choice: model.format_tags of the run.
    """
    tokenizer = load_tokenizer(source)
    tags = choose_tags(tokenizer, choice)
    if needs_edit(tokenizer, tags):
        for name in _STALE:
            (folder / name).unlink(missing_ok=True)
        _write(tokenizer, tags, folder)


def _write(tokenizer: PreTrainedTokenizerBase, tags: str, folder: Path) -> None:
    """Write the files of a tokenizer with its tags edited."""
    tokenizer.save_pretrained(folder)
    names = {tag: _new_name(tokenizer, tag) if tags == TEXT else tag for tag in tag_tokens(tokenizer)}
    rules_file, config_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
    rules, config = (json.loads(file.read_text(encoding="utf-8")) for file in (rules_file, config_file))
    model = rules["model"]
    if isinstance(vocabulary := model.get("vocab"), dict):
        model["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
    if "merges" in model:  # a merge whose result is a whole tag
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in names]
    for entries in (rules["added_tokens"], list(config.get("added_tokens_decoder", {}).values())):
        for entry in entries:
            if entry["content"] in names:
                entry.update(content=names[entry["content"]], special=False)
    for key in ("extra_special_tokens", "additional_special_tokens"):
        if key in config:
            config[key] = _without(config[key], names)
    rules_file.write_text(json.dumps(rules, ensure_ascii=False, indent=2), encoding="utf-8")
    config_file.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _new_name(tokenizer: PreTrainedTokenizerBase, tag: str) -> str:
    """Return the name of a tag's token when the tag is text."""
    return f"<|unused_{tokenizer.convert_tokens_to_ids(tag)}|>"


def _without(tokens: Any, names: dict[str, str]) -> Any:
    """Return a list or mapping of special tokens without the tags."""
    if isinstance(tokens, dict):
        return {key: token for key, token in tokens.items() if _text(token) not in names}
    return [token for token in tokens if _text(token) not in names]


def _text(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)
