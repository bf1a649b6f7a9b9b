"""Strict loading: YAML file + `dotted.key=value` overrides -> `RunConfig`, or one sentence saying what is wrong.

PyYAML follows YAML 1.1 and reads `1e-6` as a string; the loader here also accepts that spelling as a number.
"""

import dataclasses
import difflib
import json
import re
from pathlib import Path
from typing import Any, Sequence

import yaml
from pydantic import TypeAdapter, ValidationError

from megatron_ral.config.sections import RunConfig
from megatron_ral.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-6 as a float and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise ConfigError(f"key '{key}' is given twice (line {key_node.start_mark.line + 1})")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _known_keys(section: Any, prefix: str = "") -> list[str]:
    keys = []
    for field in dataclasses.fields(section):
        keys.append(prefix + field.name)
        if dataclasses.is_dataclass(field.type):
            keys += _known_keys(field.type, f"{prefix}{field.name}.")
    return keys


def _sentence(error: dict, source: str) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        near = difflib.get_close_matches(key, _known_keys(RunConfig), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        return f"{source}: unknown key '{key}' = {error['input']!r}{hint}"
    if error["type"] == "dataclass_exact_type" or error["type"] == "dataclass_type":
        return f"{source}: '{key}' must be a section (a mapping), not {error['input']!r}"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{source}: '{key}' = {error['input']!r}: {message}"


def _set(tree: dict, dotted: str, value: Any, source: str) -> None:
    *parents, leaf = dotted.split(".")
    node: Any = tree
    for part in parents:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
            continue
        if not isinstance(node, dict):
            raise ConfigError(f"{source}: '{dotted}' has no parent section '{part}'")
        node = node.setdefault(part, {})
    if isinstance(node, list) and leaf.isdigit() and int(leaf) < len(node):
        node[int(leaf)] = value
    elif isinstance(node, dict):
        node[leaf] = value
    else:
        raise ConfigError(f"{source}: '{dotted}' cannot be set")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply overrides in order, check everything that needs no cluster.

    Args:
        path: YAML file; its top-level keys are the fields of `RunConfig`.
        overrides: strings `dotted.key=value`, the value in YAML; list items by index (`data.train.0.shards=x`).

    Raises:
        ConfigError: unknown key, wrong type, impossible value or combination, unreadable file.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file '{path}' does not exist")
    source = str(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: must be a mapping of sections, not {type(tree).__name__}")
    return apply_overrides(tree, overrides, source)


def apply_overrides(tree: dict, overrides: Sequence[str], source: str = "settings") -> RunConfig:
    """The configuration of a mapping of sections with overrides, checked like a file.

    Args:
        tree: what a file would hold; changed in place.
        overrides: as for `load_config`.
        source: what errors name.

    Raises:
        ConfigError: as `load_config`.
    """
    origin = source
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key or key.startswith("-"):
            raise ConfigError(f"override '{override}' is not of the form dotted.key=value")
        try:
            value = yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, TypeError):
            value = text
        _set(tree, key, value, f"override '{override}'")
        source = f"{origin} with overrides"
    try:
        # As JSON, because there a mapping may become a section and a list a tuple while scalars stay strict.
        config = TypeAdapter(RunConfig).validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise ConfigError(_sentence(error.errors()[0], source)) from None
    problem = config.problem()
    if problem:
        raise ConfigError(f"{source}: {problem[0]} {problem[1]}")
    return config


def check_layout(config: RunConfig, world_size: int, training: bool = True) -> None:
    """Raise ConfigError when `world_size` processes cannot run this configuration."""
    problem = config.layout_problem(world_size, training)
    if problem:
        raise ConfigError(f"{problem[0]} {problem[1]}")


def flat_settings(config: RunConfig) -> dict[str, str]:
    """Every resolved setting as text, by dotted key; a list is one value."""

    def flat(tree: Any, prefix: str) -> dict[str, str]:
        if not isinstance(tree, dict) or not tree:
            return {prefix[:-1]: str(tree)}
        return {key: value for name, item in tree.items() for key, value in flat(item, f"{prefix}{name}.").items()}

    return flat(yaml.safe_load(dump_config(config)), "")


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal object."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, (tuple, list)):
            return [plain(item) for item in value]
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return value

    return yaml.safe_dump(plain(config), sort_keys=False, default_flow_style=None, width=120)
