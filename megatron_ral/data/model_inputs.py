"""Config, tokenizer and image processor of a model folder, and the check that they are of one model."""

import math
from pathlib import Path
from typing import Any, Mapping, cast

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from megatron_ral.errors import ConfigError, UserError
from megatron_ral.models.families import Family, VisionTokens, find_family
from megatron_ral.models.folder import check_fetched, read_json

_PROCESSOR_TEMPLATE = "chat_template.json"
"""File in which processors of earlier versions of transformers kept the chat template."""


def load_tokenizer(path: str | Path) -> Any:
    """Return the tokenizer of a folder. One without a chat template has that of the processor, as stock processors do.

    Whatever transformers raises passes through.
    """
    tokenizer, file = AutoTokenizer.from_pretrained(path), Path(path) / _PROCESSOR_TEMPLATE
    if tokenizer.chat_template is None and file.is_file():
        template = read_json(file, "chat_template")["chat_template"]
        is_list = isinstance(template, list)
        tokenizer.chat_template = {entry["name"]: entry["template"] for entry in template} if is_list else template
    return tokenizer


def load_inputs(path: str) -> tuple[Any, Family, Any, Any]:
    """Return config, family, tokenizer and image processor of a Hugging Face folder.

    Raises:
        ConfigError: a file is missing or cannot be read, or the family is unknown.
        CheckpointError: files of the folder were not fetched.
    """
    if Path(path).is_dir():
        check_fetched(path, f"'{path}'")
    try:
        config = AutoConfig.from_pretrained(path)
        family = find_family(config.model_type, f"'{path}'")
        return config, family, load_tokenizer(path), _load_image_processor(path, family)
    except UserError:
        raise
    except Exception as error:  # transformers raises many types for what these files can hold
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"'{path}'", None, f"holds no usable tokenizer and image processor ({reason})") from None


def _load_image_processor(path: str, family: Family) -> Any:
    processor_class = family.image_processor_class()
    settings, _ = processor_class.get_image_processor_dict(path)
    kind = settings.get("image_processor_type", family.image_processors if "patch_size" in settings else "none")
    if not kind.startswith(family.image_processors):
        known = processor_class.__name__.removesuffix("Pil")
        raise ConfigError(
            f"'{path}'",
            None,
            f"names the image processor {kind} in preprocessor_config.json; only {known} is known, so "
            "copy the file from the model that the folder was made from",
        )
    return processor_class.from_pretrained(path)


def check_image_processor(path: str, processor: Any, sizes: Mapping[str, Any]) -> None:
    """Check that an image processor makes the patches that a vision tower takes, from pixels between 0 and 1.

    Args:
        path: Model folder, for the error.
        processor: Image processor of the folder.
        sizes: Settings that follow from the vision tower (`Family.image_processor_sizes`).

    Raises:
        ConfigError: naming the first value that differs.
    """
    of_config, known = "which config.json has in vision_config", "the only value that is known"
    wanted = {
        **{name: (value, of_config) for name, value in sizes.items()},
        **dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), (True, known)),
        "rescale_factor": (1 / 255, known),
    }
    for name, (value, why) in wanted.items():
        found = getattr(processor, name)
        if not (math.isclose(found, value, rel_tol=1e-6) if isinstance(value, (int, float)) else found == value):
            raise ConfigError(
                f"'{path}'", None, f"has {name} = {found} in preprocessor_config.json instead of {value}, {why}"
            )
    if not all(value > 0 for value in processor.image_std):
        raise ConfigError(f"'{path}'", None, f"has image_std = {list(processor.image_std)} in preprocessor_config.json")


def vision_tokens(
    path: str, family: Family, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> VisionTokens:
    """Return the names of the visual tokens.

    Raises:
        ConfigError: the tokenizer has other tokens than config.json names, or more than the model has rows.
    """
    ids = family.named_token_ids(config, tokenizer)
    for key, number in ids.items():
        if number not in tokenizer.added_tokens_decoder:
            name = tokenizer.convert_ids_to_tokens(number) if isinstance(number, int) else None
            file = "config.json" if key.endswith("_id") else "tokenizer_config.json"
            raise ConfigError(
                f"'{path}'",
                None,
                f"has {key} = {number} in {file}, which is no added token of its tokenizer (it is {name!r}); "
                "config and tokenizer are not of one model",
            )
    rows, largest = config.get_text_config().vocab_size, max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ConfigError(
            f"'{path}'",
            None,
            f"has tokens up to number {largest} in its tokenizer but {rows} rows of the embedding in config.json "
            "(text_config.vocab_size); config and tokenizer are not of one model",
        )
    if tokenizer.pad_token_id in ids.values():
        raise ConfigError(f"'{path}'", None, f"pads with {tokenizer.pad_token}, a visual token; name another pad_token")
    return VisionTokens(*tokenizer.convert_ids_to_tokens([cast(int, number) for number in ids.values()]))
