"""Comparison of two checkpoints' inputs: a student can learn from a teacher only if both read a sample alike."""

import json
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from megatron_ral.errors import ConfigError

SHOWN_TEXT = 120
"""Characters of a differing rule in the error."""
PATCH_RULES = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std", "rescale_factor")


def check_same_tokenizer(
    ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, our_key: str, their_key: str
) -> None:
    """Compare the tokens, their ids, and the rules by which text is cut into them.

    Args:
        ours: tokenizer that makes the prompts.
        theirs: tokenizer of the other checkpoint.
        our_key: setting that names our checkpoint, for the error.
        their_key: setting that names the other checkpoint, for the error.

    Raises:
        ConfigError: the first difference.
    """
    vocabularies = [tokenizer.get_vocab() for tokenizer in (ours, theirs)]
    for token in sorted(set(vocabularies[0]) | set(vocabularies[1])):
        ids = [vocabulary.get(token) for vocabulary in vocabularies]
        if ids[0] != ids[1]:
            names = ["no id" if number is None else f"id {number}" for number in ids]
            raise _another_tokenizer(our_key, their_key, f"token {token!r} has", *names)
    their_rules = _token_rules(theirs)
    for name, rule in _token_rules(ours).items():
        values = [rule, their_rules[name]]
        if values[0] == values[1]:
            continue
        if all(isinstance(value, list) for value in values):  # merges: the first that differs
            at = next((index for index, pair in enumerate(zip(*values)) if pair[0] != pair[1]), min(map(len, values)))
            name, values = f"{name}[{at}]", [value[at] if at < len(value) else "missing" for value in values]
        raise _another_tokenizer(our_key, their_key, f"{name} is", *(str(value)[:SHOWN_TEXT] for value in values))


def _another_tokenizer(our_key: str, their_key: str, subject: str, ours: str, theirs: str) -> ConfigError:
    return ConfigError(
        their_key,
        None,
        f"has another tokenizer than {our_key}: {subject} {theirs} in {their_key} and {ours} in {our_key}; distil from "
        "a model with the same tokenizer",
    )


def _token_rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the rules by which a tokenizer cuts text, beside its vocabulary."""
    rules = json.loads(cast(Any, tokenizer).backend_tokenizer.to_str())
    model = rules["model"]
    return {
        "merges": model.get("merges"),
        "type": model.get("type"),
        "normalizer": rules.get("normalizer"),
        "pre_tokenizer": rules.get("pre_tokenizer"),
    }


def check_same_patches(ours: Any, theirs: Any, our_key: str, their_key: str) -> None:
    """Compare the rules by which a picture becomes patches, its size limits aside.

    Raises:
        ConfigError: the first difference.
    """
    for name in PATCH_RULES:
        our_value, their_value = (getattr(processor, name, None) for processor in (ours, theirs))
        if our_value != their_value:
            raise ConfigError(
                their_key,
                None,
                f"makes other patches of a picture than {our_key}: {name} is {their_value} in {their_key} and "
                f"{our_value} in {our_key}; distil from a model with the same visual grid",
            )
