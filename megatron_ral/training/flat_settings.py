"""Settings of a run by dotted key, as checkpoints compare them and loggers show them."""

from typing import Any

import yaml

from megatron_ral.config import RunConfig, dump_config


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """Return every setting by dotted key, in the order of the sections.

    Values are plain: true or false, numbers, text, lists, and an empty mapping where nothing is named in it. A list is
    one value, also a list of sections, which then are mappings.
    """

    def walk(tree: Any, key: str) -> dict[str, Any]:
        if not isinstance(tree, dict) or not tree:
            return {key: tree}
        return {
            inner: value
            for name, item in tree.items()
            for inner, value in walk(item, f"{key}.{name}" if key else name).items()
        }

    return walk(yaml.safe_load(dump_config(config)), "")
