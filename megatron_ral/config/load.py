"""Strict loading: YAML file + `dotted.key=value` overrides -> `RunConfig`, or one sentence about what is wrong.

PyYAML follows YAML 1.1 and reads `1e-6` as a string. The loader here accepts that spelling as a number too.
"""

import dataclasses
import difflib
import json
import re
from pathlib import Path
from typing import Any, Sequence

import yaml
from pydantic import TypeAdapter, ValidationError

from megatron_ral.config.retired import drop_retired
from megatron_ral.config.rules import check_settings
from megatron_ral.config.sections import RunConfig
from megatron_ral.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-6 as a float and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise ConfigError(key, None, f"is given twice (line {key_node.start_mark.line + 1})")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def known_keys(section: Any = RunConfig, prefix: str = "") -> list[str]:
    """Return the dotted keys of all sections and settings."""
    keys = []
    for field in dataclasses.fields(section):
        keys.append(prefix + field.name)
        if dataclasses.is_dataclass(field.type):
            keys += known_keys(field.type, f"{prefix}{field.name}.")
    return keys


def _wrong_value(error: Any) -> ConfigError:
    """Return one error of pydantic as ours."""
    key = ".".join(str(part) for part in error["loc"])
    value = "null" if error["input"] is None else error["input"]
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        near = difflib.get_close_matches(key, known_keys(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return ConfigError(key, value, f"is not a known setting{hint}")
    if error["type"] in ("dataclass_exact_type", "dataclass_type"):
        return ConfigError(key, value, "must be a section (a mapping)")
    return ConfigError(key, value, f": {error['msg'][0].lower()}{error['msg'][1:]}")


def _set(tree: dict, dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    node: Any = tree
    for part in parents:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
            continue
        if not isinstance(node, dict):
            raise ConfigError(dotted, value, f"cannot be set, because '{part}' is not in a section")
        node = node.setdefault(part, {})
    if isinstance(node, list) and leaf.isdigit() and int(leaf) < len(node):
        node[int(leaf)] = value
    elif isinstance(node, dict):
        node[leaf] = value
    else:
        raise ConfigError(dotted, value, f"cannot be set, because there is no section or list item '{leaf}'")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply overrides in order, and check everything that needs no cluster.

    Args:
        path: YAML file, whose top-level keys are the fields of `RunConfig`.
        overrides: strings `dotted.key=value` with the value in YAML. List items are named by index
            (`data.train.0.shards=x`).

    Raises:
        ConfigError: unknown key, wrong type, impossible value or combination, unreadable file.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError("config file", path, "does not exist")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}
    except ConfigError as error:
        raise _located(error, str(path)) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}'", None, f"is not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"'{path}'", None, f"must be a mapping of sections, not {type(tree).__name__}")
    return apply_overrides(tree, overrides, str(path))


def apply_overrides(tree: dict, overrides: Sequence[str], source: str = "") -> RunConfig:
    """Return the configuration of a mapping of sections with overrides, checked like a file.

    Args:
        tree: content of a file; changed in place.
        overrides: as for `load_config`.
        source: file that errors name; empty for none.

    Raises:
        ConfigError: as `load_config`.
    """
    if source and overrides:
        source += " with overrides"
    try:
        drop_retired(tree)
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals or not key or key.startswith("-"):
                raise ConfigError(f"override '{override}'", None, "is not of the form dotted.key=value")
            try:
                value = yaml.load(text, Loader=_Loader)
            except (yaml.YAMLError, TypeError):
                value = text
            _set(tree, key, value)
        drop_retired(tree, strict=True)
        # As JSON, because there a mapping may become a section and a list a tuple while scalars stay strict.
        config = TypeAdapter(RunConfig).validate_json(json.dumps(tree, default=str))
        config = _with_correction(config, tree)
        check_settings(config)
    except ValidationError as error:
        raise _located(_wrong_value(error.errors()[0]), source) from None
    except ConfigError as error:
        raise _located(error, source) from None
    return config


def _with_correction(config: RunConfig, tree: dict) -> RunConfig:
    """Return the configuration with the default of `loss.sampler_correction` that rollout.overlap has.

    Args:
        config: Configuration of `tree`.
        tree: Settings that are written. What is written stays.
    """
    written = "sampler_correction" in (tree.get("loss") or {})
    explores = config.rollout.has_views or config.rollout.attention_noise.sigma > 0  # refused in words of its own
    if written or explores or not config.overlaps or config.loss.policy_coef == 0:
        return config
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, sampler_correction="token_truncate"))


def _located(error: ConfigError, source: str) -> ConfigError:
    """Return the error with the file it is about at the end of its sentence."""
    return ConfigError(error.key, error.value, f"{error.remedy} (in {source})") if source else error


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

    return walk(_plain(config), "")


def dump_config(config: RunConfig) -> str:
    """Return the resolved configuration as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(_plain(config), sort_keys=False, default_flow_style=None, width=120)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
