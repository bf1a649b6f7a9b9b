"""Typed configuration: sections with every default, a strict loader, and rules about combinations of settings."""

from megatron_ral.config.load import apply_overrides, dump_config, flat_settings, known_keys, load_config
from megatron_ral.config.rules import check_layout, setting_warnings
from megatron_ral.config.sections import RunConfig

__all__ = [
    "RunConfig",
    "apply_overrides",
    "check_layout",
    "dump_config",
    "flat_settings",
    "known_keys",
    "load_config",
    "setting_warnings",
]
